"""Uploaded files: rows here, bytes in ``DATA_DIR/files`` under the file's id; what the client calls it is only data."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from loquetier.server.store.database import Database
from loquetier.server.store.datadir import DataDir, remove_durably

log = structlog.get_logger("loquetier.server.store")

FileStatus = Literal["uploaded", "processed", "error"]

_HELD = (
    "EXISTS (SELECT 1 FROM jobs WHERE files.id IN (training_file, validation_file) "
    "AND status NOT IN ('succeeded', 'failed', 'cancelled'))"
)
"""A job that may have to read the file again after a restart keeps its bytes, also when its owner has deleted it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRow:
    """One file."""

    seq: int = 0
    """Order of arrival; given by the table."""
    id: str
    owner: str
    key_id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    """Hex; empty when the bytes are gone and only jobs remember the file."""
    created_at: int
    expires_at: int | None
    status: FileStatus
    status_details: str | None = None
    num_examples: int | None = None
    """Of training data; None while it is not known."""
    is_deleted: bool = False
    """By its owner, or expired: nobody sees it, and its bytes go when no job needs them."""


@dataclass(frozen=True, slots=True)
class FileTable:
    """Reads are what is committed; writes happen in the transaction whose connection they are given."""

    database: Database
    data_dir: DataDir
    wall: Callable[[], float]

    def path(self, file_id: str) -> Path:
        """Where its bytes are."""
        return self.data_dir.files / file_id

    def find(self, file_id: str, owner: str | None = None) -> FileRow | None:
        """A file that is neither deleted nor expired; with `owner`, only if it is his."""
        row = self.database.row(
            "SELECT * FROM files WHERE id = ? AND owner = ifnull(?, owner) AND NOT is_deleted "
            "AND ifnull(expires_at > ?, 1)",
            (file_id, owner, int(self.wall())),
        )
        return None if row is None else _file(row)

    def any(self, file_id: str) -> FileRow | None:
        """Also one that is deleted, as long as a job needs it."""
        row = self.database.row("SELECT * FROM files WHERE id = ?", (file_id,))
        return None if row is None else _file(row)

    def page(
        self, owner: str, *, after: int | None, limit: int, descending: bool, purpose: str | None
    ) -> list[FileRow]:
        """Files of an owner in order of arrival, from behind the one whose `seq` is `after`."""
        order, compare = ("DESC", "<") if descending else ("ASC", ">")
        rows = self.database.rows(
            f"SELECT * FROM files WHERE owner = ? AND NOT is_deleted AND ifnull(expires_at > ?, 1) "
            f"AND purpose = ifnull(?, purpose) AND ifnull(seq {compare} ?, 1) ORDER BY seq {order} LIMIT ?",
            (owner, int(self.wall()), purpose, after, limit),
        )
        return [_file(row) for row in rows]

    def unchecked(self) -> list[FileRow]:
        """Files whose content nobody has looked at yet."""
        return [_file(row) for row in self.database.rows("SELECT * FROM files WHERE status = 'uploaded' ORDER BY seq")]

    def bytes_of(self, owner: str) -> int:
        """What an owner's files take on the disk."""
        return int(self.database.value("SELECT ifnull(sum(bytes), 0) FROM files WHERE owner = ?", (owner,)))

    def add(self, c: sqlite3.Connection, file: FileRow) -> None:
        """A file whose bytes are on the disk."""
        c.execute(
            "INSERT INTO files (id, owner, key_id, filename, purpose, bytes, sha256, created_at, expires_at, status, "
            "status_details, num_examples) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (file.id, file.owner, file.key_id, file.filename, file.purpose, file.bytes, file.sha256, file.created_at,
             file.expires_at, file.status, file.status_details, file.num_examples),
        )  # fmt: skip

    def checked(
        self, c: sqlite3.Connection, file_id: str, status: FileStatus, details: str | None, num_examples: int | None
    ) -> None:
        """What looking at its content has found."""
        c.execute(
            "UPDATE files SET status = ?, status_details = ?, num_examples = ? WHERE id = ?",
            (status, details, num_examples, file_id),
        )

    def delete(self, c: sqlite3.Connection, file_id: str) -> bool:
        """Out of its owner's sight; False when it is already. Call `tidy` when it is committed."""
        return c.execute("UPDATE files SET is_deleted = 1 WHERE id = ? AND NOT is_deleted", (file_id,)).rowcount == 1

    def expire(self, c: sqlite3.Connection) -> None:
        """Delete what has expired."""
        c.execute("UPDATE files SET is_deleted = 1 WHERE NOT is_deleted AND expires_at <= ?", (int(self.wall()),))

    def tidy(self) -> None:
        """Remove bytes and rows of deleted files that no job needs. Rows that old jobs name stay, without bytes.

        What it follows is committed already, so trouble here is only told: the next one makes up for it.
        """
        try:
            self._tidy()
        except (OSError, sqlite3.Error) as error:  # InsufficientStorageError is an OSError
            log.warning("tidying_waits", problem=str(error))

    def _tidy(self) -> None:
        gone = self.database.rows(f"SELECT id FROM files WHERE is_deleted AND sha256 <> '' AND NOT {_HELD}")
        for row in gone:
            remove_durably(self.path(row["id"]))
        if not gone:
            return
        with self.database.transaction() as c:
            for row in gone:
                c.execute("UPDATE files SET bytes = 0, sha256 = '' WHERE id = ?", (row["id"],))
                c.execute(
                    "DELETE FROM files WHERE id = ? AND NOT EXISTS "
                    "(SELECT 1 FROM jobs WHERE files.id IN (training_file, validation_file))",
                    (row["id"],),
                )

    def names(self) -> set[str]:
        """Ids whose bytes belong on the disk."""
        return {row[0] for row in self.database.rows("SELECT id FROM files WHERE sha256 <> ''")}


def _file(row: sqlite3.Row) -> FileRow:
    return FileRow(**{**dict(row), "is_deleted": bool(row["is_deleted"])})
