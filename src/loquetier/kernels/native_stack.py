"""The structures of ``csrc/stack.c`` and its functions."""

from __future__ import annotations

from ctypes import Structure, byref, c_double, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import numpy as np
import torch

from loquetier.kernels.native import NativeLibrary

TILES_RANK, TILES_LINE = 512, 32
"""Most ranks, and the unit of widths, of a segment that tiles take: `LQ_LONG_RANK` and `LQ_LONG_LINE`."""


class LayerArguments(Structure):
    """Addresses and numbers of one layer that are the same at every step."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias", "o_norm", "mlp_norm", "gate_up",
            "gate_up_bias", "down", "down_bias", "down_norm", "keys", "values",
        )),
        ("window", c_int64),
        ("angles", c_int64),
        *((name, c_double) for name in (
            "norm_epsilon", "q_epsilon", "k_epsilon", "o_epsilon", "mlp_epsilon", "down_epsilon", "scale", "softcap",
        )),
    ]  # fmt: skip


class PieceArguments(Structure):
    """A share of an adapter's work, cut by `NativeStack.cut`."""

    _fields_ = [
        ("w", c_void_p),
        *((name, c_int64) for name in (
            "rank", "row", "rows", "s_at", "s_stride", "size", "column", "columns",
        )),
        ("scale", c_double),
    ]  # fmt: skip


class LongArguments(Structure):
    """A segment for tiles, found by `NativeStack.cut`."""

    _fields_ = [
        ("a", c_void_p),
        ("b", c_void_p),
        *(
            (name, c_int64)
            for name in ("rank", "row", "rows", "first", "width", "k", "a_at", "b_at", "s_at", "first_block")
        ),
        ("scale", c_double),
    ]


class SpanArguments(Structure):
    """Rows ``[start, start + rows)`` are tokens ``[past, past + rows)`` of the sequence on these pages."""

    _fields_ = [("start", c_int64), ("rows", c_int64), ("past", c_int64), ("pages", c_void_p)]


class StackArguments(Structure):
    """Sizes, and what a step brings: rows, angles, places in the cache, adapters."""

    _fields_ = [
        *((name, c_int64) for name in (
            "num_layers", "rows", "hidden", "heads", "kv_heads", "head_dim", "inner", "page_size", "pages_width",
            "level", "num_spans", "first_decode", "num_s", "num_packed",
        )),
        *((name, c_void_p) for name in (
            "x", "y", "cosines", "sines", "cache_rows", "spans", "pages", "positions", "work", "last_norm",
        )),
        ("last_epsilon", c_double),
        ("pieces", c_void_p),
        ("longs", c_void_p),
        ("by_gemm", c_void_p),
        ("w_dtype", c_int64),
        ("one_plus", c_int64),
        ("activation", c_int64),
    ]  # fmt: skip


class Pieces(NamedTuple):
    """Adapters of one layout of segments, cut into shares; addresses in it are good while the weights live."""

    pieces: Any
    longs: Any
    by_gemm: Any
    num_s: int
    """Float32 numbers that C needs to keep S of one GEMM."""
    num_packed: int
    """Bfloat16 numbers that it needs for one GEMM's long segments: packed factors and S."""
    dtype: torch.dtype
    """Of the adapters' weights."""


class NativeStack:
    """Bfloat16 rows, packed weights, adapters of either dtype."""

    def __init__(self, library: NativeLibrary) -> None:
        self._work = library.function("lq_stack_work", c_void_p, restype=c_int64)
        self._run = library.function("lq_decode_stack", c_void_p, c_void_p, restype=c_int32)
        self._cut = library.function("lq_delta_pieces", c_void_p, *(c_int64,) * 4, *(c_void_p,) * 4)

    def cut(self, deltas_D7: np.ndarray[Any, Any], num_gemms: int, dtype: torch.dtype, *, tiles: bool) -> Pieces:
        """Shares of these deltas, whose weights have `dtype`.

        `deltas_D7`: int64, ascending by the GEMM's number: that, the addresses of its segments' table and of their
        scales, their count, first column and width in y, width of x (`LqDelta`).

        `tiles`: the machine has AMX, and segments of 32 rows or more run on it (rank 512 and whole lines at most).
        """
        assert deltas_D7.dtype == np.int64 and deltas_D7.flags.c_contiguous and deltas_D7.shape[1:] == (7,)
        by_gemm, sizes = (c_int64 * (5 * num_gemms))(), (c_int64 * 4)()
        where = (deltas_D7.ctypes.data, len(deltas_D7), num_gemms, dtype.itemsize, tiles)
        self._cut(*where, None, None, by_gemm, sizes)
        pieces, longs = (PieceArguments * sizes[0])(), (LongArguments * sizes[2])()
        self._cut(*where, pieces, longs, by_gemm, sizes)
        return Pieces(pieces, longs, by_gemm, sizes[1], sizes[3], dtype)

    def work_bytes(self, arguments: StackArguments) -> int:
        """Bytes that `arguments.work` must point to."""
        return int(self._work(byref(arguments)))

    def __call__(self, arguments: StackArguments, layers: Any) -> None:
        """Run. `layers` is an array of `LayerArguments`. Raises MemoryError."""
        if self._run(byref(arguments), layers):
            raise MemoryError(f"no memory for a step of {arguments.rows} rows")
