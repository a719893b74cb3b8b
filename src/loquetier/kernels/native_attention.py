"""Attention over the cache on the C library: pages are read where they lie."""

from __future__ import annotations

from ctypes import c_double, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from loquetier.kernels.attention import MaskRule
from loquetier.kernels.gemm import AMX, GemmKernel
from loquetier.kernels.native import DTYPE_CODES, NativeLibrary

_MOST_GROUPS, _MOST_FLOATS = 64, 8192
"""As in attention.c: query heads per kv head, and those times the head size rounded up to 16."""
_MOST_DIM = 256
"""As in prefill.c."""
_MOST_TOKENS = 1 << 24
"""prefill.c compares positions as float32."""


class NativeDecode:
    """One query row per sequence over its cached tokens; arguments as `attention.decode_attention`'s."""

    def __init__(self, library: NativeLibrary) -> None:
        self._decode = library.function(
            "lq_decode_attention",
            c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p,
            c_int64, c_int64, c_int64, c_int64, c_int64, c_int64, c_double, c_double, c_int32,
            restype=c_int32,
        )  # fmt: skip

    @staticmethod
    def takes(q_NHD: Tensor, k_cache: Tensor) -> bool:
        """CPU tensors of one supported dtype, the head's elements side by side, heads of a bearable size."""
        groups, dim = q_NHD.shape[1] // k_cache.shape[2], q_NHD.shape[2]
        return (
            q_NHD.dtype == k_cache.dtype
            and q_NHD.dtype in DTYPE_CODES
            and q_NHD.is_cpu
            and q_NHD.stride(2) == 1
            and groups <= _MOST_GROUPS
            and groups * -(-dim // 16) * 16 <= _MOST_FLOATS
        )

    def __call__(
        self,
        q_NHD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        pages_NB: Tensor,
        positions_N: Tensor,
        scale: float,
        rule: MaskRule,
    ) -> Tensor:
        """``[N, H, D]``. `k_cache` and `v_cache` are whole layers of a `KVCache`. Raises MemoryError."""
        n, num_heads, dim = q_NHD.shape
        out_NHD = torch.empty((n, num_heads, dim), dtype=q_NHD.dtype)
        failed = self._decode(
            q_NHD.data_ptr(), q_NHD.stride(0), q_NHD.stride(1), k_cache.data_ptr(), v_cache.data_ptr(),
            out_NHD.data_ptr(), pages_NB.data_ptr(), pages_NB.stride(0), positions_N.data_ptr(),
            n, num_heads, k_cache.shape[2], dim, k_cache.shape[1], rule.window or 0,
            scale, rule.softcap or 0.0, DTYPE_CODES[q_NHD.dtype],
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for partial results of {n} sequences")
        return out_NHD


class NativePrefill:
    """Rows ``[past, past + L)`` of one sequence over its cached tokens.

    Args:
        level: of the GEMM kernel (`gemm.GemmKernel.level`): with AMX, bfloat16 rows run on tiles.
    """

    def __init__(self, library: NativeLibrary, level: int | None = None) -> None:
        self._amx = int((GemmKernel(library).level if level is None else level) == AMX)
        self._prefill = library.function(
            "lq_prefill_attention",
            c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, *(c_int64,) * 6, c_double, c_double,
            c_int32, c_int32,
            restype=c_int32,
        )  # fmt: skip

    @staticmethod
    def takes(q_LHD: Tensor, k_cache: Tensor) -> bool:
        """CPU tensors of one supported dtype, the head's elements side by side, heads of a bearable size."""
        return (
            q_LHD.dtype == k_cache.dtype
            and q_LHD.dtype in DTYPE_CODES
            and q_LHD.is_cpu
            and q_LHD.stride(2) == 1
            and q_LHD.shape[2] <= _MOST_DIM
        )

    def __call__(
        self, q_LHD: Tensor, k_cache: Tensor, v_cache: Tensor, pages_B: Tensor, past: int, scale: float, rule: MaskRule
    ) -> Tensor:
        """``[L, H, D]``. `k_cache` and `v_cache` are whole layers of a `KVCache`; `pages_B` is contiguous."""
        num_rows, num_heads, dim = q_LHD.shape
        assert past + num_rows <= min(_MOST_TOKENS, len(pages_B) * k_cache.shape[1]) and pages_B.is_contiguous()
        out_LHD = torch.empty((num_rows, num_heads, dim), dtype=q_LHD.dtype)
        span = (c_int64 * 4)(0, num_rows, past, pages_B.data_ptr())
        failed = self._prefill(
            q_LHD.data_ptr(), q_LHD.stride(0), q_LHD.stride(1), k_cache.data_ptr(), v_cache.data_ptr(),
            out_LHD.data_ptr(), span, 1, num_heads, k_cache.shape[2], dim, k_cache.shape[1], rule.window or 0,
            scale, rule.softcap or 0.0, DTYPE_CODES[q_LHD.dtype], self._amx,
        )  # fmt: skip
        assert not failed, "takes() lets through what C can hold"
        return out_LHD
