"""Tile sizes of the Triton kernels, by what a launch looks like. A table instead of autotuning: same sizes, same sums.

Nothing here was measured on a GPU yet: sizes are estimates from registers and shared memory of sm_80 and sm_90.
"""

from __future__ import annotations

from typing import NamedTuple

SMALLEST_DOT = 16
"""`tl.dot` takes no smaller side."""
RANK_BLOCK = 64
"""Ranks above this run in blocks of it, so that accumulators stay in registers whatever the rank."""
SMALL_TILE, LARGE_TILE = 16, 64
"""Rows per tile."""
FEW_ROWS = 32
"""The longest segment of a layout that still runs on small tiles: decode rows and short chunks."""
WGRAD_ROWS = 64
"""Rows of a tile in wgrad, which sums over them."""
ENOUGH_PROGRAMS = 128
"""About one program for each multiprocessor of a large GPU: below, a sum is split."""
MOST_SPLITS = 16


class SmlmPlanned(NamedTuple):
    """Of one launch."""

    block: int
    """Columns of a tile: summed over in shrink, written in expand and wgrad."""
    split: int
    """Planes of shrink, or parts of the rows in wgrad."""
    warps: int
    stages: int


def next_power(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()


def padded_rank(rank: int) -> int:
    """Width of the planes for adapters up to this rank: a power of two, or a multiple of RANK_BLOCK."""
    if rank <= RANK_BLOCK:
        return max(SMALLEST_DOT, next_power(rank))
    return -(-rank // RANK_BLOCK) * RANK_BLOCK


def rank_block(padded: int) -> int:
    """Ranks per program."""
    return min(padded, RANK_BLOCK)


def tile_rows(longest: int) -> int:
    """Rows per tile, by the longest segment of the layout."""
    return SMALL_TILE if longest <= FEW_ROWS else LARGE_TILE


def _splits(programs: int, blocks: int, enough: int = ENOUGH_PROGRAMS) -> int:
    """How many ways to split a sum of `blocks` steps that `programs` programs would do.

    One of three numbers: each is a kernel of its own, compiled when it is first needed, and programs vary by the step.
    """
    wanted = min(-(-enough // max(1, programs)), blocks)
    return next((n for n in (MOST_SPLITS, 4) if wanted >= n), 1)


def _warps(accumulators: int) -> int:
    """Warps for this many float32 sums: below 32 of a thread's registers, or operands spill."""
    return 8 if accumulators >= 4096 else 4


def shrink_plan(dim: int, padded: int, rows: int, num_tiles: int) -> SmlmPlanned:
    """For ``[rows of a tile, dim] -> rank``: long sums, few programs, so they are split while tiles are few."""
    block = 128 if rows * rank_block(padded) < 1024 else 64
    block = min(block, max(SMALLEST_DOT, next_power(dim)))
    programs = num_tiles * (padded // rank_block(padded))
    return SmlmPlanned(block, _splits(programs, -(-dim // block)), _warps(rows * rank_block(padded)), 3)


def expand_plan(dim: int, padded: int, rows: int) -> SmlmPlanned:
    """For ``rank -> [rows of a tile, dim]``: short sums, many columns."""
    block = min(128, max(SMALLEST_DOT, next_power(dim)))
    return SmlmPlanned(block, 1, _warps(rows * block), 2)


def wgrad_plan(dim: int, padded: int, longest: int, num_spans: int) -> SmlmPlanned:
    """For ``[rank, dim]`` gradients summed over `longest` rows: one program per span and block of columns is few."""
    block = min(64, max(SMALLEST_DOT, next_power(dim)))
    programs = num_spans * (padded // rank_block(padded)) * -(-dim // block)
    split = _splits(programs, -(-longest // WGRAD_ROWS))
    return SmlmPlanned(block, split, _warps(rank_block(padded) * block), 3)


LARGEST_HEAD = 256
"""Elements per head: beyond, a tile's sums do not stay in registers."""
_KEYS_PER_SPLIT = 256
"""Fewer keys are not worth a program of their own and its share of the merge."""


class AttentionPlanned(NamedTuple):
    """Of one launch of attention."""

    block_m: int
    """Query rows times the heads that share a kv head."""
    block_n: int
    """Keys per step."""
    block_d: int
    split: int
    """Parts of the keys."""
    warps: int
    stages: int


def attention_plan(
    rows: int, kv_heads: int, groups: int, dim: int, most_keys: int, *, decode: bool, wide: bool
) -> AttentionPlanned:
    """Sizes for `rows` queries that see at most `most_keys` keys.

    Args:
        groups: query heads per kv head. decode: a row is a sequence of its own. wide: four-byte elements.
    """
    block_d = max(SMALLEST_DOT, next_power(dim))
    block_m = max(SMALLEST_DOT, next_power(groups))
    if not decode and rows * groups > SMALLEST_DOT:
        block_m = max(block_m, 32 if wide or block_d > 128 else 64)
    block_n = 32 if wide or block_d > 128 else 64
    block_n = min(block_n, max(SMALLEST_DOT, next_power(most_keys)))
    programs = kv_heads * (rows if decode else -(-rows // max(1, block_m // groups)))
    split = _splits(programs, 2 * max(1, most_keys // _KEYS_PER_SPLIT), 4 * ENOUGH_PROGRAMS)  # reading, not computing
    return AttentionPlanned(block_m, block_n, block_d, split, 8 if block_m * block_d >= 8192 else 4, 2)
