"""The base's GEMM on the C library: weights packed once, read at memory bandwidth by every step that has few rows.

Measured on 2 Sapphire Rapids cores, ms for the GEMMs of a smollm2-135m step (269 MB of weights), each shape by itself,
so that small ones partly stay in the third-level cache. One after the other, as in a step, ours takes 9.7 at 1 row and
11.8 at 16. A plain read of 256 MB runs at 37 GB/s on huge pages (26 without): 7.3 ms is the floor.

| rows | F.linear | oneDNN prepacked | ours, AMX | ours, AVX512_BF16 |
|---|---|---|---|---|
| 1 | 18.7 | 12.0 | 7.3 | 8.0 |
| 4 | 19.1 | 13.6 | 8.3 | 11.3 |
| 16 | 21.1 | 13.3 | 8.5 | 25.1 |
| 64 | 30.6 | 25.6 | 14.6 | - |
| 256 | 66 | 43 | 47 | - |
| 512 | 101 | 98 | 88-93 | - |

So with AMX one packed copy serves every number of rows; without AMX it serves up to FEW_ROWS, and F.linear on the
original weight the rest. The original stays either way: the backward multiplies by it, and embeddings may be tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p

import torch
from torch import Tensor

from loquetier.kernels.native import NativeLibrary

FEW_ROWS = 8
"""Without AMX: at 16 rows the sums of a block of columns no longer hide behind the reading of the weights."""
ANY_ROWS = 1 << 62
NO_KERNEL, AVX512_BF16, AMX = 0, 1, 2
_HUGE_PAGE = 2 << 20
_ALIGNMENT = 64


class GemmKernel:
    """``y = x W^T + b`` in bfloat16 with float32 sums.

    Args:
        library: the C library.
        level: NO_KERNEL, AVX512_BF16 or AMX; None = the best that this machine and the library's variant allow.
    """

    def __init__(self, library: NativeLibrary, level: int | None = None) -> None:
        best = c_int64()
        library.function("lq_gemm_level", c_void_p)(byref(best))
        self.level = best.value if level is None else min(level, best.value)
        self.max_rows = FEW_ROWS if self.level == AVX512_BF16 else ANY_ROWS
        """More rows than this are faster in torch."""
        self.packed_size = library.function("lq_gemm_packed_size", c_int64, c_int64, restype=c_int64)
        """Elements of a packed ``[N, K]`` weight."""
        self.pack = library.function("lq_gemm_pack", c_void_p, c_void_p, *(c_int64,) * 4)
        self.run = library.function("lq_gemm_bf16", *(c_void_p,) * 4, *(c_int64,) * 6)
        self.advise_huge = library.function("lq_advise_huge", c_void_p, c_int64)


class PackedWeight:
    """One weight in the kernel's layout; a slice of the storage that `pack_weights` made."""

    __slots__ = ("_bias_N", "_run", "_storage", "address", "bias_address", "k", "level", "max_rows", "n")

    def __init__(self, kernel: GemmKernel, storage: Tensor, shape: tuple[int, int], bias_N: Tensor | None) -> None:
        self._storage, self._bias_N = storage, bias_N  # kept alive: C gets their addresses
        self.address, self.bias_address = storage.data_ptr(), None if bias_N is None else bias_N.data_ptr()
        self._run, self.level, self.max_rows = kernel.run, kernel.level, kernel.max_rows
        self.n, self.k = shape

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., N]``, both bfloat16. No autograd; at most `max_rows` rows pay."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.n))
        self.into(x, y)
        return y

    def into(self, x: Tensor, y: Tensor) -> None:
        """The same over what `y` holds; both contiguous."""
        rows, k, n = x.numel() // self.k, self.k, self.n
        assert (
            x.is_contiguous() and y.is_contiguous() and y.numel() == rows * n and x.dtype == y.dtype == torch.bfloat16
        )
        self._run(x.data_ptr(), self.address, self.bias_address, y.data_ptr(), rows, k, n, k, n, self.level)


def packed_bytes(kernel: GemmKernel, weights: Sequence[Tensor]) -> int:
    """Bytes that `pack_weights` takes."""
    return sum(_aligned(2 * int(kernel.packed_size(*w.shape))) for w in weights) + _HUGE_PAGE


def pack_weights(kernel: GemmKernel, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[PackedWeight]:
    """Copies of bfloat16 ``[N, K]`` weights in the kernel's layout, in one piece of memory on huge pages.

    A weight may be the transpose of a matrix.
    """
    total = packed_bytes(kernel, weights)
    storage = torch.empty(total // 2, dtype=torch.bfloat16)
    at = -storage.data_ptr() % _HUGE_PAGE
    kernel.advise_huge(storage.data_ptr() + at, (total - at) // _HUGE_PAGE * _HUGE_PAGE)
    packed = []
    for weight_NK, bias_N in zip(weights, biases, strict=True):
        assert weight_NK.dtype == torch.bfloat16 and weight_NK.is_cpu
        n, k = weight_NK.shape
        size = int(kernel.packed_size(n, k))
        part = storage[at // 2 : at // 2 + size]
        kernel.pack(weight_NK.data_ptr(), part.data_ptr(), n, k, *weight_NK.stride())
        bias = None if bias_N is None else bias_N.to(torch.bfloat16).contiguous()
        packed.append(PackedWeight(kernel, part, (n, k), bias))
        at += _aligned(2 * size)
    return packed


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
