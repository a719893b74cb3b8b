"""LoRA dropout as a pure function of where a value lies, so that any replay, split or packing drops the same ones.

PEFT drops elements of a module's input on the LoRA path only: ``delta = scale * dropout(x) @ A^T @ B^T`` with what is
kept multiplied by ``1 / (1 - p)``. Whether an element is dropped is a hash (SplitMix64, Steele et al. 2014) of job
seed, draw of the optimizer step, item, row inside the example, module and column. There is no generator state: the
backward hashes again instead of keeping a mask. ``1 / (1 - p)`` goes into the delta's scale, where bfloat16 does not
round it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loquetier.kernels.mixing import GOLDEN, MIX_1, MIX_2, WORD, drop_threshold, mix_int, module_hash, signed
from loquetier.kernels.reference import Factors, FactorTable, Segment
from loquetier.kernels.smlm import SmlmPlan, smlm_backward, smlm_forward, triton_smlm
from loquetier.kernels.transfer import to_device


@dataclass(frozen=True, slots=True)
class DropoutRows:
    """Which rows of a step drop, at what rate and by which keys."""

    rates: Mapping[int, float]
    """Probability by slot; a slot that is not here drops nothing. Only rows ``[0, T)`` are ever dropped."""
    keys_T: Tensor
    """One int64 key per TRAIN row, from `row_keys`."""

    def drops(self, segment: Segment) -> bool:
        """Whether this segment's rows are in training and its job drops. EVAL rows on the same slot are not."""
        return segment.slot in self.rates and segment.stop <= len(self.keys_T)

    def at(self, rows: npt.NDArray[np.int64]) -> DropoutRows:
        """The same for a choice of TRAIN rows (what reaches lm_head)."""
        return DropoutRows(self.rates, self.keys_T[to_device(rows, self.keys_T.device)])


def row_keys(seed: int, draw: int, item: int, num_rows: int, first_row: int = 0) -> npt.NDArray[np.int64]:
    """Keys ``[num_rows]`` of rows ``first_row, first_row + 1, ...`` of one example in one optimizer step."""
    key = 0
    for part in (seed, draw, item):
        key = mix_int((key ^ (part & WORD)) + GOLDEN)
    rows = np.arange(first_row + 1, first_row + num_rows + 1, dtype=np.uint64)
    z = np.uint64(key) + rows * np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return (z ^ (z >> np.uint64(31))).view(np.int64)


def dropped_TK(keys_T: Tensor, module: int, width: int, rate: float) -> Tensor:
    """Boolean ``[T, width]``, True where the LoRA path of `module` shall not see its input.

    Each 64-bit hash decides two neighbouring columns, 32 bits each, so `rate` is met to 2**-32.
    """
    pairs = torch.arange(1, (width + 1) // 2 + 1, dtype=torch.int64, device=keys_T.device)
    z = (keys_T ^ module_hash(module))[:, None] + pairs * signed(GOLDEN)
    z = z.bitwise_xor_(_shifted(z, 30)).mul_(signed(MIX_1))
    z = z.bitwise_xor_(_shifted(z, 27)).mul_(signed(MIX_2))
    z = z.bitwise_xor_(_shifted(z, 31))
    return z.view(torch.int32)[:, :width] < drop_threshold(rate)


def dropout_forward(
    x_MK: Tensor,
    y_MN: Tensor,
    module: int,
    segments: Sequence[Segment],
    table: FactorTable,
    dropout: DropoutRows,
    plan: SmlmPlan | None = None,
) -> None:
    """`smlm_forward` with the train rows of jobs that drop seeing their dropped input."""
    triton = triton_smlm(x_MK)
    if triton is not None:
        triton.forward(x_MK, y_MN, module, segments, table, plan, dropout)
        return
    smlm_forward(x_MK, y_MN, module, [s for s in segments if not dropout.drops(s)], table)
    for s in segments:
        if dropout.drops(s) and s.stop > s.start and module in table[s.slot]:
            x_sK = x_MK[s.start : s.stop] * _kept(x_MK, s, module, dropout)
            alone = (Segment(s.slot, 0, s.stop - s.start),)
            smlm_forward(x_sK, y_MN[s.start : s.stop], module, alone, _rescaled(table, s.slot, module, dropout))


def dropout_backward(
    x_TK: Tensor,
    dy_TN: Tensor,
    dx_TK: Tensor,
    module: int,
    segments: Sequence[Segment],
    table: FactorTable,
    grads: FactorTable,
    dropout: DropoutRows,
    plan: SmlmPlan | None = None,
) -> None:
    """`smlm_backward` of `dropout_forward`: dA sees the dropped input, dx the masked delta. Arguments as there."""
    triton = triton_smlm(x_TK)
    if triton is not None:
        triton.backward(x_TK, dy_TN, dx_TK, module, segments, table, grads, plan, dropout)
        return
    smlm_backward(x_TK, dy_TN, dx_TK, module, [s for s in segments if not dropout.drops(s)], table, grads)
    for s in segments:
        if dropout.drops(s) and s.stop > s.start and module in table[s.slot]:
            kept_sK = _kept(x_TK, s, module, dropout)
            x_sK = x_TK[s.start : s.stop] * kept_sK
            delta_sK = torch.zeros_like(x_sK)
            alone = (Segment(s.slot, 0, s.stop - s.start),)
            rescaled = _rescaled(table, s.slot, module, dropout)
            smlm_backward(x_sK, dy_TN[s.start : s.stop], delta_sK, module, alone, rescaled, grads)
            dx_TK[s.start : s.stop] += delta_sK.mul_(kept_sK)


def _kept(x_TK: Tensor, s: Segment, module: int, dropout: DropoutRows) -> Tensor:
    # To be multiplied with: on a CPU that takes half the time of masked_fill.
    return dropped_TK(dropout.keys_T[s.start : s.stop], module, x_TK.shape[1], dropout.rates[s.slot]).logical_not_()


def _rescaled(table: FactorTable, slot: int, module: int, dropout: DropoutRows) -> dict[int, dict[int, Factors]]:
    factors = table[slot][module]
    return {slot: {module: factors._replace(scale=factors.scale / (1.0 - dropout.rates[slot]))}}


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch shifts int64 arithmetically."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
