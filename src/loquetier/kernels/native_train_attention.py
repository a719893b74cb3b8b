"""Causal attention of fresh rows on the C library, and its backward. The reference is `attention.span_attention`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import byref, c_double, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from loquetier.kernels.attention import MaskRule
from loquetier.kernels.native import DTYPE_CODES, NativeLibrary

Heads = Tensor
"""``[rows, heads, D]`` on a CPU; the elements of a head lie side by side, rows and heads may be far apart."""


class AttentionSpan(NamedTuple):
    """Query rows ``[q_start, q_stop)`` are the last of the keys ``[k_start, k_stop)`` of one sequence."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


class NativeTrainAttention:
    """Both directions over many spans in one call, for query heads that are a multiple of the kv heads.

    Args:
        library: the C library.
        amx: False keeps bfloat16 on float32 vectors (tests); None = AMX where the machine has it.
    """

    def __init__(self, library: NativeLibrary, amx: bool | None = None) -> None:
        level = c_int64()
        library.function("lq_gemm_level", c_void_p)(byref(level))
        self._level = level.value if amx is None or amx else 0
        strided = (c_void_p, c_int64, c_int64)
        rest = (c_void_p, *(c_int64,) * 6, c_double, c_double, c_int32, c_int64)
        self._forward = library.function("lq_train_attention", *strided * 4, c_void_p, *rest, restype=c_int32)
        self._backward = library.function(
            "lq_train_attention_backward", *strided * 5, c_void_p, *strided * 3, *rest, restype=c_int32
        )

    def forward(
        self, q: Heads, k: Heads, v: Heads, out: Heads, lse_HM: Tensor, spans: Sequence[AttentionSpan], scale: float,
        rule: MaskRule,
    ) -> None:  # fmt: skip
        """``out = attention`` on the spans' rows, and each row's log-sum-exp (float32). Raises MemoryError."""
        table = _table(spans, q, k, v)
        assert out.shape == q.shape and lse_HM.shape == (q.shape[1], len(q)) and lse_HM.is_contiguous()
        failed = self._forward(
            *_strided(q), *_strided(k), *_strided(v), *_strided(out), lse_HM.data_ptr(),
            *self._rest(table, q, k, scale, rule),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the attention of {len(q)} rows")

    def backward(
        self, inputs: tuple[Heads, Heads, Heads], out: Heads, lse_HM: Tensor, dout: Heads,
        grads: tuple[Heads, Heads, Heads], spans: Sequence[AttentionSpan], scale: float, rule: MaskRule,
    ) -> None:  # fmt: skip
        """Gradients of q, k and v, written over `grads` on the spans' rows. Raises MemoryError.

        Args:
            inputs: q, k, v as in the forward. out, lse_HM: what it gave.
        """
        q, k, v = inputs
        table = _table(spans, q, k, v)
        assert lse_HM.shape == (q.shape[1], len(q)) and lse_HM.is_contiguous()
        assert out.shape == dout.shape == q.shape and all(
            g.shape == t.shape for g, t in zip(grads, inputs, strict=True)
        )
        failed = self._backward(
            *_strided(q), *_strided(k), *_strided(v), *_strided(out), *_strided(dout), lse_HM.data_ptr(),
            *_strided(grads[0]), *_strided(grads[1]), *_strided(grads[2]), *self._rest(table, q, k, scale, rule),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the attention's backward over {len(q)} rows")

    def _rest(
        self, table: array[int], q: Tensor, k: Tensor, scale: float, rule: MaskRule
    ) -> tuple[int | float | None, ...]:
        return (
            table.buffer_info()[0], len(table) // 4, len(q), q.shape[1], k.shape[1], q.shape[2], rule.window or 0,
            scale, rule.softcap or 0.0, DTYPE_CODES[q.dtype], self._level,
        )  # fmt: skip


def _strided(t: Tensor) -> tuple[int, int, int]:
    assert t.dtype in DTYPE_CODES and t.is_cpu and (t.stride(2) == 1 or t.shape[2] == 1)
    return t.data_ptr(), t.stride(0), t.stride(1)


def _table(spans: Sequence[AttentionSpan], q: Tensor, k: Tensor, v: Tensor) -> array[int]:
    """C reads and writes where it is told to: wrong spans must end here."""
    assert q.dtype == k.dtype == v.dtype and k.shape == v.shape and q.shape[2] == k.shape[2]
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads on {k.shape[1]} kv heads"
    for s in spans:
        assert 0 <= s.q_start <= s.q_stop <= len(q) and 0 <= s.k_start <= s.k_stop <= len(k), s
        assert s.q_stop - s.q_start <= s.k_stop - s.k_start, s
    return array("q", [number for span in spans if span.q_stop > span.q_start for number in span])


def own_spans(spans: Sequence[tuple[int, int]]) -> list[AttentionSpan]:
    """Sequences whose keys are their own rows."""
    return [AttentionSpan(a, b, a, b) for a, b in spans]


def empty_lse(q: Heads) -> Tensor:
    """Room for the log-sum-exp of these rows, ``[heads, rows]``."""
    return torch.empty((q.shape[1], len(q)), dtype=torch.float32)
