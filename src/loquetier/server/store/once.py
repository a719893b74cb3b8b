"""Idempotency keys: the same request, sent again, gets what the first one made."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loquetier.errors import ConfigError
from loquetier.server.store.database import Database

KEPT_SECONDS: Final = 24 * 3600
"""How long a key is remembered."""


class KeyReusedError(ConfigError):
    """An idempotency key came again with another request."""

    code = "idempotency_key_reused"


@dataclass(frozen=True, slots=True)
class OnceTable:
    """Keys by owner and route."""

    database: Database
    wall: Callable[[], float]

    def find(self, c: sqlite3.Connection, owner: str, route: str, key: str, digest: str) -> str | None:
        """What a request with this key has made; None for a key that is new.

        Args:
            digest: of the request; the same key must come with the same one.

        Raises:
            KeyReusedError: it did not.
        """
        row = c.execute(
            "SELECT digest, resource FROM idempotency WHERE (owner, route, key) = (?, ?, ?) AND created_at > ?",
            (owner, route, key, int(self.wall()) - KEPT_SECONDS),
        ).fetchone()
        if row is None:
            return None
        if row["digest"] != digest:
            raise KeyReusedError("this Idempotency-Key was used with another request; take a new key")
        return str(row["resource"])

    def note(self, c: sqlite3.Connection, owner: str, route: str, key: str, digest: str, resource: str) -> None:
        """Remember what a request has made, in the transaction that makes it."""
        c.execute(
            "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?, ?)",
            (owner, route, key, digest, resource, int(self.wall())),
        )

    def expire(self, c: sqlite3.Connection) -> None:
        """Forget old keys."""
        c.execute("DELETE FROM idempotency WHERE created_at <= ?", (int(self.wall()) - KEPT_SECONDS,))
