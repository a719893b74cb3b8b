"""Norms, rotary and gated activations on the Triton kernels. No autograd here: `base.kernel_rows` has it."""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from loquetier.kernels import triton_rows_kernels as kernels
from loquetier.kernels.rowops import Norm
from loquetier.kernels.triton_load import TYPES
from loquetier.kernels.triton_plan import next_power
from loquetier.kernels.triton_smlm import side_by_side

WIDEST_NORM: Final = 32768
"""Elements of a row that one program holds."""
_GATED_BLOCK: Final = 1024


class TritonRowOps:
    """`rowops.RowOps` on a GPU, with the KV write in rotary. Elements of a row lie side by side."""

    def rms_norm(
        self, x_MD: Tensor, norm: Norm, y_MD: Tensor, delta_MD: Tensor | None, post: Norm | None = None
    ) -> None:
        """``x += delta`` in place (if given; through `post` first where that is one), then ``y = norm(x)``."""
        if post is not None and delta_MD is not None:
            delta_MD = rms_norm(delta_MD, post.weight_D, post.epsilon, one_plus=post.one_plus)
        delta = x_MD if delta_MD is None else delta_MD
        _norm(
            x_MD, delta, norm.weight_D, y_MD, len(x_MD), 1, x_MD.shape[1], norm.epsilon, add=delta_MD is not None,
            one_plus=norm.one_plus,
        )  # fmt: skip

    def head_norm(self, x_MN: Tensor, first: int, heads: int, norm: Norm) -> None:
        """RMSNorm in place of each of `heads` heads that begin at column `first` of each row."""
        part = x_MN[:, first:]
        _norm(
            part, part, norm.weight_D, part, len(x_MN), heads, norm.weight_D.numel(), norm.epsilon,
            one_plus=norm.one_plus,
        )  # fmt: skip

    def rotary(self, x_MN: Tensor, cos_MD: Tensor, sin_MD: Tensor, heads: int) -> None:
        """Rotate the first `heads` heads of each row in place."""
        _rotate(x_MN, cos_MD, sin_MD, heads, 0, None)

    def rotary_and_write(
        self,
        x_MN: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        heads: int,
        kv_heads: int,
        to: tuple[Tensor, ...] | None,
    ) -> bool:
        """Rotate Q and K of ``[Q | K | V]`` in place and write K and V of the last rows to their cache.

        Args:
            angles: cos and sin ``[M, D]``; None: nothing turns, and nothing is written.
            to: K and V of one layer's cache, the flat cache position of each of the last rows, or None for no write.

        Returns:
            Whether K and V are written.
        """
        if angles is None:
            return False
        _rotate(x_MN, *angles, heads, kv_heads, to)
        return to is not None

    def gated(self, gate_up_MN: Tensor, y_MK: Tensor, activation: int) -> None:
        """``y = act(gate) * up``, gate being the first half of each row and up the second."""
        inner = y_MK.shape[1]
        gated(gate_up_MN[:, :inner], gate_up_MN[:, inner:], y_MK, activation)


def rms_norm(x_MD: Tensor, weight_D: Tensor, epsilon: float, *, one_plus: bool) -> Tensor:
    """``[M, D]`` of its own; `one_plus` is Gemma's form."""
    x_MD = side_by_side(x_MD)
    y_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype, device=x_MD.device)
    _norm(x_MD, x_MD, weight_D, y_MD, len(x_MD), 1, x_MD.shape[1], epsilon, one_plus=one_plus)
    return y_MD


def rms_norm_backward(x_MD: Tensor, weight_D: Tensor, epsilon: float, dy_MD: Tensor, *, one_plus: bool) -> Tensor:
    """Gradient of x, x being the norm's input; the weight is frozen."""
    x_MD, dy_MD = side_by_side(x_MD), side_by_side(dy_MD)
    dx_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype, device=x_MD.device)
    rows, dim = x_MD.shape
    block = next_power(dim)
    if rows:
        kernels.rms_norm_backward_kernel[(rows,)](
            x_MD, x_MD.stride(0), weight_D, dy_MD, dy_MD.stride(0), dx_MD, dx_MD.stride(0), dim, epsilon,
            ONE_PLUS=one_plus, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return dx_MD


def gated(gate_MK: Tensor, up_MK: Tensor, y_MK: Tensor, activation: int) -> None:
    """``y = act(gate) * up``; `activation` is one of `rowops`."""
    rows, dim = y_MK.shape
    if rows:
        block = min(_GATED_BLOCK, next_power(dim))
        kernels.gated_kernel[(rows, triton.cdiv(dim, block))](
            gate_MK, gate_MK.stride(0), up_MK, up_MK.stride(0), y_MK, y_MK.stride(0), dim,
            ACTIVATION=activation, BLOCK=block,
        )  # fmt: skip


def gated_backward(gate_MK: Tensor, up_MK: Tensor, dy_MK: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    gate_MK, up_MK, dy_MK = side_by_side(gate_MK), side_by_side(up_MK), side_by_side(dy_MK)
    rows, dim = dy_MK.shape
    dgate, dup = (torch.empty((rows, dim), dtype=dy_MK.dtype, device=dy_MK.device) for _ in range(2))
    if rows:
        block = min(_GATED_BLOCK, next_power(dim))
        kernels.gated_backward_kernel[(rows, triton.cdiv(dim, block))](
            gate_MK, gate_MK.stride(0), up_MK, up_MK.stride(0), dy_MK, dy_MK.stride(0), dgate, dup, dim,
            ACTIVATION=activation, BLOCK=block,
        )  # fmt: skip
    return dgate, dup


def takes(dtype: torch.dtype, width: int) -> bool:
    """Whether there are kernels for rows of this type and width."""
    return dtype in TYPES and width <= WIDEST_NORM


def _norm(
    x: Tensor, delta: Tensor, weight_D: Tensor, y: Tensor, rows: int, heads: int, dim: int, epsilon: float,
    *, add: bool = False, one_plus: bool = False,
) -> None:  # fmt: skip
    if rows:
        block = next_power(dim)
        kernels.rms_norm_kernel[(rows * heads,)](
            x, x.stride(0), delta, delta.stride(0), weight_D, y, y.stride(0), heads, dim, epsilon,
            ADD=add, ONE_PLUS=one_plus, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, to: tuple[Tensor, ...] | None) -> None:
    rows, dim = cos.shape
    k_cache, v_cache, cache_rows = to if to is not None else (x, x, x)
    if rows:
        kernels.rotary_kernel[(rows, heads + kv_heads * (1 if to is None else 2))](
            x, x.stride(0), cos, sin, k_cache, v_cache, cache_rows, rows - len(cache_rows), heads, kv_heads,
            DIM=dim, HALF=next_power(dim // 2), WRITE=to is not None, num_warps=1,
        )  # fmt: skip


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
