"""SMLM on the C library: the arguments of `reference.smlm_forward` and `smlm_backward` as pointers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from loquetier.kernels.native import DTYPE_CODES, NativeLibrary
from loquetier.kernels.reference import Factors, FactorTable, Segment

_MATRIX = (c_void_p, c_int64)

LONG_FORWARD, LONG_BACKWARD = 3072, 6144
"""Rows times rank of one segment from which on torch's GEMMs win.

Measured on 2 AVX512 cores with AMX, bfloat16 rows, ranks 4 to 64, 576 and 1536 wide: the C kernel computes in float32,
torch in bfloat16 on tiles, at a fixed cost of some 60 us. In float32 both are within 20 % of each other there.
"""


class Rows(NamedTuple):
    """What C reads of the segments that an adapter's weights on one module concern.

    The pointers are good as long as the tensors they came from live.
    """

    table: array[int]
    """``a, b, grad a, grad b, rank, start, stop`` of each."""
    scales: array[float]
    dtype: torch.dtype
    """Of the weights."""
    long: tuple[Segment, ...]
    """Segments left out: they are for torch's GEMMs."""
    widths: tuple[int, int]
    """In and out of the module."""
    stop: int
    """Behind the last row that C touches."""


def forward_rows(module: int, segments: Sequence[Segment], table: FactorTable) -> Rows | None:
    """Pointers for a forward; None when C cannot take these factors (see `usable_factor`)."""
    return _rows([(s, f, None) for s in segments if (f := table[s.slot].get(module)) is not None], LONG_FORWARD)


def backward_rows(
    module: int, segments: Sequence[Segment], table: FactorTable, grads: FactorTable, longest: int | None = None
) -> Rows | None:
    """Pointers for a backward; None when C cannot take these factors.

    `longest`: rows times rank of one segment; None = LONG_BACKWARD.
    """
    found = [(s, f, grads[s.slot][module]) for s in segments if (f := table[s.slot].get(module)) is not None]
    return _rows(found, LONG_BACKWARD if longest is None else longest)


def _rows(found: Sequence[tuple[Segment, Factors, Factors | None]], longest: int) -> Rows | None:
    rows: list[int] = []
    long: list[Segment] = []
    scales: list[float] = []
    dtype = found[0][1].a_RK.dtype if found else torch.float32
    last = 0
    widths = (found[0][1].a_RK.shape[1], found[0][1].b_RN.shape[1]) if found else (0, 0)
    for segment, (a_RK, b_RN, scale), grad in found:
        if not (usable_factor(a_RK, dtype) and usable_factor(b_RN, dtype)):
            return None
        assert (a_RK.shape[1], b_RN.shape[1]) == widths and len(a_RK) == len(b_RN), "one module has one shape"
        grad_a = grad_b = 0
        if grad is not None:
            if not (usable_factor(grad.a_RK, torch.float32) and usable_factor(grad.b_RN, torch.float32)):
                return None
            grad_a, grad_b = grad.a_RK.data_ptr(), grad.b_RN.data_ptr()
        _, start, stop = segment
        rank = a_RK.shape[0]
        if (stop - start) * rank > longest:
            long.append(segment)
        elif stop > start and rank:
            rows += (a_RK.data_ptr(), b_RN.data_ptr(), grad_a, grad_b, rank, start, stop)
            scales.append(scale)
            last = max(last, stop)
    return Rows(array("q", rows), array("d", scales), dtype, tuple(long), widths, last)


def usable_factor(factor: Tensor, dtype: torch.dtype) -> bool:
    """One dtype over all segments, rows without gaps, on a CPU."""
    return factor.dtype == dtype and dtype in DTYPE_CODES and factor.is_contiguous() and factor.is_cpu


def usable_matrix(matrix: Tensor, dtype: torch.dtype) -> bool:
    """A CPU matrix of this dtype whose columns lie side by side; rows may be far apart (a column slice)."""
    return (
        matrix.dtype == dtype
        and dtype in DTYPE_CODES
        and matrix.is_cpu
        and (matrix.stride(1) == 1 or matrix.shape[1] == 1)
    )


def _check(rows: Rows, x_TK: Tensor, y_TN: Tensor) -> None:
    """C writes where it is told to: a table of other rows or another module must end here."""
    num_rows, width = x_TK.shape
    assert y_TN.shape == (num_rows, rows.widths[1]) and width == rows.widths[0] and rows.stop <= num_rows, (
        f"segments up to row {rows.stop} of a module {rows.widths}, rows {x_TK.shape} -> {y_TN.shape}"
    )


class NativeSmlm:
    """Both directions, on matrices that `usable_matrix` accepts."""

    def __init__(self, library: NativeLibrary) -> None:
        rows = (c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int32, c_int32)
        self._forward = library.function("lq_smlm_forward", *_MATRIX * 2, *rows, restype=c_int32)
        self._backward = library.function("lq_smlm_backward", *_MATRIX * 3, *rows, restype=c_int32)

    def takes(self, rows: Rows, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for rows of `dtype` on these weights: not for float32 on bfloat16."""
        return dtype == torch.bfloat16 or rows.dtype == dtype

    def forward(self, x_TK: Tensor, y_TN: Tensor, rows: Rows) -> None:
        """``y += delta`` in place. Raises MemoryError."""
        if not rows.scales:
            return
        _check(rows, x_TK, y_TN)
        failed = self._forward(
            x_TK.data_ptr(), x_TK.stride(0), y_TN.data_ptr(), y_TN.stride(0), x_TK.shape[1], y_TN.shape[1],
            rows.table.buffer_info()[0], rows.scales.buffer_info()[0], len(rows.scales),
            DTYPE_CODES[x_TK.dtype], DTYPE_CODES[rows.dtype],
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the table of segments")

    def backward(self, x_TK: Tensor, dy_TN: Tensor, dx_TK: Tensor, rows: Rows) -> None:
        """``dx += delta`` and the gradients, in place. Raises MemoryError."""
        if not rows.scales:
            return
        _check(rows, x_TK, dy_TN)
        assert dx_TK.shape == x_TK.shape
        failed = self._backward(
            x_TK.data_ptr(), x_TK.stride(0), dy_TN.data_ptr(), dy_TN.stride(0), dx_TK.data_ptr(), dx_TK.stride(0),
            x_TK.shape[1], dy_TN.shape[1],
            rows.table.buffer_info()[0], rows.scales.buffer_info()[0], len(rows.scales),
            DTYPE_CODES[x_TK.dtype], DTYPE_CODES[rows.dtype],
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for S and dS of the train rows")
