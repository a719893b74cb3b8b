"""The data directory: who owns it, where things lie, and what a killed process left in it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Final

import structlog

from loquetier.adapters.durable import fsync_directory
from loquetier.errors import ConfigError

log = structlog.get_logger("loquetier.server.store")

DATABASE: Final = "loquetier.sqlite3"
_LOCK: Final = ".lock"


class DataDir:
    """Owned by one process while it is open.

    Raises:
        ConfigError: it cannot be made or written, or another process owns it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.files, self.jobs = self.root / "files", self.root / "jobs"
        self.adapters, self.temporary = self.root / "adapters", self.root / "tmp"
        # Published versions that left memory: jobs publish again after a restart, so none outlives its process.
        self.spill = self.root / "spill"
        self._lock = -1
        try:
            self._open()
        except OSError as error:
            self.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and self._is_locked(error):
                raise ConfigError(f"--data-dir {str(root)!r} is in use by another process; give another one") from error
            raise ConfigError(f"--data-dir {str(root)!r} cannot be used: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _is_locked(error: OSError) -> bool:
        return isinstance(error, BlockingIOError)

    def _open(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        # The kernel drops the lock with the process, however that dies.
        self._lock = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        rooms = (self.files, self.jobs, self.adapters)
        lost = next((room for room in rooms if room.is_dir() and any(room.iterdir())), None)
        if lost is not None and not self.database.exists():
            raise ConfigError(
                f"--data-dir {str(self.root)!r} has {lost.name}/ but no {DATABASE}: without it nobody knows whose they "
                "are. Restore it from a backup, or give another directory."
            )
        for room in (*rooms, self.temporary, self.spill):
            room.mkdir(exist_ok=True)
        for left in (*self.temporary.iterdir(), *self.spill.iterdir()):
            _remove(left)
        fsync_directory(self.root)

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.root / DATABASE

    def sweep(self, files: Container[str], jobs: Container[str], adapters: Container[str]) -> list[Path]:
        """Remove what no row knows: a kill came between a file and its commit. Returns what was removed."""
        gone = [
            entry
            for room, known in ((self.files, files), (self.jobs, jobs), (self.adapters, adapters))
            for entry in room.iterdir()
            if entry.name not in known
        ]
        for path in gone:
            _remove(path)
            log.warning("orphan_removed", path=f"{path.parent.name}/{path.name}")
        return gone

    def leftovers(self) -> Iterator[Path]:
        """Temporary files of any kind; none while nothing is being written."""
        yield from self.temporary.iterdir()
        for path in self.root.rglob("*"):
            if ".tmp-" in path.name or ".old-" in path.name or path.name.endswith(".new"):
                yield path

    def close(self) -> None:
        """Let others use the directory. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_durably(path: Path) -> None:
    """Remove a file or directory that no row refers to any more; it may be gone already."""
    if path.is_symlink() or path.exists():
        _remove(path)
        fsync_directory(path.parent)
