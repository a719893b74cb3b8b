"""One SQLite file: one writer, one reader that waits for no commit, and refusals in one line."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from loquetier.errors import ConfigError, IntegrityError
from loquetier.server.store.schema import MIGRATIONS
from loquetier.storage import out_of_room

_FULL: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC})
"""What SQLite says where the disk has no room; a write error of another cause reads the same and may be tried again."""


class Database:
    """WAL and synchronous=FULL: what `transaction` has left is on the disk. Any thread.

    Raises:
        ConfigError: it cannot be opened, is damaged, or was written by a newer release. Nothing was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writing, self._reading = threading.RLock(), threading.Lock()
        try:
            self._writer = _connect(path)
        except sqlite3.Error as error:
            raise ConfigError(f"--data-dir: {str(path)!r} cannot be opened: {error}") from error
        try:
            self._check()
            self._migrate()
            self._reader = _connect(path)
            self._reader.execute("PRAGMA query_only=ON")
        except sqlite3.Error as error:
            self._writer.close()
            raise ConfigError(
                f"--data-dir: {str(path)!r} cannot be used: {error}. Restore it from a backup."
            ) from error
        except BaseException:
            self._writer.close()
            raise

    def _check(self) -> None:
        found = [row[0] for row in self._writer.execute("PRAGMA integrity_check(3)")]
        if found != ["ok"]:
            raise ConfigError(
                f"--data-dir: {str(self.path)!r} is damaged ({found[0].splitlines()[0]}). Restore it from a backup."
            )
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise ConfigError(
                f"--data-dir: {str(self.path)!r} has schema {version}, and this release knows {len(MIGRATIONS)}: a "
                "newer one has written it. Use that, or another --data-dir."
            )

    def _migrate(self) -> None:
        self._writer.execute("PRAGMA journal_mode=WAL")
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            with self.transaction() as c:
                for statement in filter(str.strip, script.split(";")):
                    c.execute(statement)
                c.execute(f"PRAGMA user_version={number}")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, durable when the context has been left. One at a time.

        Raises:
            InsufficientStorageError: the disk is full; nothing was changed.
        """
        with self._writing:
            if self._writer.in_transaction:
                raise IntegrityError("a transaction inside another: hand its connection on instead")
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except sqlite3.OperationalError as error:
                self._undo()
                if error.sqlite_errorcode in _FULL:
                    raise out_of_room(self.path.parent, 1 << 16) from error
                raise
            except BaseException:
                self._undo()
                raise

    def _undo(self) -> None:
        if self._writer.in_transaction:
            self._writer.execute("ROLLBACK")

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Read what is committed."""
        with self._reading:
            return self._reader.execute(sql, values).fetchall()

    def row(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Row | None:
        """The first row, if any."""
        return next(iter(self.rows(sql, values)), None)

    def value(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """The first column of the only row."""
        found = self.row(sql, values)
        assert found is not None
        return found[0]

    def check_integrity(self) -> None:
        """Raises IntegrityError where SQLite finds damage, or a reference to what is not there."""
        problems = [row[0] for row in self.rows("PRAGMA integrity_check(3)") if row[0] != "ok"]
        problems += [f"{row[0]} refers to no {row[2]}" for row in self.rows("PRAGMA foreign_key_check")]
        if problems:
            raise IntegrityError(f"{self.path.name}: {'; '.join(problems[:3])}")

    def close(self) -> None:
        """Fold the log into the file and close. Idempotent."""
        with self._writing, self._reading:
            self._reader.close()
            with suppress(sqlite3.ProgrammingError):  # closed before
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._writer.close()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA trusted_schema=OFF")
    except BaseException:
        connection.close()
        raise
    return connection
