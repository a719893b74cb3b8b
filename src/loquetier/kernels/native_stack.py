"""The structures of ``csrc/stack.c`` and its two functions."""

from __future__ import annotations

from ctypes import Structure, byref, c_double, c_int32, c_int64, c_void_p
from typing import Any

from loquetier.kernels.native import NativeLibrary


class LayerArguments(Structure):
    """Addresses and numbers of one layer that are the same at every step."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias", "mlp_norm", "gate_up", "gate_up_bias",
            "down", "down_bias", "keys", "values",
        )),
        ("window", c_int64),
        *((name, c_double) for name in (
            "norm_epsilon", "q_epsilon", "k_epsilon", "mlp_epsilon", "scale", "softcap",
        )),
    ]  # fmt: skip


class DeltaArguments(Structure):
    """Adapters on columns ``[first, first + width)`` of GEMM number `gemm`, of which a layer has four."""

    _fields_ = [
        ("gemm", c_int64),
        ("segments", c_void_p),
        ("scales", c_void_p),
        ("count", c_int64),
        ("first", c_int64),
        ("width", c_int64),
    ]


class StackArguments(Structure):
    """Sizes, and what a step brings: rows, angles, places in the cache, adapters."""

    _fields_ = [
        *((name, c_int64) for name in (
            "num_layers", "rows", "hidden", "heads", "kv_heads", "head_dim", "inner", "page_size", "pages_width",
            "level", "num_deltas",
        )),
        *((name, c_void_p) for name in (
            "x", "y", "cosines", "sines", "cache_rows", "pages", "positions", "work", "last_norm",
        )),
        ("last_epsilon", c_double),
        ("deltas", c_void_p),
    ]  # fmt: skip


class NativeStack:
    """Bfloat16 rows, packed weights, float32 adapters."""

    def __init__(self, library: NativeLibrary) -> None:
        self._work = library.function("lq_stack_work", c_void_p, restype=c_int64)
        self._run = library.function("lq_decode_stack", c_void_p, c_void_p, restype=c_int32)

    def work_elements(self, arguments: StackArguments) -> int:
        """Bfloat16 elements that `arguments.work` must point to."""
        return int(self._work(byref(arguments)))

    def __call__(self, arguments: StackArguments, layers: Any) -> None:
        """Run. `layers` is an array of `LayerArguments`. Raises MemoryError."""
        if self._run(byref(arguments), layers):
            raise MemoryError(f"no memory for a decode step of {arguments.rows} rows")
