"""The rows of a launch as tiles: short runs of rows on one slot, padded to a fixed number for CUDA graphs.

Built on the host from a layout of segments. Imports no Triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loquetier.kernels.mixing import drop_threshold
from loquetier.kernels.reference import Segment
from loquetier.kernels.transfer import to_device
from loquetier.kernels.triton_plan import padded_rank, tile_rows
from loquetier.kernels.triton_tables import KEEP_ALL, ONE_BITS, PADDING, TILE_WORDS, float_bits

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a launch of shrink, expand or wgrad runs over. The tensors may be written again, in place."""

    tiles: Tensor
    """int32 ``[tiles, TILE_WORDS]``."""
    block: int
    """Rows of a tile."""
    rank: int
    """Width of the planes."""
    weights: torch.dtype
    aligned: bool
    """Weights start at multiples of 16 bytes, and so does each of their rows."""
    drops: bool
    longest: int
    """Rows of the longest segment."""
    rounds: tuple[Tensor, ...] = ()
    """For wgrad: whole segments as tiles; no slot comes twice in a round."""
    modules: frozenset[int] = frozenset()
    """In a plan: modules that any of the segments' adapters sits on."""
    stop: int = 0
    """In a plan: behind the last row."""


def tile_table(segments: Sequence[Segment], row_of: Mapping[int, int], rates: Sequence[float], block: int) -> Int32s:
    """Tiles ``[n, TILE_WORDS]`` of at most `block` rows.

    Args:
        row_of: a slot's row in its `SlotTable`.
        rates: dropout's probability per segment; 0 = none.
    """
    words = [
        (row_of[slot], at, min(block, stop - at), *_dropout_words(rate))
        for (slot, start, stop), rate in zip(segments, rates, strict=True)
        for at in range(start, stop, block)
    ]
    return np.asarray(words, dtype=np.int32).reshape(-1, TILE_WORDS)


def _dropout_words(rate: float) -> tuple[int, int]:
    return (drop_threshold(rate), float_bits(1.0 / (1.0 - rate))) if rate else (KEEP_ALL, ONE_BITS)


def span_rounds(segments: Sequence[Segment], row_of: Mapping[int, int], rates: Sequence[float]) -> list[Int32s]:
    """Whole segments as tiles, dealt out so that each round has a slot at most once: wgrad adds without atomics."""
    rounds: list[list[tuple[Segment, float]]] = []
    seen: dict[int, int] = {}
    for segment, rate in zip(segments, rates, strict=True):
        turn = seen.get(segment.slot, 0)
        seen[segment.slot] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append((segment, rate))
    longest = max((s.stop - s.start for s in segments), default=1)
    return [tile_table([s for s, _ in r], row_of, [rate for _, rate in r], longest) for r in rounds]


def make_layout(
    segments: Sequence[Segment],
    row_of: Mapping[int, int],
    rates: Sequence[float],
    *,
    rank: int,
    weights: torch.dtype,
    aligned: bool,
    device: torch.device,
    backward: bool = False,
) -> Layout:
    """Tiles of these segments, none of them empty, on the device.

    Args:
        rank: largest of the adapters.
        backward: make the rounds for wgrad too.
    """
    longest = max(s.stop - s.start for s in segments)
    block = tile_rows(longest)
    rounds = span_rounds(segments, row_of, rates) if backward else []
    return Layout(
        tiles=to_device(tile_table(segments, row_of, rates, block), device),
        block=block,
        rank=padded_rank(rank),
        weights=weights,
        aligned=aligned,
        drops=any(rates),
        longest=longest,
        rounds=tuple(to_device(r, device) for r in rounds),
    )


def fixed_layout(
    num_tiles: int, block: int, *, rank: int, weights: torch.dtype, aligned: bool, device: torch.device
) -> Layout:
    """A layout of padding alone: its addresses and sizes stay, `refill` changes what it holds."""
    tiles = torch.zeros((num_tiles, TILE_WORDS), dtype=torch.int32)
    tiles[:, 0] = PADDING
    return Layout(tiles.to(device), block, padded_rank(rank), weights, aligned, drops=False, longest=block)


def fits(
    layout: Layout,
    segments: Sequence[Segment],
    *,
    rank: int = 0,
    weights: torch.dtype | None = None,
    aligned: bool = True,
) -> bool:
    """Whether a `fixed_layout` can hold these segments of adapters like these."""
    tiles = sum(-(-(s.stop - s.start) // layout.block) for s in segments)
    same = weights is None or weights == layout.weights
    return same and tiles <= len(layout.tiles) and padded_rank(rank) <= layout.rank and (aligned or not layout.aligned)


def refill(layout: Layout, segments: Sequence[Segment], row_of: Mapping[int, int]) -> None:
    """Put other segments, which `fits` let through, into a `fixed_layout`: in place and in stream order."""
    tiles = tile_table(segments, row_of, [0.0] * len(segments), layout.block)
    padded = np.zeros((len(layout.tiles), TILE_WORDS), dtype=np.int32)
    padded[:, 0] = PADDING
    padded[: len(tiles)] = tiles
    layout.tiles.copy_(to_device(padded, layout.tiles.device))
