"""Who waits for which adapter version to come into the arena."""

from __future__ import annotations

from collections.abc import Iterator

from loquetier.adapters.registry import AdapterVersion
from loquetier.engine.hold import Hold


class Waiters:
    """Uses that wait, by version, and of each version in the order they came. Engine thread only."""

    def __init__(self) -> None:
        self._holds: dict[AdapterVersion, list[Hold]] = {}

    def __bool__(self) -> bool:
        return bool(self._holds)

    def __contains__(self, version: AdapterVersion) -> bool:
        return version in self._holds

    def __iter__(self) -> Iterator[AdapterVersion]:
        return iter(self._holds)

    def add(self, hold: Hold) -> None:
        """One more waits for its version."""
        self._holds.setdefault(hold.version, []).append(hold)

    def remove(self, hold: Hold) -> None:
        """One that waits does so no longer."""
        holds = self._holds[hold.version]
        holds.remove(hold)
        if not holds:
            del self._holds[hold.version]

    def take(self, version: AdapterVersion) -> list[Hold]:
        """Everybody who waits for a version, who do so no longer."""
        return self._holds.pop(version, [])

    def since(self, version: AdapterVersion) -> float:
        """When the first of a version's uses began to wait."""
        return self._holds[version][0].since

    def absent(self) -> list[AdapterVersion]:
        """Versions without a slot, the one that is waited for longest first."""
        return sorted((v for v in self._holds if v.slot < 0), key=self.since)

    def resident(self) -> list[AdapterVersion]:
        """Versions whose weights are there, the one that is waited for longest first."""
        return sorted((v for v in self._holds if v.is_resident), key=self.since)

    def counts(self) -> dict[AdapterVersion, int]:
        """How many uses wait, by version."""
        return {version: len(holds) for version, holds in self._holds.items()}
