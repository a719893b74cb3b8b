"""What a decoder layer does between its GEMMs, in C: residual add and RMSNorm, rotary and KV write, gated activation.

All of them round where Hugging Face's eager code does. No autograd. The C library takes CPU tensors of one dtype,
float32 or bfloat16; elements of a row lie side by side.
"""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from loquetier.kernels.kv_write import NativeKvWrite
from loquetier.kernels.native import DTYPE_CODES, NativeLibrary

SILU: Final = 0
GELU_TANH: Final = 1
"""Activations of a gated linear: x * sigmoid(x); gelu in its tanh form. The numbers are those of the kernels."""


@dataclass(frozen=True, slots=True)
class Norm:
    """``w * x / sqrt(mean(x^2) + epsilon)``; w is the weight, or 1 + weight in Gemma's form, which rounds once."""

    weight_D: Tensor
    epsilon: float
    one_plus: bool = False


class RowKernels(Protocol):
    """The operations, whatever they run on; `RowOps` says what each does."""

    def rms_norm(
        self, x_MD: Tensor, norm: Norm, y_MD: Tensor, delta_MD: Tensor | None, post: Norm | None = None
    ) -> None:
        """Residual add and norm."""
        ...

    def head_norm(self, x_MN: Tensor, first: int, heads: int, norm: Norm) -> None:
        """The norm of some heads, in place."""
        ...

    def rotary_and_write(
        self,
        x_MN: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        heads: int,
        kv_heads: int,
        to: tuple[Tensor, ...] | None,
    ) -> bool:
        """Rotate Q and K of rows ``[Q | K | V]`` in place and write K and V to their cache, in one kernel.

        Args:
            angles: cos and sin ``[M, D]``; None: nothing turns.
            to: keys and values of a layer's cache, and the flat position there of each of the last rows; None: no row
                goes to a cache.

        Returns:
            Whether K and V are written.
        """
        ...

    def gated(self, gate_up_MN: Tensor, y_MK: Tensor, activation: int) -> None:
        """The gated activation."""
        ...


class RowOps:
    """The operations of one library."""

    def __init__(self, library: NativeLibrary) -> None:
        self._rms_norm = library.function(
            "lq_rms_norm", *(c_void_p,) * 5, *(c_int64,) * 5, c_float, c_float, c_int32, c_int32
        )
        self._rotary = library.function("lq_rotary", *(c_void_p,) * 3, *(c_int64,) * 4, c_int32)
        self._gated = library.function("lq_gated", *(c_void_p,) * 3, *(c_int64,) * 3, c_int32, c_int32)
        self._kv_write = NativeKvWrite(library)

    def rms_norm(
        self, x_MD: Tensor, norm: Norm, y_MD: Tensor, delta_MD: Tensor | None, post: Norm | None = None
    ) -> None:
        """``x += delta`` in place (if given; through `post` first where that is one), then ``y = norm(x)``."""
        assert post is None or (delta_MD is not None and post.one_plus == norm.one_plus)
        rows, dim = x_MD.shape
        self._rms_norm(
            x_MD.data_ptr(), None if delta_MD is None else delta_MD.data_ptr(),
            None if post is None else post.weight_D.data_ptr(), norm.weight_D.data_ptr(), y_MD.data_ptr(),
            rows, 1, dim, x_MD.stride(0), y_MD.stride(0), 0.0 if post is None else post.epsilon, norm.epsilon,
            norm.one_plus, DTYPE_CODES[x_MD.dtype],
        )  # fmt: skip

    def head_norm(self, x_MN: Tensor, first: int, heads: int, norm: Norm) -> None:
        """RMSNorm in place of each of `heads` heads that begin at column `first` of each row."""
        at = x_MN.data_ptr() + first * x_MN.element_size()
        self._rms_norm(
            at, None, None, norm.weight_D.data_ptr(), at, len(x_MN), heads, norm.weight_D.numel(), x_MN.stride(0),
            x_MN.stride(0), 0.0, norm.epsilon, norm.one_plus, DTYPE_CODES[x_MN.dtype],
        )  # fmt: skip

    def rotary(self, x_MN: Tensor, cos_MD: Tensor, sin_MD: Tensor, heads: int) -> None:
        """Rotate the first `heads` heads of each row in place: ``x * cos + rotate_half(x) * sin``."""
        self._rotary(
            x_MN.data_ptr(), cos_MD.data_ptr(), sin_MD.data_ptr(), len(x_MN), heads, cos_MD.shape[1], x_MN.stride(0),
            DTYPE_CODES[x_MN.dtype],
        )  # fmt: skip

    def rotary_and_write(
        self,
        x_MN: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        heads: int,
        kv_heads: int,
        to: tuple[Tensor, ...] | None,
    ) -> bool:
        """As `RowKernels` has it."""
        if to is None:
            if angles is not None:
                self.rotary(x_MN, *angles, heads + kv_heads)  # Q and K lie side by side
            return False
        dim = x_MN.shape[1] // (heads + 2 * kv_heads)
        q, k, v = torch.split(x_MN.view(len(x_MN), heads + 2 * kv_heads, dim), [heads, kv_heads, kv_heads], dim=1)
        self._kv_write(q, k, v, angles, to)
        return True

    def gated(self, gate_up_MN: Tensor, y_MK: Tensor, activation: int) -> None:
        """``y = act(gate) * up``, gate being the first half of each row and up the second."""
        inner = y_MK.shape[1]
        gate = gate_up_MN.data_ptr()
        self._gated(
            gate, gate + inner * gate_up_MN.element_size(), y_MK.data_ptr(), len(y_MK), inner, gate_up_MN.stride(0),
            activation, DTYPE_CODES[y_MK.dtype],
        )  # fmt: skip

    def gated_pair(self, gate_MK: Tensor, up_MK: Tensor, activation: int) -> Tensor:
        """The same of two matrices ``[M, K]`` whose rows lie equally far apart -> contiguous ``[M, K]``."""
        assert gate_MK.stride() == up_MK.stride() and gate_MK.shape == up_MK.shape
        y_MK = gate_MK.new_empty(gate_MK.shape)
        self._gated(
            gate_MK.data_ptr(), up_MK.data_ptr(), y_MK.data_ptr(), len(y_MK), y_MK.shape[1], gate_MK.stride(0),
            activation, DTYPE_CODES[y_MK.dtype],
        )  # fmt: skip
        return y_MK
