"""Which adapters lie in the arena: who comes in, who makes room. Pure functions: no state, no clock, no torch.

The arena is a line of pieces. Whoever needs an adapter that is not there makes a *demand*; demands are served in the
order in which they came. A demand takes the window of free and idle pieces whose newest use is the oldest (LRU, but
contiguous, so that adapters of any mix of sizes find room). Where there is no such window it waits until requests
leave; after a while it is *aged* and *claims* a window: the adapters in it *drain*, which means that they finish what
they are answering and get nothing new, and nobody else may place anything there.

So no demand starves, however many requests for resident adapters keep coming: a claim only shrinks towards free, it is
given up only for something better, and demands that come later cannot touch it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


class PieceState(enum.IntEnum):
    """What a piece of the arena holds, in the order in which it may be taken."""

    FREE = 0
    IDLE = 1
    """A version that can be brought back and that nobody is using."""
    HELD = 2
    """A version that requests run on, or that is being read or saved: it becomes idle by itself."""
    FIXED = 3
    """Pinned, or a job's: never taken."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of the arena. Pieces tile it, in order of address."""

    start: int
    size: int
    state: PieceState
    slot: int = -1
    last_used: int = 0
    """Counts up with every use of any version."""

    @property
    def stop(self) -> int:
        """First address behind it."""
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Demand:
    """A version that is wanted and not there."""

    key: int
    size: int
    is_aged: bool = False
    """It has waited long enough to make others drain."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Addresses that an aged demand waits for."""

    key: int
    start: int
    stop: int

    def overlaps(self, piece: Piece) -> bool:
        """Whether some of the piece is claimed."""
        return piece.start < self.stop and self.start < piece.stop


@dataclass(frozen=True, slots=True)
class Placement:
    """A demand that is served now."""

    key: int
    start: int
    evict: tuple[int, ...]
    """Slots to be freed first."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now."""

    placements: tuple[Placement, ...]
    claims: tuple[Claim, ...]
    """All that stand, new ones included; hand them in again with the next call."""
    draining: frozenset[int]
    """Slots whose versions get no new users."""


def decide(
    pieces: Sequence[Piece], demands: Sequence[Demand], claims: Iterable[Claim] = (), reserve: int = 0
) -> Decision:
    """Serve the demands, in their order.

    Args:
        pieces: the whole arena, in order of address.
        demands: who waits, oldest first. Each could be placed if nobody were using anything (`is_possible`).
        claims: those of the last decision.
        reserve: addresses that must stay free or idle, because jobs will publish there.
    """
    line = list(pieces)
    held = {claim.key: claim for claim in claims if _is_valid(claim, line, demands)}
    limit = sum(p.size for p in pieces) - reserve
    placements: list[Placement] = []
    # Room only shrinks from demand to demand: what one of them could not get, no larger one can.
    hopeless = unclaimable = math.inf
    for demand in demands:
        own = held.get(demand.key)
        if own is None and demand.size >= hopeless and (not demand.is_aged or demand.size >= unclaimable):
            continue
        others = [claim for key, claim in held.items() if key != demand.key]
        firm = sum(p.size for p in line if p.state >= PieceState.HELD)
        short = max(0, firm + demand.size - limit)
        window = None if short else best_window(line, demand.size, PieceState.IDLE, others)
        if window is not None:
            held.pop(demand.key, None)
            placements.append(Placement(demand.key, window[0].start, _slots(window)))
            line = _placed(line, window, demand.size)
            continue
        if own is None:
            hopeless = min(hopeless, demand.size)
        # With a reserve, room may be free and yet not to be had: then enough users must leave to make up for it.
        if demand.is_aged and (own is None or not _drains(own, line)):
            window = best_window(line, demand.size, PieceState.HELD, others, least_held=short)
            if window is not None:
                held[demand.key] = Claim(demand.key, window[0].start, window[-1].stop)
            elif own is None:
                unclaimable = min(unclaimable, demand.size)
    # Who has left already stays away too: two neighbours that drain by turns would never be idle at once.
    draining = frozenset(
        p.slot
        for p in line
        if p.state in (PieceState.IDLE, PieceState.HELD) and any(claim.overlaps(p) for claim in held.values())
    )
    return Decision(tuple(placements), tuple(held.values()), draining)


def is_possible(pieces: Sequence[Piece], size: int, reserve: int = 0) -> bool:
    """Whether `size` addresses could be had once nobody uses anything: not with what is fixed, and the reserve."""
    fixed = sum(p.size for p in pieces if p.state is PieceState.FIXED)
    if fixed + size > sum(p.size for p in pieces) - reserve:
        return False
    return best_window(pieces, size, PieceState.HELD, ()) is not None


