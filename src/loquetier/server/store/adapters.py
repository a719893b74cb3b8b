"""Durable adapters and their versions. Rows here, weights as PEFT directories in ``DATA_DIR/adapters``.

A version's directory is complete and synced before its row is committed (`place`, then a transaction with `add`), and
removed after its row has gone (a transaction with `remove`, then `tidy`). Several rows may share one directory.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loquetier.adapters.durable import fsync_directory
from loquetier.adapters.peft_write import CONFIG_NAME, WEIGHTS_NAME
from loquetier.errors import AdapterExistsError, AdapterNotFoundError
from loquetier.failpoints import FailPoint, no_fail_point
from loquetier.server.store.database import Database
from loquetier.server.store.datadir import DataDir, remove_durably

Source = Literal["loaded", "job", "checkpoint"]
"""Given by `load_lora_adapter`; in training by a job or made by one; a job's checkpoint."""


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """A name and whose it is."""

    name: str
    owner: str
    created_at: int
    """Unix seconds."""
    source: Source
    root: str
    """Where the weights came from, as told to clients."""
    job_id: str | None
    live_number: int | None
    """The version that the name means; None while there is none on the disk."""
    next_number: int
    """No version, served or durable, ever had this number or a higher one."""
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One immutable set of weights on the disk."""

    name: str
    number: int
    digest: str
    """sha256, as `read_adapter` and `write_adapter` give it."""
    directory: str
    """A name in ``DATA_DIR/adapters``, or an absolute path for weights that are kept elsewhere."""
    num_bytes: int
    """Of its files."""
    created_at: int
    step: int | None = None
    """Optimizer step of the job that made it."""

    @property
    def label(self) -> str:
        """``name@number``."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """Reads are what is committed; writes happen in the transaction whose connection they are given."""

    database: Database
    data_dir: DataDir
    wall: Callable[[], float]
    fail_point: FailPoint = no_fail_point

    def all(self) -> list[AdapterRow]:
        """In the order of their names."""
        return [_adapter(row) for row in self.database.rows("SELECT * FROM adapters ORDER BY name")]

    def find(self, name: str, owner: str | None = None) -> AdapterRow | None:
        """One adapter; with `owner`, only if it is his."""
        row = self.database.row("SELECT * FROM adapters WHERE name = ? AND owner = ifnull(?, owner)", (name, owner))
        return None if row is None else _adapter(row)

    def of_job(self, job_id: str) -> list[AdapterRow]:
        """What a job made: its own adapter and those of its checkpoints."""
        return [_adapter(row) for row in self.database.rows("SELECT * FROM adapters WHERE job_id = ?", (job_id,))]

    def versions(self, name: str) -> list[VersionRow]:
        """By number."""
        rows = self.database.rows("SELECT * FROM versions WHERE name = ? ORDER BY number", (name,))
        return [VersionRow(*row) for row in rows]

    def version(self, name: str, number: int | None = None) -> VersionRow | None:
        """The one of this number, or the live one."""
        row = self.database.row(
            "SELECT versions.* FROM versions JOIN adapters USING (name) "
            "WHERE name = ? AND number = ifnull(?, live_number)",
            (name, number),
        )
        return None if row is None else VersionRow(*row)

    def path(self, version: VersionRow) -> Path:
        """Its PEFT directory."""
        return self.data_dir.adapters / version.directory

    def create(
        self, c: sqlite3.Connection, name: str, owner: str, source: Source, root: str, job_id: str | None = None
    ) -> None:
        """A name without versions. Raises AdapterExistsError."""
        try:
            c.execute(
                "INSERT INTO adapters (name, owner, created_at, source, root, job_id) VALUES (?, ?, ?, ?, ?, ?)",
                (name, owner, int(self.wall()), source, root, job_id),
            )
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
                raise
            raise AdapterExistsError(f"there is an adapter {name!r} already; unload it first") from error

    def reserve(self, c: sqlite3.Connection, name: str, count: int) -> int:
        """`count` numbers that no version will ever have but those made by the caller; returns the first.

        Versions that are published in memory only take numbers too: reserve them before, and a number that a killed
        process gave away is not given to other weights. Raises AdapterNotFoundError.
        """
        row = c.execute("SELECT next_number FROM adapters WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise AdapterNotFoundError(f"there is no adapter {name!r}")
        c.execute("UPDATE adapters SET next_number = next_number + ? WHERE name = ?", (count, name))
        return int(row[0])

    def place(self, source: Path, *, link: bool = False) -> Path:
        """Have the weights of a PEFT directory in ``DATA_DIR/adapters``; returns the new directory.

        Durable on return; commit its row next. With `link`, its files, which must never change, are not copied.
        """
        final = self.data_dir.adapters / secrets.token_hex(16)
        temporary = self.data_dir.temporary / f"adapter.tmp-{final.name}"
        temporary.mkdir()
        try:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                _bring(source / name, temporary / name, link=link)
            fsync_directory(temporary)
            self.fail_point("adapter.before_rename")
            os.rename(temporary, final)
        except BaseException:
            remove_durably(temporary)
            raise
        fsync_directory(final.parent)
        self.fail_point("adapter.before_commit")
        return final

    def add(self, c: sqlite3.Connection, version: VersionRow, *, live: bool = True) -> None:
        """One more version of a name that there is, and with `live` the one that the name means now."""
        values = (version.name, version.number, version.digest, version.directory, version.num_bytes)
        c.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, version.created_at, version.step))
        c.execute(
            "UPDATE adapters SET next_number = max(next_number, ?) WHERE name = ?", (version.number + 1, version.name)
        )
        if live:
            self.set_live(c, version.name, version.number)

    def set_live(self, c: sqlite3.Connection, name: str, number: int) -> None:
        """Another version answers as `name`."""
        c.execute("UPDATE adapters SET live_number = ? WHERE name = ?", (number, name))

    def set_root(self, c: sqlite3.Connection, name: str, root: str) -> None:
        """Its weights come from elsewhere now."""
        c.execute("UPDATE adapters SET root = ? WHERE name = ?", (root, name))

    def set_pinned(self, c: sqlite3.Connection, name: str, is_pinned: bool) -> None:
        """Whether it may be taken out of memory."""
        c.execute("UPDATE adapters SET is_pinned = ? WHERE name = ?", (is_pinned, name))

    def drop_versions(self, c: sqlite3.Connection, name: str, numbers: list[int]) -> None:
        """Forget old versions; the live one must not be among them."""
        for number in numbers:
            c.execute("DELETE FROM versions WHERE name = ? AND number = ?", (name, number))

    def remove(self, c: sqlite3.Connection, name: str) -> bool:
        """Forget a name and its versions; False when there is none. Call `tidy` when it is committed."""
        c.execute("DELETE FROM versions WHERE name = ?", (name,))
        return c.execute("DELETE FROM adapters WHERE name = ?", (name,)).rowcount == 1

    def forget_unborn(self, c: sqlite3.Connection, job_id: str) -> None:
        """Forget the adapter of a job that has ended before anything answered under its name."""
        c.execute(
            "DELETE FROM adapters WHERE job_id = ? AND NOT EXISTS (SELECT 1 FROM versions WHERE name = adapters.name) "
            "AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.id = job_id AND is_published)",
            (job_id,),
        )

    def forget_lost(self, c: sqlite3.Connection) -> None:
        """At a start: forget adapters of ended jobs whose weights were in memory only."""
        c.execute(
            "DELETE FROM adapters WHERE source = 'job' "
            "AND NOT EXISTS (SELECT 1 FROM versions WHERE name = adapters.name) "
            "AND EXISTS (SELECT 1 FROM jobs WHERE jobs.id = job_id AND status IN ('succeeded', 'failed', 'cancelled'))"
        )

    def owner_of(self, name: str) -> str | None:
        """Whose adapter `name` is; None = there is no row of it."""
        row = self.database.row("SELECT owner FROM adapters WHERE name = ?", (name,))
        return None if row is None else str(row["owner"])

    def stranger(self, name: str, owner: str) -> bool:
        """Whether `name` is an adapter of another owner."""
        return self.owner_of(name) not in (None, owner)

    def strangers(self, owner: str) -> set[str]:
        """Every such name."""
        rows = self.database.rows("SELECT name FROM adapters WHERE owner <> ?", (owner,))
        return {row["name"] for row in rows}

    def made_by(self, key_id: str, owner: str, name: str | None = None) -> set[str]:
        """Names of the models and checkpoints of the jobs that a key of `owner` made; with `name`, of that one only."""
        rows = self.database.rows(
            "SELECT name FROM adapters JOIN jobs ON jobs.id = adapters.job_id "
            "WHERE jobs.key_id = ? AND adapters.owner = ? AND name = ifnull(?, name)",
            (key_id, owner, name),
        )
        return {row["name"] for row in rows}

    def bytes_of(self, owner: str) -> int:
        """What an owner's adapters take on the disk; a directory that several versions share counts once."""
        return int(
            self.database.value(
                "SELECT ifnull(sum(size), 0) FROM (SELECT max(num_bytes) AS size FROM versions "
                "JOIN adapters USING (name) WHERE owner = ? GROUP BY directory)",
                (owner,),
            )
        )

    def directories(self) -> set[str]:
        """What versions refer to."""
        return {row[0] for row in self.database.rows("SELECT DISTINCT directory FROM versions")}

    def tidy(self, directories: list[str]) -> None:
        """Remove those of these directories that no version refers to any more; nothing outside the data directory."""
        known = self.directories()
        for directory in directories:
            if directory not in known and not os.path.isabs(directory):
                remove_durably(self.data_dir.adapters / directory)


def _adapter(row: sqlite3.Row) -> AdapterRow:
    return AdapterRow(**{**dict(row), "is_pinned": bool(row["is_pinned"])})


def _bring(source: Path, target: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(source, target)
            return
        except OSError:  # not on this file system
            pass
    with source.open("rb") as read, target.open("xb") as written:
        while chunk := read.read(1 << 20):
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
