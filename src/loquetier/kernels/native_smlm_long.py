"""SMLM for long segments of bfloat16 rows, on AMX tiles; the other segments are `native_smlm`'s and the reference's.

Measured on 2 Sapphire Rapids cores, ms for the seven linears of a smollm2-135m layer, 1,024 rows of one adapter, r=8:
the reference takes 2.0 forward and 12.0 backward, the float32 kernels of `native_smlm` 2.5 and 5.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_double, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from loquetier.kernels.gemm import AMX
from loquetier.kernels.native import NativeLibrary
from loquetier.kernels.reference import Factors, FactorTable, Segment

LONG_ON_TILES = 1024
"""Rows times rank of one segment from which on the tiles win: below, packing the factors costs more than it saves."""
_LINE = 32
"""Widths must be multiples of it: a tile reads whole lines."""


class NativeLongSmlm:
    """Both directions, a segment a call.

    Raises:
        MemoryError: from either direction, before anything was changed.
    """

    def __init__(self, library: NativeLibrary) -> None:
        level = c_int64()
        library.function("lq_gemm_level", c_void_p)(byref(level))
        self.available = level.value >= AMX
        matrix = (c_void_p, c_int64)
        shape = (c_int64,) * 3
        self._forward = library.function(
            "lq_smlm_long_forward", *matrix * 2, *shape, c_void_p, c_void_p, c_int64, c_double, restype=c_int32
        )
        self._backward = library.function(
            "lq_smlm_long_backward", *matrix * 3, *shape, *(c_void_p,) * 4, c_int64, c_double, restype=c_int32
        )

    def takes(self, x_TK: Tensor, y_TN: Tensor, factors: Factors) -> bool:
        """bfloat16 rows of whole lines, float32 weights, a machine with AMX."""
        return (
            self.available
            and x_TK.dtype == y_TN.dtype == torch.bfloat16
            and x_TK.shape[1] % _LINE == y_TN.shape[1] % _LINE == 0
            and all(f.dtype == torch.float32 and f.is_contiguous() for f in factors[:2])
            and len(factors.a_RK) > 0
        )

    def forward(
        self, x_TK: Tensor, y_TN: Tensor, module: int, segments: Sequence[Segment], table: FactorTable
    ) -> tuple[Segment, ...]:
        """``y += delta`` in place on the segments it takes; returns the others."""
        left = []
        for segment in segments:
            factors = table[segment.slot].get(module)
            if factors is None or not self.takes(x_TK, y_TN, factors):
                left.append(segment)
                continue
            a_RK, b_RN, scale = factors
            x, y = x_TK[segment.start : segment.stop], y_TN[segment.start : segment.stop]
            assert a_RK.shape[1] == x.shape[1] and b_RN.shape == (len(a_RK), y.shape[1])
            self._check(
                self._forward(
                    x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), len(x), x.shape[1], y.shape[1],
                    a_RK.data_ptr(), b_RN.data_ptr(), len(a_RK), scale,
                )
            )  # fmt: skip
        return tuple(left)

    def backward(
        self,
        x_TK: Tensor,
        dy_TN: Tensor,
        dx_TK: Tensor,
        module: int,
        segments: Sequence[Segment],
        table: FactorTable,
        grads: FactorTable,
    ) -> tuple[Segment, ...]:
        """``dx += delta`` and the gradients, in place, on the segments it takes; returns the others."""
        left = []
        for segment in segments:
            factors = table[segment.slot].get(module)
            if factors is None or not self.takes(x_TK, dy_TN, factors):
                left.append(segment)
                continue
            a_RK, b_RN, scale = factors
            grad = grads[segment.slot][module]
            assert grad.a_RK.shape == a_RK.shape and grad.b_RN.shape == b_RN.shape
            assert all(g.dtype == torch.float32 and g.is_contiguous() for g in grad[:2])
            x, dy, dx = (t[segment.start : segment.stop] for t in (x_TK, dy_TN, dx_TK))
            assert a_RK.shape[1] == x.shape[1] and b_RN.shape == (len(a_RK), dy.shape[1]) and dx.shape == x.shape
            self._check(
                self._backward(
                    x.data_ptr(), x.stride(0), dy.data_ptr(), dy.stride(0), dx.data_ptr(), dx.stride(0), len(x),
                    x.shape[1], dy.shape[1], a_RK.data_ptr(), b_RN.data_ptr(), grad.a_RK.data_ptr(),
                    grad.b_RN.data_ptr(), len(a_RK), scale,
                )
            )  # fmt: skip
        return tuple(left)

    def _check(self, failed: int) -> None:
        if failed:
            raise MemoryError("no memory for the packed factors of a segment")
