"""Sizes of the Triton kernels, without Triton: what `tl.dot` and a launch demand holds for any shape."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loquetier.kernels import triton_plan as plans

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