def may_use(pieces: Sequence[Piece], size: int, reserve: int) -> bool:
    """Whether an idle version of `size` addresses may get users: jobs must keep theirs.

    Also where the reserve cannot be had, whoever leaves: then nobody would gain by its waiting.
    """
    spare = sum(p.size for p in pieces if p.state <= PieceState.IDLE)
    return spare >= reserve + size or not is_possible(pieces, size, reserve)


def drained_for(pieces: Sequence[Piece], wanted: int) -> frozenset[int]:
    """Slots that must drain so that `wanted` addresses, in any places, are free or idle; least recently used first.

    Empty where that is so already, and where draining everything would not do.
    """
    missing = wanted - sum(p.size for p in pieces if p.state <= PieceState.IDLE)
    held = sorted((p for p in pieces if p.state is PieceState.HELD), key=lambda p: p.last_used)
    if missing > sum(p.size for p in held):
        return frozenset()
    slots = set()
    for piece in held:
        if missing <= 0:
            break
        slots.add(piece.slot)
        missing -= piece.size
    return frozenset(slots)


def best_window(
    pieces: Sequence[Piece], size: int, most: PieceState, claims: Sequence[Claim], least_held: int = 0
) -> tuple[Piece, ...] | None:
    """Neighbouring pieces of together at least `size`, none beyond `most` and none claimed; None if there are none.

    Of all windows the one with the least state, then the oldest newest use, then the fewest addresses taken from
    somebody, then the lowest address.
    """
    line = [q for p in pieces for q in _cut(p, claims)]
    best: tuple[Piece, ...] | None = None
    best_cost: tuple[int, int, int] | None = None
    for first, piece in enumerate(line):
        window = _window_from(line, first, size, most, least_held)
        if window is None or piece.state > most:
            continue
        taken = [p for p in window if p.state is not PieceState.FREE]
        cost = (
            max(p.state for p in window),
            max((p.last_used for p in taken), default=-1),
            sum(p.size for p in taken),
        )
        if best_cost is None or cost < best_cost:
            best, best_cost = window, cost
    return best


def _window_from(
    line: Sequence[Piece], first: int, size: int, most: PieceState, least_held: int
) -> tuple[Piece, ...] | None:
    """The shortest window that begins with piece `first`."""
    total = held = 0
    for last in range(first, len(line)):
        piece = line[last]
        if piece.state > most or (last > first and line[last - 1].stop != piece.start):
            return None
        total += piece.size
        held += piece.size if piece.state is PieceState.HELD else 0
        if total >= size and held >= least_held:
            return tuple(line[first : last + 1])
    return None


def _cut(piece: Piece, claims: Sequence[Claim]) -> list[Piece]:
    """What of a piece is not claimed: of a free one what lies between the claims, of another all or nothing."""
    hits = sorted((claim for claim in claims if claim.overlaps(piece)), key=lambda claim: claim.start)
    if not hits:
        return [piece]
    if piece.state is not PieceState.FREE:
        return []
    rest, at = [], piece.start
    for claim in hits:
        if at < claim.start:
            rest.append(replace(piece, start=at, size=claim.start - at))
        at = max(at, claim.stop)
    if at < piece.stop:
        rest.append(replace(piece, start=at, size=piece.stop - at))
    return rest


def _drains(claim: Claim, line: Sequence[Piece]) -> bool:
    """Whether somebody in it is still to leave."""
    return any(claim.overlaps(p) and p.state is PieceState.HELD for p in line)


def _is_valid(claim: Claim, line: Sequence[Piece], demands: Sequence[Demand]) -> bool:
    """Whether its demand still waits, and nothing that cannot be taken has come to lie in it."""
    waits = any(d.key == claim.key for d in demands)
    return waits and not any(claim.overlaps(p) and p.state is PieceState.FIXED for p in line)


def _slots(window: Iterable[Piece]) -> tuple[int, ...]:
    return tuple(p.slot for p in window if p.state is not PieceState.FREE)


def _placed(line: list[Piece], window: Sequence[Piece], size: int) -> list[Piece]:
    """The line with the window's occupants gone and `size` addresses at its start taken."""
    start, stop = window[0].start, window[-1].stop
    placed = [Piece(start, size, PieceState.FIXED)]
    if stop > start + size:
        placed.append(Piece(start + size, stop - start - size, PieceState.FREE))
    # A free piece that a claim cuts lies half outside the window: that half stays as it is.
    rest = [q for p in line for q in _outside(p, start, stop)]
    return sorted([*rest, *placed], key=lambda p: p.start)


def _outside(piece: Piece, start: int, stop: int) -> list[Piece]:
    parts = ((piece.start, min(piece.stop, start)), (max(piece.start, stop), piece.stop))
    return [replace(piece, start=a, size=b - a) for a, b in parts if a < b]
