"""The page allocator: examples, and a state machine that compares it with a plain set."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from loquetier.engine.blocks import TRASH_PAGE, BlockAllocator
from loquetier.errors import ConfigError, IntegrityError, OutOfKVMemoryError


def test_pages_are_numbered_from_one_and_never_the_trash_page() -> None:
    allocator = BlockAllocator(4, 16)
    assert allocator.allocate(4) == [1, 2, 3, 4]
    assert TRASH_PAGE == 0


def test_last_freed_page_comes_first() -> None:
    allocator = BlockAllocator(4, 16)
    pages = allocator.allocate(3)
    allocator.free([pages[1]])
    assert allocator.allocate(1) == [pages[1]]


def test_freeing_and_taking_again_keeps_the_order() -> None:
    allocator = BlockAllocator(4, 16)
    pages = allocator.allocate(3)
    allocator.free(pages)
    assert allocator.allocate(3) == pages


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_needed(tokens: int, pages: int) -> None:
    assert BlockAllocator(4, 16).pages_needed(tokens) == pages


def test_allocate_is_all_or_nothing() -> None:
    allocator = BlockAllocator(4, 16)
    allocator.allocate(2)
    with pytest.raises(OutOfKVMemoryError, match="3 KV pages asked for, 2 of 4 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2


@pytest.mark.parametrize("bad", [[3], [1, 1], [0], [5], [-1]], ids=["free", "twice", "trash", "beyond", "negative"])
def test_bad_free_changes_nothing(bad: list[int]) -> None:
    allocator = BlockAllocator(4, 16)
    held = allocator.allocate(2)
    with pytest.raises(IntegrityError):
        allocator.free([2, *bad])
    assert allocator.num_free == 2
    allocator.check_integrity([held])


def test_negative_count_is_our_bug() -> None:
    with pytest.raises(IntegrityError):
        BlockAllocator(4, 16).allocate(-1)


@pytest.mark.parametrize("owners", [[[1, 2], [2]], [[1]], [[1, 2, 3]], [[1, 2, 9]], [[1, 2], [0]]])
def test_integrity_check_finds_wrong_owners(owners: list[list[int]]) -> None:
    allocator = BlockAllocator(4, 16)
    allocator.allocate(2)
    with pytest.raises(IntegrityError, match="page"):
        allocator.check_integrity(owners)


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (4, 0)])
def test_sizes_below_one_are_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ConfigError, match="must be >= 1"):
        BlockAllocator(num_pages, page_size)


class AllocatorMachine(RuleBasedStateMachine):
    """Random allocations and frees, against sets of held pages."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(12, 4)
        self.owners: list[list[int]] = []

    @property
    def num_held(self) -> int:
        return sum(map(len, self.owners))

    @rule(target=held, n=st.integers(0, 14))
    def allocate(self, n: int) -> list[int]:
        if n > 12 - self.num_held:
            with pytest.raises(OutOfKVMemoryError):
                self.allocator.allocate(n)
            return []
        pages = self.allocator.allocate(n)
        assert len(pages) == n
        self.owners.append(pages)
        return pages

    @rule(pages=consumes(held))
    def free(self, pages: list[int]) -> None:
        self.allocator.free(pages)
        self.owners = [owner for owner in self.owners if owner is not pages]

    @precondition(lambda self: self.num_held < 12)
    @rule(data=st.data())
    def free_a_free_page(self, data: st.DataObject) -> None:
        free = sorted(set(range(1, 13)) - {page for owner in self.owners for page in owner})
        page = data.draw(st.sampled_from(free))
        with pytest.raises(IntegrityError, match="is free already"):
            self.allocator.free([page])

    @invariant()
    def books_add_up(self) -> None:
        self.allocator.check_integrity(self.owners)
        assert self.allocator.num_free == 12 - self.num_held


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocatorMachine = AllocatorMachine.TestCase
