"""Backward of what a decoder layer does between its GEMMs, on the C library. No autograd: callers keep the inputs.

Tensors are CPU tensors of one dtype, float32 or bfloat16; elements of a row lie side by side.
"""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p

from torch import Tensor

from loquetier.kernels.native import DTYPE_CODES, NativeLibrary
from loquetier.kernels.rowops import Norm


class RowGrads:
    """The backwards of one library."""

    def __init__(self, library: NativeLibrary) -> None:
        self._norm = library.function(
            "lq_rms_norm_backward", *(c_void_p,) * 6, *(c_int64,) * 6, c_float, c_int32, c_int32
        )
        self._rotary = library.function("lq_rotary_backward", *(c_void_p,) * 3, *(c_int64,) * 4, c_int32)
        self._gated = library.function("lq_gated_backward", *(c_void_p,) * 6, *(c_int64,) * 5, c_int32, c_int32)

    def rms_norm(
        self,
        x_TD: Tensor,
        norm: Norm,
        dy_TD: Tensor,
        dx_TD: Tensor,
        *,
        more_TD: Tensor | None = None,
        y_TD: Tensor | None = None,
    ) -> None:
        """Gradient of ``norm(x)``, plus `more_TD` (as far between rows as `dx_TD`).

        `dx_TD` may be `dy_TD`, `more_TD` may be `dx_TD`. `y_TD`, contiguous, gets the forward's output again.
        """
        assert more_TD is None or more_TD.stride() == dx_TD.stride()
        self._norm(
            x_TD.data_ptr(), norm.weight_D.data_ptr(), dy_TD.data_ptr(),
            None if more_TD is None else more_TD.data_ptr(), dx_TD.data_ptr(),
            None if y_TD is None else y_TD.data_ptr(), len(x_TD), 1, x_TD.shape[1], x_TD.stride(0), dy_TD.stride(0),
            dx_TD.stride(0), norm.epsilon, norm.one_plus, DTYPE_CODES[x_TD.dtype],
        )  # fmt: skip

    def head_norm(self, x_TN: Tensor, first: int, heads: int, norm: Norm, dy_TN: Tensor) -> None:
        """The same in place of `dy_TN` for `heads` heads that begin at column `first`; x and dy have one width."""
        at = first * x_TN.element_size()
        dy = dy_TN.data_ptr() + at
        self._norm(
            x_TN.data_ptr() + at, norm.weight_D.data_ptr(), dy, None, dy, None, len(x_TN), heads,
            norm.weight_D.numel(), x_TN.stride(0), dy_TN.stride(0), dy_TN.stride(0), norm.epsilon, norm.one_plus,
            DTYPE_CODES[x_TN.dtype],
        )  # fmt: skip

    def rotary(self, dx_TN: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: int) -> None:
        """Gradient of `RowOps.rotary`, in place on that of its output."""
        self._rotary(
            dx_TN.data_ptr(), cos_TD.data_ptr(), sin_TD.data_ptr(), len(dx_TN), heads, cos_TD.shape[1],
            dx_TN.stride(0), DTYPE_CODES[dx_TN.dtype],
        )  # fmt: skip

    def gated(
        self, gate_up_TN: Tensor, dy_TK: Tensor, dgate_up_TN: Tensor, activation: int, y_TK: Tensor | None = None
    ) -> None:
        """Gradients of ``act(gate) * up``, gate being the first half of each row and up the second.

        `y_TK`, contiguous, gets the output again, rounded as the forward rounds.
        """
        inner = dy_TK.shape[1]
        assert gate_up_TN.shape == dgate_up_TN.shape == (len(dy_TK), 2 * inner)
        up = inner * dy_TK.element_size()
        gate, dgate = gate_up_TN.data_ptr(), dgate_up_TN.data_ptr()
        self._gated(
            gate, gate + up, dy_TK.data_ptr(), dgate, dgate + up, None if y_TK is None else y_TK.data_ptr(),
            len(dy_TK), inner, gate_up_TN.stride(0), dy_TK.stride(0), dgate_up_TN.stride(0), activation,
            DTYPE_CODES[dy_TK.dtype],
        )  # fmt: skip

    def gated_pair(self, gate_TK: Tensor, up_TK: Tensor, dy_TK: Tensor, activation: int) -> tuple[Tensor, Tensor]:
        """The same of two matrices whose rows lie equally far apart; gradients are contiguous."""
        assert gate_TK.stride() == up_TK.stride() and gate_TK.shape == up_TK.shape == dy_TK.shape
        rows, inner = dy_TK.shape
        dgate_TK, dup_TK = dy_TK.new_empty((2, rows, inner))
        self._gated(
            gate_TK.data_ptr(), up_TK.data_ptr(), dy_TK.data_ptr(), dgate_TK.data_ptr(), dup_TK.data_ptr(), None,
            rows, inner, gate_TK.stride(0), dy_TK.stride(0), inner, activation, DTYPE_CODES[dy_TK.dtype],
        )  # fmt: skip
        return dgate_TK, dup_TK
