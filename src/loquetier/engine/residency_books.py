"""What residency has done since the engine began, and whether its lists agree with the registry's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from loquetier.adapters.registry import ABSENT_SLOT, AdapterVersion
from loquetier.errors import IntegrityError


@dataclass(slots=True)
class ResidencyTotals:
    """Since the engine began."""

    loads: int = 0
    """Versions brought in from files or host memory."""
    host_hits: int = 0
    """Of them, from host memory."""
    load_seconds: float = 0.0
    failures: int = 0
    evictions: int = 0


def check_books(
    versions: Iterable[AdapterVersion],
    waiting: Mapping[AdapterVersion, int],
    loading: Collection[AdapterVersion],
    num_holds: int,
) -> None:
    """Holds, waiters and loads agree with the registry's versions.

    Args:
        waiting: how many uses wait, by version.

    Raises:
        IntegrityError: they do not.
    """
    versions = tuple(versions)
    users = sum(v.users for v in versions)
    if users != num_holds:
        raise IntegrityError(f"residency: {users} users of adapter versions, {num_holds} holds")
    for version, count in waiting.items():
        if not count or version.users < count + version.holders:
            raise IntegrityError(f"residency: {count} wait for {version.label}, which has {version.users} users")
    for version in versions:
        if version.slot >= 0 and version.is_ready == (version in loading):
            raise IntegrityError(f"residency: {version.label} in slot {version.slot} is neither read nor there")
        if version.slot == ABSENT_SLOT and (version.source is None or version.source_digest is None):
            raise IntegrityError(f"residency: {version.label} is not in the arena and has no files")
