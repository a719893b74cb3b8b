"""The decoder stack of steps without training rows, with the small operations fused: no Hugging Face code per layer.

At one row an eager layer spends more time in the code around its GEMMs than in them. Where a stack has the common shape
(pre-norm, q/k/v/o, optional q/k norms, rotary on whole heads, SwiGLU) this runs the same arithmetic with the kernels
of `kernels.rowops` (C) or `kernels.triton_rows`. "Verify, then swap": it is used only if every layer gives the model's
own output on the rows of a probe, see `base.fuse`; and only for steps that record nothing, so training always runs the
model's own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loquetier.base.attention import STEP_KEYWORD, WRITTEN_KEYWORD, unified_attention
from loquetier.base.context import StepContext
from loquetier.base.linear import LinearGroup
from loquetier.kernels.attention import MaskRule
from loquetier.kernels.decode import reads_written_tokens_only
from loquetier.kernels.rowops import RowKernels

_ANGLE_BLOCK = 1024
"""Positions by which the tables of angles grow: a position's angles depend on nothing else (`base.support`)."""


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm's parameters."""

    weight_D: Tensor
    epsilon: float


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
    o: LinearGroup
    mlp_norm: Norm
    gate_up: LinearGroup
    down: LinearGroup

    @property
    def attention_rule(self) -> tuple[float, MaskRule]:
        """Scale of the scores, and what a query sees."""
        kwargs = self.attention_kwargs
        return kwargs["scaling"], MaskRule(kwargs.get("sliding_window"), kwargs.get("softcap"))


class FusedStack:
    """Embedding, layers and last norm.

    Args:
        embedding: token ids to hidden states; rotary: ``(x, position_ids) -> (cos, sin)``; both the model's own.
        heads, kv_heads, head_dim: of every layer.
    """

    def __init__(
        self,
        ops: RowKernels,
        embedding: nn.Module,
        rotary: nn.Module,
        layers: list[FusedLayer],
        last_norm: Norm,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        self._ops, self._embedding, self._rotary = ops, embedding, rotary
        self.layers, self.last_norm = layers, last_norm
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self._cosines = self._sines = torch.empty(0, head_dim)

    def embed(self, ids_M: Tensor) -> Tensor:
        """``[M] -> [M, D]``, memory of its own."""
        out: Tensor = self._embedding(ids_M)
        return out

    def angles(self, hidden_MD: Tensor, positions_M: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rows' positions, ``[M, head_dim]`` each, by the model's own code (CPU: from tables)."""
        if positions_M.device.type != "cpu":  # asking for the largest would wait for the device, and cannot be captured
            cos_1MD, sin_1MD = self._rotary(hidden_MD[None], position_ids=positions_M[None])
            return cos_1MD[0], sin_1MD[0]
        most = int(positions_M.max())
        if most >= len(self._cosines) or self._cosines.dtype != hidden_MD.dtype:
            count = -(-(most + 1) // _ANGLE_BLOCK) * _ANGLE_BLOCK
            cos_1PD, sin_1PD = self._rotary(hidden_MD[None], position_ids=torch.arange(count)[None])
            self._cosines, self._sines = cos_1PD[0].contiguous(), sin_1PD[0].contiguous()
        return self._cosines.index_select(0, positions_M), self._sines.index_select(0, positions_M)

    def __call__(self, ids_M: Tensor, positions_M: Tensor, step: StepContext) -> Tensor:
        """Final hidden states ``[M, D]`` after the last norm. No autograd."""
        with torch.no_grad():
            hidden_MD = self.embed(ids_M)
            angles = self.angles(hidden_MD, positions_M)
            delta_MD = None
            for layer in self.layers:
                delta_MD = self.run_layer(layer, hidden_MD, delta_MD, angles, step)
            out_MD = torch.empty_like(hidden_MD)
            norm = self.last_norm
            self._ops.rms_norm(hidden_MD, norm.weight_D, norm.epsilon, out_MD, delta_MD)
        return out_MD

    def run_layer(
        self,
        layer: FusedLayer,
        hidden_MD: Tensor,
        delta_MD: Tensor | None,
        angles: tuple[Tensor, Tensor],
        step: StepContext,
    ) -> Tensor:
        """One layer. `hidden_MD` plus `delta_MD` is its input; adds to `hidden_MD` in place and returns the rest of
        its output as the next delta, so that the addition is done where the next norm reads."""
        ops = self._ops
        x_MD = torch.empty_like(hidden_MD)
        ops.rms_norm(hidden_MD, layer.norm.weight_D, layer.norm.epsilon, x_MD, delta_MD)
        out_MN = self._attend(layer, layer.qkv.apply(x_MD), angles, step)
        ops.rms_norm(hidden_MD, layer.mlp_norm.weight_D, layer.mlp_norm.epsilon, x_MD, layer.o.apply(out_MN))
        gate_up_MN = layer.gate_up.apply(x_MD)
        inner_MK = x_MD.new_empty((len(x_MD), gate_up_MN.shape[1] // 2))
        ops.swiglu(gate_up_MN, inner_MK)
        return layer.down.apply(inner_MK)

    def _attend(self, layer: FusedLayer, qkv_MN: Tensor, angles: tuple[Tensor, Tensor], step: StepContext) -> Tensor:
        heads, kv_heads, dim = self.heads, self.kv_heads, self.head_dim
        if layer.q_norm is not None:
            self._ops.head_norm(qkv_MN, 0, heads, layer.q_norm.weight_D, layer.q_norm.epsilon)
        if layer.k_norm is not None:
            self._ops.head_norm(qkv_MN, heads * dim, kv_heads, layer.k_norm.weight_D, layer.k_norm.epsilon)
        rows_1HMD = qkv_MN.view(1, len(qkv_MN), heads + 2 * kv_heads, dim).transpose(1, 2)
        q, k, v = torch.split(rows_1HMD, [heads, kv_heads, kv_heads], dim=1)
        to = _cache_of(layer, q[0], step)
        written = self._ops.rotary_and_write(qkv_MN, *angles, heads, kv_heads, to)
        kwargs = {**layer.attention_kwargs, STEP_KEYWORD: step, WRITTEN_KEYWORD: written}
        out_1MHD, _ = unified_attention(layer.attention, q, k, v, None, **kwargs)
        return out_1MHD.reshape(len(qkv_MN), heads * dim)


def _cache_of(layer: FusedLayer, q_HMD: Tensor, step: StepContext) -> tuple[Tensor, Tensor, Tensor] | None:
    """Where K and V of the step's last rows go, if the attention needs no page cleared before they are written."""
    if step.cache is None or step.cache_rows is None or step.cache_start >= step.num_rows:
        return None
    number = int(layer.attention.layer_idx)  # type: ignore[arg-type]
    keys = step.cache.keys[number]
    return (keys, step.cache.values[number], step.cache_rows) if reads_written_tokens_only(q_HMD, keys) else None
