"""What lies where in the arena, and what of it may be moved or taken out."""

from __future__ import annotations

from collections import Counter

from loquetier.adapters.arena import Arena
from loquetier.adapters.registry import AdapterRegistry, AdapterVersion
from loquetier.engine.residency_policy import Piece, PieceState
from loquetier.engine.version_files import VersionFiles


class ArenaMap:
    """The arena in the policy's words. Engine thread only."""

    def __init__(self, arena: Arena, registry: AdapterRegistry, files: VersionFiles) -> None:
        self._arena, self._registry, self._files = arena, registry, files
        self.loading: set[AdapterVersion] = set()
        """Versions with a slot whose weights are being read."""
        self.long: Counter[AdapterVersion] = Counter()
        """Uses that do not end by themselves within some steps."""

    def by_slot(self) -> dict[int, AdapterVersion]:
        """Every version that has a slot."""
        return {v.slot: v for v in self._registry.versions if v.slot >= 0}

    def pieces(self) -> list[Piece]:
        """The whole arena in order of address, free runs included."""
        by_slot = self.by_slot()
        pieces = [Piece(run.start, run.size, PieceState.FREE) for run in self._arena.free_runs]
        for slot in self._arena.slots:
            run, version = self._arena.run_of(slot), by_slot.get(slot)
            state, used = (PieceState.FIXED, 0) if version is None else (self._state(version), version.last_used)
            pieces.append(Piece(run.start, run.size, state, slot, used))
        return sorted(pieces, key=lambda p: p.start)

    def _state(self, version: AdapterVersion) -> PieceState:
        if self._registry.is_pinned(version) or self.long[version]:
            return PieceState.FIXED
        if version in self.loading or version in self._files.saving:
            return PieceState.HELD
        if version.source is not None:
            return PieceState.HELD if version.holders else PieceState.IDLE
        if version.is_live:  # only the arena has it: it must be saved first
            return PieceState.HELD if self._files.can_save(version) else PieceState.FIXED
        return PieceState.HELD if version.users else PieceState.IDLE
