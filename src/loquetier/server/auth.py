"""Who asks: API keys as sha256 hashes, scopes, and what each key may use."""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from loquetier.errors import ConfigError

MAX_KEY_LENGTH = 512
_HEX = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Scope(Enum):
    """What a route needs. Every route names one; a key has one or more."""

    INFER = "infer"
    TRAIN = "train"
    ADMIN = "admin"


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """A key without the key: who it is and what it may do."""

    id: str
    """Shown in logs; never the key."""
    owner: str
    """Whose files, jobs and adapters it sees."""
    scopes: frozenset[Scope]
    adapters: frozenset[str] | None = None
    """Models that it may ask beside those of its own jobs, by name without version; None = all."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    """Inference requests at once."""
    jobs: int | None = None
    """Fine-tuning jobs of its owner that have not ended, when it makes another one."""
    storage_bytes: int | None = None
    """Bytes of its owner's files and adapters, when it adds a file, an adapter or a job."""

    def may_use(self, name: str) -> bool:
        """Whether this key's list has the model called `name` (without ``@version``)."""
        return self.adapters is None or name in self.adapters


LOCAL = Principal(id="local", owner="local", scopes=frozenset(Scope))
"""Everybody, when there are no keys."""


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Hashed keys; empty = nobody needs one."""

    keys: tuple[tuple[str, Principal], ...] = ()
    """(sha256 hex of the key, who it is)."""

    def find(self, header: Sequence[bytes]) -> Principal | None:
        """The principal of a request's Authorization headers; None if they are not exactly one good key.

        Every key is compared, in constant time.
        """
        if not self.keys:
            return LOCAL
        if len(header) != 1 or len(header[0]) > MAX_KEY_LENGTH:
            return None
        scheme, _, token = header[0].partition(b" ")
        if scheme.lower() != b"bearer" or not token:
            return None
        digest = hashlib.sha256(token).hexdigest()
        found = None
        for known, principal in self.keys:
            if hmac.compare_digest(known, digest):
                found = principal
        return found


def load_keys(path: Path) -> KeyRing:
    """Read a keys file: TOML, one ``[[key]]`` table per key.

    Raises:
        ConfigError: unreadable, malformed, an unknown entry, or no key at all.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--api-keys {str(path)!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeError) as error:
        raise ConfigError(f"--api-keys {str(path)!r} is not TOML: {error}") from error
    tables = data.pop("key", [])
    if data or not isinstance(tables, list) or not tables:
        raise ConfigError(f"--api-keys {str(path)!r}: must hold [[key]] tables, at least one, and nothing else")
    keys = tuple(_read_key(table, number) for number, table in enumerate(tables, 1))
    for what, values in (("id", [p.id for _, p in keys]), ("sha256", [h for h, _ in keys])):
        if len(set(values)) != len(values):
            raise ConfigError(f"--api-keys {str(path)!r}: two keys have the same {what}")
    return KeyRing(keys)


_KNOWN = frozenset(
    {"id", "owner", "sha256", "scopes", "adapters"}
    | {"requests_per_minute", "tokens_per_minute", "concurrency", "jobs", "storage_bytes"}
)


def _read_key(table: Any, number: int) -> tuple[str, Principal]:
    where = f"--api-keys, key {number}"
    if not isinstance(table, dict) or table.keys() - _KNOWN:
        raise ConfigError(f"{where}: a table of {sorted(_KNOWN)}; other entries are not known")
    digest, name, owner = table.get("sha256"), table.get("id"), table.get("owner", table.get("id"))
    if not isinstance(digest, str) or not _HEX.fullmatch(digest):
        raise ConfigError(f"{where}: sha256 must be the key's sha256 as 64 lower-case hex digits, never the key")
    for what, value in (("id", name), ("owner", owner)):
        if not isinstance(value, str) or not _ID.fullmatch(value):
            raise ConfigError(f"{where}: {what}={value!r} must be 1 to 64 letters, digits and . _ -")
    assert isinstance(name, str) and isinstance(owner, str)
    adapters = table.get("adapters")
    if adapters is not None and (not isinstance(adapters, list) or not all(isinstance(a, str) for a in adapters)):
        raise ConfigError(f"{where}: adapters must be a list of model names; leave it out for all")
    limits = {limit: _limit(table, limit, where) for limit in _LIMITS}
    return digest, Principal(
        id=name,
        owner=owner,
        scopes=_scopes(table.get("scopes", ["infer"]), where),
        adapters=None if adapters is None else frozenset(adapters),
        **limits,
    )


_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "jobs", "storage_bytes")


def _limit(table: dict[str, Any], name: str, where: str) -> int | None:
    value = table.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{where}: {name}={value!r} must be an integer >= 1; leave it out for no limit")
    return value


def _scopes(value: Any, where: str) -> frozenset[Scope]:
    known = [scope.value for scope in Scope]
    if not isinstance(value, list) or not value or not all(v in known for v in value):
        raise ConfigError(f"{where}: scopes={value!r} must be a list out of {known}")
    return frozenset(Scope(v) for v in value)
