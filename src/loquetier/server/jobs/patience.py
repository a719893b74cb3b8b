"""Transactions that wait while the disk is full, on threads that may."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from loquetier.errors import InsufficientStorageError, LoquetierError
from loquetier.server.store.store import Store
from loquetier.storage import FIRST_WAIT, LONGEST_WAIT

T = TypeVar("T")
log = structlog.get_logger("loquetier.server.jobs")


class ClosingError(LoquetierError, RuntimeError):
    """The server is closing: what was to be done is done after the next start."""

    code = "shutting_down"
    status = 503


@dataclass(frozen=True, slots=True)
class Patience:
    """Tries again until there is room, or the server closes."""

    store: Store
    closing: threading.Event = field(default_factory=threading.Event)

    def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """`change` in a transaction. Raises ClosingError, and what `change` raises."""

        def run() -> T:
            with self.store.write() as c:
                return change(c)

        return self.run(run)

    def run(self, work: Callable[[], T]) -> T:
        """`work`, which leaves nothing behind where it fails for want of room. Raises ClosingError."""
        wait = FIRST_WAIT
        while True:
            try:
                return work()
            except InsufficientStorageError as error:
                log.warning("waits_for_room", problem=str(error))
                if self.closing.wait(wait):
                    raise ClosingError("the server is closing") from error
                wait = min(2 * wait, LONGEST_WAIT)
