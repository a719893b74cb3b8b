"""The calls whose kernels are compiled for real GPUs: host code as the engine calls it, sizes of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loquetier.kernels import triton_rows
from loquetier.kernels.attention import MaskRule
from loquetier.kernels.dropout import DropoutRows
from loquetier.kernels.reference import Factors, Segment
from loquetier.kernels.rowops import GELU_TANH, SILU, Norm
from loquetier.kernels.triton_attention import TritonAttention
from loquetier.kernels.triton_rows import TritonRowOps
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


def attention(
    rows: int,
    pages: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rule: MaskRule,
    *,
    past: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[], None]:
    """Decode rows of `rows` sequences, or with a past a chunk of that many rows of one."""

    def call() -> None:
        cache = _empty(8, 16, kv_heads, dim, dtype=dtype)
        q, kernel = _empty(rows, heads, dim, dtype=dtype), TritonAttention()
        table = torch.zeros((rows, pages), dtype=torch.int64)
        if past is None:
            kernel.decode(q, cache, cache, table, torch.zeros(rows, dtype=torch.int64), 0.1, rule)
        else:
            kernel.chunk(q, cache, cache, table[0], past, 0.1, rule)

    return call


def rows(count: int, dim: int, heads: int, kv_heads: int, head: int, dtype: torch.dtype) -> Callable[[], None]:
    """A layer's small operations, both ways."""

    def call() -> None:
        x, weight, ops = _empty(count, dim, dtype=dtype), _empty(dim, dtype=dtype), TritonRowOps()
        ops.rms_norm(x, Norm(weight, 1e-5), torch.empty_like(x), torch.empty_like(x))
        for one_plus in (False, True):
            triton_rows.rms_norm(x, weight, 1e-5, one_plus=one_plus)
            triton_rows.rms_norm_backward(x, weight, 1e-5, x, one_plus=one_plus)
        qkv, cos = _empty(count, (heads + 2 * kv_heads) * head, dtype=dtype), _empty(count, head, dtype=dtype)
        ops.head_norm(qkv, 0, heads, Norm(_empty(head, dtype=dtype), 1e-5))
        cache = _empty(8, 16, kv_heads, head, dtype=dtype)
        ops.rotary(qkv, cos, cos, heads + kv_heads)
        to = (cache, cache, torch.zeros(count, dtype=torch.int64))
        ops.rotary_and_write(qkv, (cos, cos), heads, kv_heads, to)
        for activation in (SILU, GELU_TANH):
            triton_rows.gated(x, x, torch.empty_like(x), activation)
            triton_rows.gated_backward(x, x, x, activation)

    return call


LAUNCHES: dict[str, Callable[[], None]] = {
    "smlm decode r16": smlm(16, (16, 8, 8, 4), HIDDEN, HIDDEN, torch.bfloat16, train=False),
    "smlm decode r64": smlm(32, (64,) * 32, HIDDEN, INNER, torch.bfloat16, train=False),
    "smlm train r16": smlm(2048, (16,), HIDDEN, INNER, torch.bfloat16, train=True),
    "smlm train r128": smlm(2048, (128, 64), HIDDEN, HIDDEN, torch.bfloat16, train=True),
    "smlm train dropout": smlm(1024, (16, 64), HIDDEN, HIDDEN, torch.bfloat16, train=True, rate=0.1),
    "smlm float32": smlm(256, (16,), 576, 1536, torch.float32, train=True),
    "decode 64 of 1000": attention(64, 64, 32, 8, 128, MaskRule()),
    "decode 1 of 4000": attention(1, 256, 32, 8, 128, MaskRule()),
    "decode gemma2": attention(4, 64, 8, 4, 256, MaskRule(4096, 50.0)),
    "decode smollm2": attention(16, 16, 9, 3, 64, MaskRule()),
    "chunk llama": attention(512, 64, 32, 8, 128, MaskRule(), past=512),
    "chunk gemma2": attention(512, 64, 8, 4, 256, MaskRule(4096, 50.0), past=0),
    "chunk float32": attention(64, 16, 9, 3, 64, MaskRule(), past=64, dtype=torch.float32),
    "decode odd heads": attention(3, 4, 6, 2, 20, MaskRule()),
    "rows llama": rows(64, HIDDEN, 32, 8, 128, torch.bfloat16),
    "rows smollm2": rows(16, 576, 9, 3, 64, torch.float32),
    "smlm one row": smlm(1, (16,), HIDDEN, HIDDEN, torch.bfloat16, train=True),
    "rows one": rows(1, HIDDEN, 32, 8, 128, torch.bfloat16),
    "rows one head": rows(2, 64, 1, 1, 64, torch.bfloat16),
    "chunk of one": attention(1, 4, 8, 2, 64, MaskRule(window=1), past=1),
    "smlm odd widths": smlm(64, (5,), 577, 83, torch.bfloat16, train=True),
}
"""By what they stand for."""
