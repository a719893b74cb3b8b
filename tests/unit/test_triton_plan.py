"""Sizes of the Triton kernels, without Triton: what `tl.dot` and a launch demand holds for any shape."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loquetier.kernels import triton_plan as plans
from loquetier.kernels.reference import Segment
from loquetier.kernels.triton_layout import span_rounds, tile_table
from loquetier.kernels.triton_tables import KEEP_ALL

sizes = st.integers(1, 20000)


def is_power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@given(rank=st.integers(1, 512))
def test_ranks_are_padded_to_whole_blocks(rank: int) -> None:
    padded = plans.padded_rank(rank)
    block = plans.rank_block(padded)
    assert padded >= rank and padded % block == 0 and padded - rank < max(block, plans.SMALLEST_DOT)
    assert is_power(block) and block >= plans.SMALLEST_DOT


@given(dim=sizes, rank=st.integers(1, 300), longest=sizes, count=st.integers(1, 500))
def test_smlm_sizes(dim: int, rank: int, longest: int, count: int) -> None:
    padded, rows = plans.padded_rank(rank), plans.tile_rows(longest)
    for own in (
        plans.shrink_plan(dim, padded, rows, count),
        plans.expand_plan(dim, padded, rows),
        plans.wgrad_plan(dim, padded, longest, count),
    ):
        assert is_power(own.block) and own.block >= plans.SMALLEST_DOT
        assert is_power(own.split) and 1 <= own.split <= plans.MOST_SPLITS
        assert own.warps in (4, 8)
    assert plans.expand_plan(dim, padded, rows).split == 1, "columns are written once"


def test_many_tiles_are_not_split_and_few_are() -> None:
    assert plans.shrink_plan(4096, 16, 16, 4).split > 1
    assert plans.shrink_plan(4096, 16, 16, 500).split == 1
    assert plans.shrink_plan(64, 16, 16, 1).split == 1, "one block of columns is not worth a plane"


@given(
    rows=st.integers(1, 4096), kv_heads=st.integers(1, 32), groups=st.integers(1, 64), dim=st.integers(1, 256),
    keys=st.integers(1, 100000), decode=st.booleans(), wide=st.booleans(),
)  # fmt: skip
def test_attention_sizes(rows: int, kv_heads: int, groups: int, dim: int, keys: int, decode: bool, wide: bool) -> None:
    own = plans.attention_plan(rows, kv_heads, groups, dim, keys, decode=decode, wide=wide)
    assert own.block_m >= groups, "a tile holds all query heads of a kv head"
    for size in (own.block_m, own.block_n, own.block_d):
        assert is_power(size) and size >= plans.SMALLEST_DOT
    assert own.block_d >= dim and is_power(own.split) and own.split <= plans.MOST_SPLITS


@given(
    parts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=8),
    block=st.sampled_from([16, 64]),
)
def test_tiles_cover_each_row_once_and_rounds_have_a_slot_once(parts: list[tuple[int, int]], block: int) -> None:
    """Two spans of one slot in a launch would add to the same gradients at the same time: no interpreter shows that."""
    segments, at = [], 0
    for slot, length in parts:
        segments.append(Segment(slot, at, at + length))
        at += length + 1  # a base row between
    row_of, rates = {slot: 10 + slot for slot in range(4)}, [0.5 if s.slot == 1 else 0.0 for s in segments]
    wanted = {(10 + slot, row) for slot, start, stop in segments for row in range(start, stop)}
    tiles = tile_table(segments, row_of, rates, block)
    covered = [(int(t[0]), row) for t in tiles for row in range(t[1], t[1] + t[2])]
    assert len(covered) == len(wanted) and set(covered) == wanted
    assert all(0 < t[2] <= block for t in tiles)
    assert all((t[3] == KEEP_ALL) == (t[0] != 11) for t in tiles)
    rounds = span_rounds(segments, row_of, rates)
    for spans in rounds:
        assert len({int(t[0]) for t in spans}) == len(spans)
    spans = [tuple(map(int, t[:3])) for r in rounds for t in r]
    assert sorted(spans) == sorted((10 + slot, start, stop - start) for slot, start, stop in segments)
