"""Who lies in the arena: windows, claims, and that nobody starves however many others keep coming."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquetier.engine.residency_policy import (
    Claim,
    Decision,
    Demand,
    Piece,
    PieceState,
    best_window,
    decide,
    drained_for,
    is_possible,
)

FREE, IDLE, HELD, FIXED = PieceState
P = Piece


def line(*pieces: tuple[int, PieceState, int]) -> list[Piece]:
    """Pieces of (size, state, last_used), one behind the other; slot numbers count up."""
    found, at = [], 0
    for slot, (size, state, used) in enumerate(pieces):
        found.append(Piece(at, size, state, -1 if state is FREE else slot, used))
        at += size
    return found


def test_the_least_recently_used_window_gives_way() -> None:
    pieces = line((4, IDLE, 9), (4, IDLE, 3), (4, HELD, 1), (4, IDLE, 5))
    found = decide(pieces, [Demand(7, 4)])
    assert found.placements[0].start == 4 and found.placements[0].evict == (1,)


def test_free_room_is_taken_before_anybody_leaves() -> None:
    pieces = line((4, IDLE, 0), (4, FREE, 0))
    assert decide(pieces, [Demand(7, 3)]).placements[0].evict == ()


def test_a_large_one_takes_neighbours() -> None:
    pieces = line((4, IDLE, 1), (4, FIXED, 0), (4, IDLE, 8), (2, FREE, 0), (4, IDLE, 7))
    found = decide(pieces, [Demand(7, 10)]).placements[0]
    assert found.start == 8 and found.evict == (2, 4)


def test_who_has_not_waited_long_enough_takes_nothing_from_who_works() -> None:
    pieces = line((4, HELD, 1), (4, HELD, 2))
    assert decide(pieces, [Demand(7, 4)]) == Decision((), (), frozenset())
    aged = decide(pieces, [Demand(7, 4, is_aged=True)])
    assert aged.draining == {0} and aged.claims == (Claim(7, 0, 4),) and not aged.placements


def test_a_claim_stays_where_it_is_and_others_keep_out() -> None:
    first = decide(line((4, HELD, 1), (4, HELD, 2)), [Demand(7, 4, is_aged=True)])
    # Slot 0 has become busier than slot 1 and then idle; the demand behind may not have its place.
    later = decide(line((4, IDLE, 9), (4, HELD, 2)), [Demand(7, 4, is_aged=True), Demand(8, 4)], first.claims)
    assert [(p.key, p.start) for p in later.placements] == [(7, 0)] and not later.claims
    waits = decide(line((4, HELD, 9), (4, HELD, 2)), [Demand(7, 4, is_aged=True)], first.claims)
    assert waits.claims == first.claims and waits.draining == {0}


def test_a_claim_is_dropped_with_its_demand_and_where_something_fixed_has_come() -> None:
    claim = Claim(7, 0, 4)
    assert not decide(line((4, HELD, 1)), [], [claim]).draining
    moved = decide(line((4, FIXED, 1), (4, HELD, 2)), [Demand(7, 4, is_aged=True)], [claim])
    assert moved.claims == (Claim(7, 4, 8),)


def test_what_jobs_will_publish_to_is_not_filled_with_what_is_in_use() -> None:
    pieces = line((4, HELD, 1), (4, FREE, 0), (4, FREE, 0))
    assert decide(pieces, [Demand(7, 4)], reserve=4).placements
    assert not decide(pieces, [Demand(7, 4)], reserve=8).placements
    assert decide(pieces, [Demand(7, 4, is_aged=True)], reserve=8).draining == {0}, "somebody must leave instead"
    assert is_possible(pieces, 4, reserve=8) and not is_possible(pieces, 5, reserve=8)


def test_room_in_any_places() -> None:
    pieces = line((4, HELD, 5), (4, FREE, 0), (4, HELD, 2), (4, IDLE, 9))
    assert drained_for(pieces, 8) == frozenset() and drained_for(pieces, 9) == {2}
    assert drained_for(pieces, 13) == {0, 2} and drained_for(pieces, 17) == frozenset()


states = st.sampled_from([FREE, IDLE, IDLE, HELD, HELD, FIXED])
arenas = st.lists(st.tuples(st.integers(1, 6), states, st.integers(0, 20)), min_size=1, max_size=9).map(
    lambda pieces: line(*pieces)
)
demand_lists = st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=5).map(
    lambda found: [Demand(key, size, aged) for key, (size, aged) in enumerate(found)]
)


@settings(max_examples=400, deadline=None)
@given(pieces=arenas, demands=demand_lists, reserve=st.integers(0, 8))
def test_a_decision_never_takes_what_is_used_nor_one_place_twice(
    pieces: list[Piece], demands: list[Demand], reserve: int
) -> None:
    found = decide(pieces, demands, (), reserve)
    by_slot = {p.slot: p for p in pieces if p.state is not FREE}
    size_of = {d.key: d.size for d in demands}
    evicted = [slot for p in found.placements for slot in p.evict]
    assert len(set(evicted)) == len(evicted) and all(by_slot[slot].state is IDLE for slot in evicted)
    spans = sorted((p.start, p.start + size_of[p.key]) for p in found.placements)
    spans += [(c.start, c.stop) for c in found.claims]
    spans += [(p.start, p.stop) for p in by_slot.values() if p.state is FIXED]
    spans.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(spans)), "places overlap"
    assert all(a >= 0 and b <= pieces[-1].stop for a, b in spans)
    assert all(by_slot[slot].state in (IDLE, HELD) for slot in found.draining)
    taken = sum(p.size for p in by_slot.values() if p.state >= HELD) + sum(size_of[p.key] for p in found.placements)
    assert not found.placements or taken <= pieces[-1].stop - reserve


@settings(max_examples=200, deadline=None)
@given(pieces=arenas, size=st.integers(1, 12))
def test_a_window_is_found_exactly_where_there_is_one(pieces: list[Piece], size: int) -> None:
    longest = run = 0
    for piece in pieces:
        run = run + piece.size if piece.state <= IDLE else 0
        longest = max(longest, run)
    assert (best_window(pieces, size, IDLE, ()) is not None) is (longest >= size)


@dataclass
class Traffic:
    """An arena of versions that are asked for again and again: each use lasts some ticks. Sizes differ."""

    capacity: int
    patience: int
    fixed: int = 0
    resident: dict[int, Piece] = field(default_factory=dict)
    uses: dict[int, list[int]] = field(default_factory=dict)
    """By version: when each use ends."""
    waiting: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """By version: (since, ticks) of each use that waits."""
    claims: tuple[Claim, ...] = ()
    draining: frozenset[int] = frozenset()
    longest_wait: int = 0

    def ask(self, version: int, now: int, ticks: int) -> None:
        if version in self.resident and version not in self.draining:
            self.uses[version].append(now + ticks)
            self.resident[version] = replace(self.resident[version], last_used=now)
        else:
            self.waiting.setdefault(version, []).append((now, ticks))

    def pieces(self) -> list[Piece]:
        found = [Piece(0, self.fixed, FIXED)] if self.fixed else []
        found += [replace(p, state=HELD if self.uses[p.slot] else IDLE) for p in self.resident.values()]
        found.sort(key=lambda p: p.start)
        gaps, at = [], 0
        for piece in [*found, Piece(self.capacity, 0, FREE)]:
            if piece.start > at:
                gaps.append(Piece(at, piece.start - at, FREE))
            at = piece.stop
        return sorted([*found, *gaps], key=lambda p: p.start)

    def tick(self, now: int, size_of: dict[int, int]) -> None:
        self.uses = {v: [end for end in ends if end > now] for v, ends in self.uses.items()}
        absent = sorted((v for v in self.waiting if v not in self.resident), key=lambda v: self.waiting[v][0])
        demands = [Demand(v, size_of[v], now - self.waiting[v][0][0] >= self.patience) for v in absent]
        found = decide(self.pieces(), demands, self.claims)
        self.claims, self.draining = found.claims, found.draining
        for placement in found.placements:
            for slot in placement.evict:
                assert not self.uses[slot], "it is in use"
                del self.resident[slot], self.uses[slot]
            key = placement.key
            self.resident[key], self.uses[key] = Piece(placement.start, size_of[key], IDLE, key, now), []
        for version in [v for v in self.waiting if v in self.resident and v not in self.draining]:
            for since, ticks in self.waiting.pop(version):
                self.longest_wait = max(self.longest_wait, now - since)
                self.ask(version, now, ticks)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nobody_starves_however_many_hot_adapters_keep_coming(data: st.DataObject) -> None:
    num_hot, num_cold = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    sizes = {v: data.draw(st.integers(1, 4)) for v in range(num_hot + num_cold)}
    fixed = data.draw(st.integers(0, 2))
    # Room for the largest, and for all that are hot: without draining they would stay there for ever.
    capacity = fixed + max(max(sizes.values()), sum(sizes[v] for v in range(num_hot)))
    patience, ticks = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 4))
    traffic = Traffic(capacity, patience, fixed)
    for now in range(300):
        for version in range(num_hot):
            traffic.ask(version, now, ticks)  # each tick, so that no hot one is ever idle by itself
        if now in (20, 21, 60):
            for version in range(num_hot, num_hot + num_cold):
                traffic.ask(version, now, ticks)
        traffic.tick(now, sizes)
    cold = [v for v in traffic.waiting if v >= num_hot]
    assert not cold, f"versions {cold} have waited since {[traffic.waiting[v] for v in cold]}"
    # Each of those before it in the queue waits at most until its patience and one use of the window are over.
    assert traffic.longest_wait <= (num_hot + num_cold) * (patience + ticks + 2)


def test_two_neighbours_do_not_drain_by_turns() -> None:
    """Both are asked for at every tick: the one that has left must stay away until the other has left as well."""
    traffic = Traffic(capacity=4, patience=0)
    for now in range(30):
        traffic.ask(0, now, 2)
        traffic.ask(1, now, 3)  # their uses do not end together
        if now == 5:
            traffic.ask(2, now, 2)
        traffic.tick(now, {0: 2, 1: 2, 2: 4})
        assert now < 15 or 2 not in traffic.waiting


@pytest.mark.parametrize("is_aged", [False, True])
def test_without_ageing_the_same_traffic_starves(is_aged: bool) -> None:
    """The test above can fail: what never ages is never served."""
    traffic = Traffic(capacity=2, patience=0 if is_aged else 10_000)
    for now in range(100):
        traffic.ask(0, now, 2)
        traffic.ask(1, now, 2)
        if now == 5:
            traffic.ask(2, now, 2)
        traffic.tick(now, {0: 1, 1: 1, 2: 1})
    assert (2 in traffic.waiting) is not is_aged
