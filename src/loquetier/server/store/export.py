"""Adapters of a data directory, read beside or without the server that owns it. Nothing of it is changed."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from loquetier.adapters.peft_copy import copy_adapter
from loquetier.errors import AdapterNotFoundError, ConfigError
from loquetier.server.store.datadir import DATABASE
from loquetier.server.store.schema import MIGRATIONS

_VERSION = (
    "SELECT versions.number, digest, directory FROM versions JOIN adapters USING (name) "
    "WHERE name = ? AND versions.number = ifnull(?, live_number)"
)


def export_adapter(root: Path, model: str, directory: Path, *, overwrite: bool = False) -> str:
    """Copy a durable version, ``name`` or ``name@number``, to a PEFT directory; returns ``name@number``.

    Raises:
        ConfigError: no data directory of this release. AdapterNotFoundError: no such adapter in it.
        As `copy_adapter`; in every case nothing is left behind.
    """
    name, at, number = model.partition("@")
    if at and not (number.isascii() and number.isdigit() and len(number) < 19):
        raise ConfigError(f"{model!r}: must be NAME or NAME@NUMBER")
    database = root / DATABASE
    if not database.is_file():
        raise ConfigError(f"--data-dir {str(root)!r} is no data directory: it has no {DATABASE}")
    try:
        with closing(sqlite3.connect(database, timeout=5.0)) as connection:
            connection.execute("PRAGMA query_only=ON")
            _check_schema(connection, root)
            row = connection.execute(_VERSION, (name, int(number) if at else None)).fetchone()
            known = [r[0] for r in connection.execute("SELECT name FROM adapters ORDER BY name")] if row is None else []
    except sqlite3.Error as error:
        raise ConfigError(f"--data-dir: {str(database)!r} cannot be read: {error}") from error
    if row is None:
        there = ", ".join(known[:8]) or "none"
        raise AdapterNotFoundError(f"no version of {model[:140]!r} is on the disk; adapters there: {there}")
    copy_adapter(root / "adapters" / row[2], directory, row[1], overwrite=overwrite)
    return f"{name}@{row[0]}"


def _check_schema(connection: sqlite3.Connection, root: Path) -> None:
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found != len(MIGRATIONS):
        way = "a newer release has written it: use that" if found > len(MIGRATIONS) else "start the server on it once"
        raise ConfigError(f"--data-dir {str(root)!r} has schema {found}, this release has {len(MIGRATIONS)}; {way}")
