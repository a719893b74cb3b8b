"""The calls whose kernels are compiled for real GPUs: host code as the engine calls it, sizes of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loquetier.kernels.dropout import DropoutRows
from loquetier.kernels.reference import Factors, Segment
from loquetier.kernels.triton_smlm import TritonSmlm

HIDDEN, INNER = 4096, 14336


def _table(ranks: tuple[int, ...], k: int, n: int, dtype: torch.dtype) -> dict[int, dict[int, Factors]]:
    return {
        slot: {0: Factors(torch.empty(r, k, dtype=dtype), torch.empty(r, n, dtype=dtype), 1.0)}
        for slot, r in enumerate(ranks)
    }


def smlm(
    rows: int, ranks: tuple[int, ...], k: int, n: int, dtype: torch.dtype, *, train: bool, rate: float = 0.0
) -> Callable[[], None]:
    """Rows split evenly over adapters of these ranks, forward and (for train rows) backward."""

    def call() -> None:
        each = rows // len(ranks)
        segments = [Segment(slot, slot * each, (slot + 1) * each) for slot in range(len(ranks))]
        table = _table(ranks, k, n, dtype)
        x, y = torch.empty(rows, k, dtype=dtype), torch.empty(rows, n, dtype=dtype)
        dropout = DropoutRows(dict.fromkeys(table, rate), torch.zeros(rows, dtype=torch.int64)) if rate else None
        kernels = TritonSmlm()
        kernels.forward(x, y, 0, segments, table, None, dropout)
        if train:
            grads = {s: {0: Factors(f[0].a_RK.float(), f[0].b_RN.float(), 1.0)} for s, f in table.items()}
            kernels.backward(x, y, torch.empty_like(x), 0, segments, table, grads, None, dropout)

    return call


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


LAUNCHES: dict[str, Callable[[], None]] = {
    "smlm decode r16": smlm(16, (16, 8, 8, 4), HIDDEN, HIDDEN, torch.bfloat16, train=False),
    "smlm decode r64": smlm(32, (64,) * 32, HIDDEN, INNER, torch.bfloat16, train=False),
    "smlm train r16": smlm(2048, (16,), HIDDEN, INNER, torch.bfloat16, train=True),
    "smlm train r128": smlm(2048, (128, 64), HIDDEN, HIDDEN, torch.bfloat16, train=True),
    "smlm train dropout": smlm(1024, (16, 64), HIDDEN, HIDDEN, torch.bfloat16, train=True, rate=0.1),
    "smlm float32": smlm(256, (16,), 576, 1536, torch.float32, train=True),
    "smlm odd widths": smlm(64, (5,), 577, 83, torch.bfloat16, train=True),
}
"""By what they stand for."""
