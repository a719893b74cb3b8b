"""The arena under any order of allocations and frees: no two slots share a byte, and nothing of a tenant is left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from loquetier.adapters.arena import ALIGN, Arena, factor_views, num_a_elements, num_elements
from loquetier.adapters.spec import LinearTarget, ModulePlan
from loquetier.errors import IntegrityError, OutOfAdapterMemoryError

BUDGET = 40 * ALIGN
"""Elements."""


def plan(index: int, rank: int, in_features: int = 7, out_features: int = 5, scale: float = 2.0) -> ModulePlan:
    return ModulePlan(LinearTarget(f"m{index}", index, in_features, out_features, 0), rank, scale)


ranks_by_index = st.dictionaries(st.integers(0, 9), st.integers(1, 40), min_size=1, max_size=4)
plans = ranks_by_index.map(lambda ranks: tuple(plan(index, rank) for index, rank in sorted(ranks.items())))


class ArenaMachine(RuleBasedStateMachine):
    """Each slot is filled with its own number; any overlap, move or leak shows as a wrong number."""

    slots = Bundle("slots")

    @initialize(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def start(self, dtype: torch.dtype) -> None:
        self.arena = Arena(BUDGET * torch.empty((), dtype=dtype).element_size(), dtype, "cpu")
        self.held: dict[int, tuple[ModulePlan, ...]] = {}
        self.used: set[int] = set()

    @rule(target=slots, modules=plans)
    def allocate(self, modules: tuple[ModulePlan, ...]) -> object:
        free, runs = self.arena.free_bytes, self.arena.slots
        try:
            slot = self.arena.allocate(modules)
        except OutOfAdapterMemoryError as error:
            assert str(free) in str(error) and str(self.arena.total_bytes) in str(error)
            assert (self.arena.free_bytes, self.arena.slots) == (free, runs)
            assert not self.fits(modules), "there was room"
            return -1
        assert slot not in self.used, "slot numbers are never reused"
        assert not self.arena.flat(slot).any(), "a fresh slot is zero"
        self.arena.flat(slot).fill_(slot + 1)
        self.held[slot] = modules
        self.used.add(slot)
        assert self.arena.free_bytes == free - self.arena.slot_bytes(slot)
        return slot

    def fits(self, modules: tuple[ModulePlan, ...]) -> bool:
        """From the outside: is there a run of addresses that no held slot covers, long enough?"""
        size = -(-num_elements(modules) // ALIGN) * ALIGN
        item = self.arena.itemsize
        taken = sorted((self.arena.flat(s).storage_offset(), self.arena.slot_bytes(s) // item) for s in self.held)
        at = 0
        for start, length in [*taken, (BUDGET, 0)]:
            if start - at >= size:
                return True
            at = start + length
        return False

    @rule(slot=consumes(slots))
    def free(self, slot: int) -> None:
        if slot < 0:
            return
        view, size = self.arena.flat(slot), self.arena.slot_bytes(slot)
        assert self.arena.free(slot) == size
        assert not view.any(), "a freed slot is zeroed"
        del self.held[slot]

    @rule(slot=slots, value=st.integers(1, 100))
    def write_through_a_view(self, slot: int, value: int) -> None:
        if slot not in self.held:
            return
        first = self.held[slot][0].target.index
        self.arena.factors[slot][first].a_RK.fill_(value)
        assert (self.arena.flat(slot)[0] == value).all()
        self.arena.flat(slot).fill_(slot + 1)

    @invariant()
    def everyone_has_their_own_weights(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.check_integrity()
        assert self.arena.slots == self.held.keys() == self.arena.factors.keys()
        for slot, modules in self.held.items():
            flat, views = self.arena.flat(slot), self.arena.factors[slot]
            assert (flat == flat.new_tensor(slot + 1)).all(), f"slot {slot} was overwritten"
            assert flat.storage_offset() % ALIGN == 0
            assert self.arena.modules(slot) == modules
            assert [tuple(views[m.target.index].a_RK.shape) for m in modules] == [(m.rank, 7) for m in modules]
            assert [tuple(views[m.target.index].b_RN.shape) for m in modules] == [(m.rank, 5) for m in modules]

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            for slot in list(self.held):
                self.arena.free(slot)
            self.arena.check_integrity()
            assert self.arena.free_bytes == self.arena.total_bytes
            # In one piece again: the largest possible slot fits.
            self.arena.allocate((plan(0, 1, BUDGET - ALIGN, ALIGN),))


ArenaMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestArena = ArenaMachine.TestCase


def test_views_tile_the_slot_first_all_a_then_all_b() -> None:
    modules = (plan(2, 3), plan(5, 1, 4, 6, scale=0.25))
    flat = torch.arange(num_elements(modules), dtype=torch.float32)
    views = factor_views(flat, modules)
    assert num_a_elements(modules) == 3 * 7 + 1 * 4
    joined = [views[2].a_RK, views[5].a_RK, views[2].b_RN, views[5].b_RN]
    assert torch.equal(torch.cat([t.flatten() for t in joined]), flat)
    assert (views[2].scale, views[5].scale) == (2.0, 0.25)
    views[5].b_RN.zero_()
    assert not flat[-6:].any() and flat[-7] != 0


def test_views_are_used_again_only_for_the_same_layout_at_the_same_place() -> None:
    one, other = (plan(0, 2),), (plan(0, 1), plan(3, 1))
    arena = Arena(ALIGN * 64, torch.float32, "cpu")
    first = arena.allocate(one)
    views = arena.factors[first]
    arena.free(first)
    again = arena.allocate(one)
    assert arena.factors[again] is views
    views[0].a_RK.fill_(1)
    assert arena.flat(again)[:14].eq(1).all() and not arena.flat(again)[14:].any()
    arena.free(again)
    different = arena.allocate(other)
    assert arena.factors[different].keys() == {0, 3}
    back = arena.allocate(one)
    assert arena.factors[back] is not views, "another place"
    for slot in (different, back):
        arena.free(slot)
    slots = [arena.allocate((plan(0, 1, 1, 1),)) for _ in range(12)]  # what is kept is bounded
    for slot in slots:
        arena.free(slot)
    assert len(arena._spare_views) <= 8


def test_the_error_names_needed_free_and_the_way_out() -> None:
    arena = Arena(ALIGN * 4, torch.float32, "cpu")
    with pytest.raises(OutOfAdapterMemoryError, match=r"needs 1024 bytes.*256 of 256 bytes free.*adapter_memory"):
        arena.allocate((plan(0, 1, 200, 56),))
    arena.check_integrity()


def test_lost_books_are_found() -> None:
    arena = Arena(ALIGN * 16, torch.float32, "cpu")
    slot = arena.allocate((plan(0, 2),))
    del arena.factors[slot]
    with pytest.raises(IntegrityError, match="disagree"):
        arena.check_integrity()
