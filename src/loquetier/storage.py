"""Writing on a disk that may be full: the job is held, the write is tried again, and both go on when there is room."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from loquetier.errors import InsufficientStorageError

log = logging.getLogger("loquetier.jobs")
T = TypeVar("T")

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds until a write is tried again: doubled each time."""

RunWrite = Callable[[Callable[[], None], int], None]
"""``(write, bytes that it needs)``: runs `write`, which leaves nothing behind where it fails."""


def at_once(write: Callable[[], None], needed: int) -> None:
    """Run `write` and let it fail."""
    del needed
    write()


class StorageWait:
    """Runs the writes of one thread, each until there is room for it.

    Args:
        directory: where they go.
        hold: told why the job cannot go on, each time a try has failed.
        release: told that it can.
    """

    def __init__(self, directory: Path, hold: Callable[[str], None], release: Callable[[], None]) -> None:
        self._directory, self._hold, self._release = directory, hold, release
        self._changed = threading.Condition()
        self._wanted = False
        self._is_patient = True

    def run(self, write: Callable[[], None], needed: int) -> None:
        """Run `write`; where the disk is full, wait and run it again.

        Raises:
            OSError: any other trouble; or the disk is full, and `give_up` was called.
        """
        wait = 0.0
        try:
            while True:
                try:
                    return write()
                except OSError as error:
                    if error.errno not in FULL or not self._is_patient:
                        raise
                    wait = min(2 * wait or FIRST_WAIT, LONGEST_WAIT)
                    self._tell(error, needed)
                with self._changed:
                    self._changed.wait_for(lambda: self._wanted or not self._is_patient, wait)
                    self._wanted = False
        finally:
            if wait:
                self._release()

    def try_now(self) -> None:
        """Do not wait any longer for the next try; any thread."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """One more try, and the error if there is still no room; any thread."""
        with self._changed:
            self._is_patient = False
            self._changed.notify_all()

    def _tell(self, error: OSError, needed: int) -> None:
        reason = (
            f"insufficient_storage: {str(self._directory)!r}: {needed} bytes needed, {free_bytes(self._directory)} "
            f"free ({error.strerror}); it goes on by itself when there is room"
        )
        log.warning("%s", reason)
        self._hold(reason)


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write; 0 where that cannot be told."""
    with suppress(OSError):
        return shutil.disk_usage(directory).free
    return 0


def out_of_room(directory: Path, needed: int) -> InsufficientStorageError:
    """The error of a write that found the disk full."""
    return InsufficientStorageError(
        f"{str(directory)!r}: {needed} bytes needed, {free_bytes(directory)} free; make room, or choose another "
        "directory"
    )


def with_room(directory: Path, work: Callable[[], T]) -> T:
    """`work`, which writes below `directory`. Raises InsufficientStorageError where that is full."""
    try:
        return work()
    except OSError as error:
        if error.errno in FULL and not isinstance(error, InsufficientStorageError):
            raise out_of_room(directory, 1 << 20) from error
        raise


def check_room(directory: Path, needed: int, what: str, fewer: str) -> None:
    """Whether there is room now.

    Args:
        what: needs it, in the plural.
        fewer: what would make it less.

    Raises:
        InsufficientStorageError: there is not, with the numbers.
    """
    free = free_bytes(directory)
    if needed > free:
        raise InsufficientStorageError(
            f"{what} need {needed} bytes in {str(directory)!r}, and {free} are free. Make room, {fewer}, or give "
            "another directory."
        )
