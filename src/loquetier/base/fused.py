"""The decoder stack of steps without training rows, with the small operations fused: no Hugging Face code per layer.

At one row an eager layer spends more time in the code around its GEMMs than in them. Where a stack has the common shape
(pre-norm, perhaps a norm behind each half too, q/k/v/o, optional q/k norms, rotary on whole heads, a gated activation)
this runs the same arithmetic with the kernels of `kernels.rowops` (C) or `kernels.triton_rows`. "Verify, then swap": it
is used only if every layer gives the model's own output on the rows of a probe, see `base.fuse`; and only for steps
that record nothing: `base.fused_train` has a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loquetier.base.attention import STEP_KEYWORD, WRITTEN_KEYWORD, place_of, unified_attention
from loquetier.base.context import StepContext
from loquetier.base.linear import LinearGroup
from loquetier.kernels.attention import MaskRule
from loquetier.kernels.rowops import Norm, RowKernels

_ANGLE_BLOCK = 1024
"""Positions by which the tables of angles grow: a position's angles depend on nothing else (`base.support`)."""


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One decoder layer's parts, by what they do."""

    norm: Norm
    qkv: LinearGroup
    q_norm: Norm | None
    k_norm: Norm | None
    attention: nn.Module
    attention_kwargs: dict[str, Any]
    """What the model passes to the attention function for this layer: scaling, window, ..."""
    angles: int | None
    """Which of the stack's angles; None: nothing turns."""
    o: LinearGroup
    o_norm: Norm | None
    """Of what the attention adds, before it is added."""
    mlp_norm: Norm
    gate_up: LinearGroup
    down: LinearGroup
    down_norm: Norm | None

    @property
    def attention_rule(self) -> tuple[float, MaskRule]:
        """Scale of the scores, and what a query sees."""
        kwargs = self.attention_kwargs
        return kwargs["scaling"], MaskRule(kwargs.get("sliding_window"), kwargs.get("softcap"))


class FusedStack:
    """Embedding, layers and last norm.

    Args:
        embedding: token ids to hidden states; rotaries: each ``(x, position_ids) -> (cos, sin)``; the model's own.
        heads, kv_heads, head_dim: of every layer. activation: one of `rowops`.
    """

    def __init__(
        self,
        ops: RowKernels,
        embedding: nn.Module,
        rotaries: Sequence[Callable[..., Any]],
        layers: list[FusedLayer],
        last_norm: Norm,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        activation: int,
    ) -> None:
        self._ops, self._embedding, self._rotaries = ops, embedding, tuple(rotaries)
        self.layers, self.last_norm = layers, last_norm
        self.heads, self.kv_heads, self.head_dim, self.activation = heads, kv_heads, head_dim, activation
        self._cosines = self._sines = torch.empty(len(self._rotaries), 0, head_dim)

    def embed(self, ids_M: Tensor) -> Tensor:
        """``[M] -> [M, D]``, memory of its own."""
        out: Tensor = self._embedding(ids_M)
        return out

    def angles(self, hidden_MD: Tensor, positions_M: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rows' positions, ``[A, M, head_dim]`` each, by the model's own code (CPU: from tables).

        A: the kinds of angles that its layers use.
        """
        if positions_M.device.type != "cpu":  # asking for the largest would wait for the device, and cannot be captured
            return self._own_angles(hidden_MD, positions_M)
        most = int(positions_M.max())
        if most >= self._cosines.shape[1] or self._cosines.dtype != hidden_MD.dtype:
            count = -(-(most + 1) // _ANGLE_BLOCK) * _ANGLE_BLOCK
            self._cosines, self._sines = self._own_angles(hidden_MD, torch.arange(count))
        return self._cosines.index_select(1, positions_M), self._sines.index_select(1, positions_M)

    def _own_angles(self, hidden_MD: Tensor, positions_P: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [rotary(hidden_MD[None], position_ids=positions_P[None]) for rotary in self._rotaries]
        if len(pairs) == 1:
            return pairs[0][0].contiguous(), pairs[0][1].contiguous()
        return torch.cat([cos for cos, _ in pairs]), torch.cat([sin for _, sin in pairs])

    def __call__(self, ids_M: Tensor, positions_M: Tensor, step: StepContext) -> Tensor:
        """Final hidden states ``[M, D]`` after the last norm. No autograd."""
        with torch.no_grad():
            hidden_MD = self.embed(ids_M)
            angles = self.angles(hidden_MD, positions_M)
            delta_MD = post = None
            for layer in self.layers:
                delta_MD = self.run_layer(layer, hidden_MD, delta_MD, post, angles, step)
                post = layer.down_norm
            out_MD = torch.empty_like(hidden_MD)
            self._ops.rms_norm(hidden_MD, self.last_norm, out_MD, delta_MD, post)
        return out_MD

    def run_layer(
        self,
        layer: FusedLayer,
        hidden_MD: Tensor,
        delta_MD: Tensor | None,
        post: Norm | None,
        angles: tuple[Tensor, Tensor],
        step: StepContext,
    ) -> Tensor:
        """One layer. `hidden_MD` plus `delta_MD` (through the norm `post`) is its input; adds to `hidden_MD` in place.

        Returns the rest of its output as the next delta, still before `layer.down_norm`, so that the addition is done
        where the next norm reads.
        """
        ops = self._ops
        x_MD = torch.empty_like(hidden_MD)
        ops.rms_norm(hidden_MD, layer.norm, x_MD, delta_MD, post)
        out_MN = self._attend(layer, layer.qkv.apply(x_MD), angles, step)
        ops.rms_norm(hidden_MD, layer.mlp_norm, x_MD, layer.o.apply(out_MN), layer.o_norm)
        gate_up_MN = layer.gate_up.apply(x_MD)
        inner_MK = x_MD.new_empty((len(x_MD), gate_up_MN.shape[1] // 2))
        ops.gated(gate_up_MN, inner_MK, self.activation)
        return layer.down.apply(inner_MK)

    def _attend(self, layer: FusedLayer, qkv_MN: Tensor, angles: tuple[Tensor, Tensor], step: StepContext) -> Tensor:
        heads, kv_heads, dim = self.heads, self.kv_heads, self.head_dim
        if layer.q_norm is not None:
            self._ops.head_norm(qkv_MN, 0, heads, layer.q_norm)
        if layer.k_norm is not None:
            self._ops.head_norm(qkv_MN, heads * dim, kv_heads, layer.k_norm)
        rows_1HMD = qkv_MN.view(1, len(qkv_MN), heads + 2 * kv_heads, dim).transpose(1, 2)
        q, k, v = torch.split(rows_1HMD, [heads, kv_heads, kv_heads], dim=1)
        to = place_of(layer.attention, q[0], step)
        written = self._ops.rotary_and_write(qkv_MN, of_kind(angles, layer.angles), heads, kv_heads, to)
        kwargs = {**layer.attention_kwargs, STEP_KEYWORD: step, WRITTEN_KEYWORD: written}
        out_1MHD, _ = unified_attention(layer.attention, q, k, v, None, **kwargs)
        return out_1MHD.reshape(len(qkv_MN), heads * dim)


def of_kind(angles: tuple[Tensor, Tensor], kind: int | None) -> tuple[Tensor, Tensor] | None:
    """cos and sin ``[M, D]`` of the layers of one kind, of those of all kinds ``[A, M, D]``."""
    return None if kind is None else (angles[0][kind], angles[1][kind])
