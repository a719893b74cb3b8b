"""The store as a whole: open it, recover what a kill left, close it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from loquetier.errors import ConfigError
from loquetier.failpoints import FailPoint, no_fail_point
from loquetier.server.store.adapters import AdapterTable
from loquetier.server.store.database import Database
from loquetier.server.store.datadir import DataDir
from loquetier.server.store.files import FileTable
from loquetier.server.store.jobs import JobTable
from loquetier.server.store.once import OnceTable


@dataclass(frozen=True, slots=True)
class Store:
    """Everything that is durable. Any thread."""

    data_dir: DataDir
    database: Database
    files: FileTable
    jobs: JobTable
    adapters: AdapterTable
    once: OnceTable
    wall: Callable[[], float]
    fail_point: FailPoint

    def write(self) -> AbstractContextManager[sqlite3.Connection]:
        """A transaction over all tables; durable when it has been left. See `Database.transaction`."""
        return self.database.transaction()

    def know(self, c: sqlite3.Connection, owner: str, key_id: str) -> None:
        """Before something of theirs is written: that an owner and a key exist."""
        now = int(self.wall())
        c.execute("INSERT INTO owners VALUES (?, ?) ON CONFLICT DO NOTHING", (owner, now))
        c.execute(
            "INSERT INTO keys VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET owner = excluded.owner",
            (key_id, owner, now),
        )

    def bytes_of(self, owner: str) -> int:
        """What an owner's files and adapters, those of jobs too, take on the disk."""
        return self.files.bytes_of(owner) + self.adapters.bytes_of(owner)

    def bind(self, base_name: str, fingerprint: str) -> None:
        """Adapters and checkpoints fit one base only.

        Raises:
            ConfigError: this data directory has jobs or adapters of another one.
        """
        with self.write() as c:
            is_used = c.execute("SELECT EXISTS (SELECT 1 FROM jobs) OR EXISTS (SELECT 1 FROM adapters)").fetchone()[0]
            verb = "INSERT OR IGNORE" if is_used else "INSERT OR REPLACE"
            c.execute(f"{verb} INTO meta VALUES ('base', ?), ('fingerprint', ?)", (base_name, fingerprint))
            known = dict(c.execute("SELECT key, value FROM meta").fetchall())
        if known["fingerprint"] != fingerprint:
            raise ConfigError(
                f"--data-dir {str(self.data_dir.root)!r} holds jobs and adapters of the base {known['base']!r}, which "
                f"has other weights than {base_name!r}; serve that one, or give another directory"
            )

    def recover(self) -> None:
        """Remove what a kill left between a file and its commit. Only before anything is served."""
        with self.write() as c:
            self.files.expire(c)
            self.once.expire(c)
            self.adapters.forget_lost(c)
        self.files.tidy()
        open_jobs = {job.id for job in self.jobs.open()}
        self.data_dir.sweep(self.files.names(), open_jobs, self.adapters.directories())

    def check_integrity(self) -> None:
        """Raises IntegrityError where the database is damaged."""
        self.database.check_integrity()

    def close(self) -> None:
        """Let others have it. Idempotent."""
        self.database.close()
        self.data_dir.close()


def open_store(root: Path, wall: Callable[[], float] = time.time, fail_point: FailPoint = no_fail_point) -> Store:
    """Open a data directory, new or old, and recover it.

    Raises:
        ConfigError: it is in use, damaged, of a newer release, or cannot be written. Nothing was changed.
    """
    data_dir = DataDir(root)
    try:
        database = Database(data_dir.database)
    except BaseException:
        data_dir.close()
        raise
    store = Store(
        data_dir=data_dir,
        database=database,
        files=FileTable(database, data_dir, wall),
        jobs=JobTable(database, wall),
        adapters=AdapterTable(database, data_dir, wall, fail_point),
        once=OnceTable(database, wall),
        wall=wall,
        fail_point=fail_point,
    )
    try:
        store.recover()
    except BaseException:
        store.close()
        raise
    return store
