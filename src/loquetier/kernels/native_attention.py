"""Decode attention on the C library: pages are read where they lie."""

from __future__ import annotations

from ctypes import c_double, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from loquetier.kernels.attention import MaskRule
from loquetier.kernels.native import DTYPE_CODES, NativeLibrary

_MOST_GROUPS, _MOST_FLOATS = 64, 8192
"""As in attention.c: query heads per kv head, and those times the head size rounded up to 16."""


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
