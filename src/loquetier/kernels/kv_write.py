"""Rotary and KV write on the C library: Q and K turn in place, K and V go to their pages, in one call."""

from __future__ import annotations

from ctypes import Structure, byref, c_int32, c_int64, c_void_p

from torch import Tensor

from loquetier.kernels.native import DTYPE_CODES, NativeLibrary


class _Heads(Structure):
    """`LqHeads` of kernels.h."""

    _fields_ = [("at", c_void_p), ("row", c_int64), ("head", c_int64)]


def _heads(x_MHD: Tensor) -> _Heads:
    return _Heads(x_MHD.data_ptr(), x_MHD.stride(0), x_MHD.stride(1))


class NativeKvWrite:
    """Rows of any layout in which a head's elements lie side by side; CPU tensors of one dtype, float32 or bfloat16."""

    def __init__(self, library: NativeLibrary) -> None:
        self._write = library.function(
            "lq_rotary_write", *(c_void_p,) * 5, *(c_int64,) * 6, c_void_p, c_int64, c_void_p, c_void_p, c_int32
        )

    @staticmethod
    def takes(*heads_MHD: Tensor) -> bool:
        """Whether it can turn and write such rows."""
        dtypes = {x.dtype for x in heads_MHD}
        return (
            len(dtypes) == 1 and dtypes <= DTYPE_CODES.keys() and all(x.is_cpu and x.stride(2) == 1 for x in heads_MHD)
        )

    def __call__(
        self,
        q_MHD: Tensor,
        k_MKD: Tensor,
        v_MKD: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        to: tuple[Tensor, ...] | None,
    ) -> None:
        """``x * cos + rotate_half(x) * sin`` in place on q and k, then the last rows of k and v to the cache.

        Args:
            angles: cos and sin ``[M, turned]``: the first `turned` elements of a head turn; None: nothing does, and
                `q_MHD` is not looked at.
            to: keys and values of one layer, ``[pages, page_size, K, D]``, contiguous, and the int64 flat position
                there, ``page * page_size + offset``, of each of the last rows; None: nothing is written.
        """
        rows, kv_heads, dim = k_MKD.shape
        cos = sin = None
        stride = turned = 0
        if angles is not None:
            cos, sin, stride, turned = (
                angles[0].data_ptr(),
                angles[1].data_ptr(),
                angles[0].stride(0),
                angles[0].shape[1],
            )
            assert angles[0].stride() == angles[1].stride() and len(angles[0]) == rows and turned <= dim
        keys = values = cache_rows = None
        first = rows
        if to is not None:
            assert to[2].is_contiguous() and len(to[2]) <= rows and tuple(to[0].shape[2:]) == (kv_heads, dim)
            keys, values, cache_rows = (t.data_ptr() for t in to)
            first = rows - len(to[2])
        self._write(
            byref(_heads(q_MHD)), byref(_heads(k_MKD)), byref(_heads(v_MKD)), cos, sin, stride, rows, q_MHD.shape[1],
            kv_heads, dim, turned, cache_rows, first, keys, values, DTYPE_CODES[k_MKD.dtype],
        )  # fmt: skip
