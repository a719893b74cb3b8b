"""What a decoder layer does between its GEMMs: residual add and RMSNorm, rotary, SwiGLU; here on the C library.

All of them round where Hugging Face's eager code does. No autograd. The C library takes CPU tensors of one dtype,
float32 or bfloat16; elements of a row lie side by side.
"""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Protocol

from torch import Tensor

from loquetier.kernels.native import DTYPE_CODES, NativeLibrary


class RowKernels(Protocol):
    """The operations, whatever they run on; `RowOps` says what each does."""

    def rms_norm(self, x_MD: Tensor, weight_D: Tensor, epsilon: float, y_MD: Tensor, delta_MD: Tensor | None) -> None:
        """Residual add and norm."""
        ...

    def head_norm(self, x_MN: Tensor, first: int, heads: int, weight_D: Tensor, epsilon: float) -> None:
        """The norm of some heads, in place."""
        ...

    def rotary_and_write(
        self, x_MN: Tensor, cos_MD: Tensor, sin_MD: Tensor, heads: int, kv_heads: int, to: tuple[Tensor, ...] | None
    ) -> bool:
        """Rotate Q and K of rows ``[Q | K | V]`` in place and, where that is one kernel, write K and V to their cache.

        Args:
            to: keys and values of a layer's cache, and the flat position there of each of the last rows; None: no row
                goes to a cache.

        Returns:
            Whether K and V are written.
        """
        ...

    def swiglu(self, gate_up_MN: Tensor, y_MK: Tensor) -> None:
        """The gated activation."""
        ...


class RowOps:
    """The three operations of one library."""

    def __init__(self, library: NativeLibrary) -> None:
        self._rms_norm = library.function("lq_rms_norm", *(c_void_p,) * 4, *(c_int64,) * 5, c_float, c_int32)
        self._rotary = library.function("lq_rotary", *(c_void_p,) * 3, *(c_int64,) * 4, c_int32)
        self._swiglu = library.function("lq_swiglu", *(c_void_p,) * 3, *(c_int64,) * 3, c_int32)

    def rms_norm(self, x_MD: Tensor, weight_D: Tensor, epsilon: float, y_MD: Tensor, delta_MD: Tensor | None) -> None:
        """``x += delta`` in place (if given), then ``y = weight * x / sqrt(mean(x^2) + epsilon)``."""
        rows, dim = x_MD.shape
        self._rms_norm(
            x_MD.data_ptr(), None if delta_MD is None else delta_MD.data_ptr(), weight_D.data_ptr(), y_MD.data_ptr(),
            rows, 1, dim, x_MD.stride(0), y_MD.stride(0), epsilon, DTYPE_CODES[x_MD.dtype],
        )  # fmt: skip

    def head_norm(self, x_MN: Tensor, first: int, heads: int, weight_D: Tensor, epsilon: float) -> None:
        """RMSNorm in place of each of `heads` heads that begin at column `first` of each row."""
        at = x_MN.data_ptr() + first * x_MN.element_size()
        self._rms_norm(
            at, None, weight_D.data_ptr(), at, len(x_MN), heads, weight_D.numel(), x_MN.stride(0), x_MN.stride(0),
            epsilon, DTYPE_CODES[x_MN.dtype],
        )  # fmt: skip

    def rotary(self, x_MN: Tensor, cos_MD: Tensor, sin_MD: Tensor, heads: int) -> None:
        """Rotate the first `heads` heads of each row in place: ``x * cos + rotate_half(x) * sin``."""
        self._rotary(
            x_MN.data_ptr(), cos_MD.data_ptr(), sin_MD.data_ptr(), len(x_MN), heads, cos_MD.shape[1], x_MN.stride(0),
            DTYPE_CODES[x_MN.dtype],
        )  # fmt: skip

    def rotary_and_write(
        self, x_MN: Tensor, cos_MD: Tensor, sin_MD: Tensor, heads: int, kv_heads: int, to: tuple[Tensor, ...] | None
    ) -> bool:
        """`rotary` of Q and K, which lie side by side; nothing is written."""
        self.rotary(x_MN, cos_MD, sin_MD, heads + kv_heads)
        return False

    def swiglu(self, gate_up_MN: Tensor, y_MK: Tensor) -> None:
        """``y = silu(gate) * up``, gate being the first half of each row and up the second."""
        inner = y_MK.shape[1]
        gate = gate_up_MN.data_ptr()
        self._swiglu(
            gate, gate + inner * gate_up_MN.element_size(), y_MK.data_ptr(), len(y_MK), inner, gate_up_MN.stride(0),
            DTYPE_CODES[y_MK.dtype],
        )  # fmt: skip
