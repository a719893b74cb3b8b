"""The decoder stack of steps with TRAIN rows, with the small operations fused and the backward written out.

`FusedStack`'s arithmetic, forward and backward, as one autograd node per decoder layer: no Hugging Face code, no graph
inside the layer. Of the TRAIN rows a layer keeps q, k and v, the attention's output, the hidden states between its two
halves, gate and up; norms and the activation run again in the backward. Other rows leave nothing behind. Tapes see what
they see of the model's own layers: cuts, K and V, one gradient edge per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loquetier.base.attention import other_rows
from loquetier.base.context import LayerCall, ReplaySpan, StepContext
from loquetier.base.fused import FusedLayer, FusedStack, of_kind
from loquetier.base.linear import Kept
from loquetier.kernels.native_train_attention import AttentionSpan, NativeTrainAttention, empty_lse, own_spans
from loquetier.kernels.rowgrads import RowGrads
from loquetier.kernels.rowops import Norm, RowOps

Angles = tuple[Tensor, Tensor]
"""cos and sin ``[rows, head_dim]``."""
KV = tuple[Tensor, Tensor]
"""``[rows, K, D]`` each."""


@dataclass(slots=True)
class _Kept:
    """What a layer's backward needs, TRAIN rows only."""

    x_TD: Tensor
    raw_TN: Tensor | None
    """q and k before their norms, where there are such norms."""
    qkv_TN: Tensor
    """Rotated."""
    attended: list[_Attended]
    out_TN: Tensor
    o_TD: Tensor | None
    """What the first half adds before its norm, where there is one behind it."""
    mid_TD: Tensor
    gate_up_TN: Tensor
    down_TD: Tensor | None
    """The same of the second half."""
    angles: Angles | None
    """None: nothing turns."""
    adapters: tuple[Kept, Kept, Kept, Kept]


@dataclass(slots=True)
class _Attended:
    """One call of the attention: some spans, and K and V where these are not the TRAIN rows' own."""

    spans: list[AttentionSpan]
    lse_HT: Tensor
    kv: KV | None = None
    replay: ReplaySpan | None = None


class TrainStack:
    """Embedding, layers and last norm of a step with TRAIN rows.

    Args:
        fused: the verified stack whose layers these are.
    """

    def __init__(self, fused: FusedStack, ops: RowOps, grads: RowGrads, attention: NativeTrainAttention) -> None:
        self.fused, self.ops, self.grads, self.attention = fused, ops, grads, attention

    def __call__(self, ids_M: Tensor, positions_M: Tensor, step: StepContext) -> Tensor:
        """Final hidden states ``[M, D]``; the tape of `step` is told of each layer."""
        cuts = step.cuts
        assert cuts is not None
        with torch.no_grad():
            hidden_1MD = self.fused.embed(ids_M)[None]
            all_angles = self.fused.angles(hidden_1MD[0], positions_M)
        for number, layer in enumerate(self.fused.layers):
            angles = of_kind(all_angles, layer.angles or 0)
            assert angles is not None
            # What the model itself would give its layers: a tape may run one of them again, see `Base.run_layer`.
            call = LayerCall(step, (), {"position_embeddings": (angles[0][None], angles[1][None])})
            hidden_1MD = cuts.cut(number, hidden_1MD, call)
            hidden_1MD = self._layer(number, hidden_1MD, angles, step)
            hidden_1MD = cuts.leave(number, hidden_1MD)
        with torch.enable_grad():
            return _apply(_LastNorm, hidden_1MD[0], self, step.num_train)

    def run_layer(self, number: int, hidden_1nD: Tensor, angles_1nD: Angles, step: StepContext) -> Tensor:
        """One layer alone, with its graph, on the rows that `step` describes -> ``[1, n, D]``."""
        return self._layer(number, hidden_1nD, (angles_1nD[0][0], angles_1nD[1][0]), step)

    def _layer(self, number: int, x_1MD: Tensor, angles: Angles, step: StepContext) -> Tensor:
        past = [t for span in step.replay if span.past_kv is not None for t in span.past_kv]
        with torch.enable_grad():
            return _apply(_Layer, x_1MD, self, number, angles, step, *past)

    # --- forward ---

    def forward(self, number: int, x_MD: Tensor, angles: Angles, step: StepContext) -> tuple[Tensor, _Kept]:
        """One layer's output ``[M, D]``, and what its backward needs."""
        layer, ops, num_train = self.fused.layers[number], self.ops, step.num_train
        n_MD = torch.empty_like(x_MD)
        ops.rms_norm(x_MD, layer.norm, n_MD, None)
        qkv_MN, kept_qkv = layer.qkv.forward_rows(n_MD, step)
        raw_TN = self._normed(layer, qkv_MN, num_train)
        cos_MD, sin_MD = (t.contiguous() for t in angles)
        if layer.angles is not None:
            ops.rotary(qkv_MN, cos_MD, sin_MD, self.fused.heads + self.fused.kv_heads)
        out_MN, attended = self._attend(layer, qkv_MN, step)
        o_MD, kept_o = layer.o.forward_rows(out_MN, step)
        mid_MD = self._behind(layer.o_norm, o_MD)
        ops.rms_norm(mid_MD, layer.mlp_norm, n_MD, x_MD)  # and mid += x
        gate_up_MN, kept_gate_up = layer.gate_up.forward_rows(n_MD, step)
        inner_MK = n_MD.new_empty((len(n_MD), gate_up_MN.shape[1] // 2))
        ops.gated(gate_up_MN, inner_MK, self.fused.activation)
        down_MD, kept_down = layer.down.forward_rows(inner_MK, step)
        y_MD = self._behind(layer.down_norm, down_MD).add_(mid_MD)
        kept = _Kept(
            x_TD=_train(x_MD, num_train),
            raw_TN=raw_TN,
            qkv_TN=_train(qkv_MN, num_train),
            attended=attended,
            out_TN=_train(out_MN, num_train),
            o_TD=None if layer.o_norm is None else _train(o_MD, num_train),
            mid_TD=_train(mid_MD, num_train),
            gate_up_TN=_train(gate_up_MN, num_train),
            down_TD=None if layer.down_norm is None else _train(down_MD, num_train),
            angles=None if layer.angles is None else (cos_MD[:num_train], sin_MD[:num_train]),
            adapters=(kept_qkv, kept_o, kept_gate_up, kept_down),
        )
        return y_MD, kept

    def _behind(self, norm: Norm | None, x_MD: Tensor) -> Tensor:
        """What a half adds: `x_MD` itself, or its norm in memory of its own."""
        return x_MD if norm is None else self._again(norm, x_MD)

    def _normed(self, layer: FusedLayer, qkv_MN: Tensor, num_train: int) -> Tensor | None:
        """Norms of q and k, in place; what was there before, of the TRAIN rows."""
        if layer.q_norm is None and layer.k_norm is None:
            return None
        heads, kv_heads, dim = self.fused.heads, self.fused.kv_heads, self.fused.head_dim
        raw_TN = qkv_MN[:num_train, : (heads + kv_heads) * dim].clone()
        if layer.q_norm is not None:
            self.ops.head_norm(qkv_MN, 0, heads, layer.q_norm)
        if layer.k_norm is not None:
            self.ops.head_norm(qkv_MN, heads * dim, kv_heads, layer.k_norm)
        return raw_TN

    def _split(self, qkv_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads, dim = self.fused.heads, self.fused.kv_heads, self.fused.head_dim
        q, k, v = torch.split(qkv_MN.view(len(qkv_MN), -1, dim), [heads, kv_heads, kv_heads], dim=1)
        return q, k, v

    def _attend(self, layer: FusedLayer, qkv_MN: Tensor, step: StepContext) -> tuple[Tensor, list[_Attended]]:
        scale, rule = layer.attention_rule
        q, k, v = self._split(qkv_MN)
        q_HMD, k_KMD, v_KMD = (t.transpose(0, 1) for t in (q, k, v))
        if step.cuts is not None:
            step.cuts.keep_kv(k_KMD, v_KMD)
        out = qkv_MN.new_empty(q.shape)
        q_THD, out_THD = q[: step.num_train], out[: step.num_train]
        attended = self._plan(step, k, v, q_THD)
        for part in attended:
            keys, values = part.kv or (k, v)
            self.attention.forward(q_THD, keys, values, out_THD, part.lse_HT, part.spans, scale, rule)
        if step.num_train < step.num_rows:
            rest = other_rows(layer.attention, q_HMD, k_KMD, v_KMD, scale, rule, step)
            torch.cat([t.transpose(0, 1) for t in rest], out=out[step.num_train :])
        return out.view(len(qkv_MN), -1), attended

    def _plan(self, step: StepContext, k: Tensor, v: Tensor, q_THD: Tensor) -> list[_Attended]:
        """Which spans see which keys: their own rows in one call, and each that sees more than those in one."""
        parts: list[_Attended] = []
        own: list[tuple[int, int]] = []
        for span in step.replay:
            if span.past_kv is None:
                own.append((span.start, span.stop))
            else:
                past = (t.detach().transpose(0, 1) for t in span.past_kv)
                parts.append(_behind(past, (k, v), span.start, span.stop, q_THD, span))
        for a, b in (s for s in step.spans if s[1] <= step.num_train):
            seen = None if step.cuts is None else step.cuts.seen_kv(a, b)
            if seen is None:
                own.append((a, b))
            else:
                kv = (seen[0].transpose(0, 1), seen[1].transpose(0, 1))
                parts.append(_Attended([AttentionSpan(a, b, 0, len(kv[0]))], empty_lse(q_THD), kv))
        return [_Attended(own_spans(own), empty_lse(q_THD)), *parts]

    # --- backward ---

    def backward(self, number: int, kept: _Kept, dy_TD: Tensor, step: StepContext) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the layer's input, and of each past K and V of `step.replay`, in their order."""
        layer = self.fused.layers[number]
        kept_qkv, kept_o, kept_gate_up, kept_down = kept.adapters
        inner_TK: Tensor | None = None
        if layer.down.trains(step):
            inner_TK = dy_TD.new_empty((len(dy_TD), kept.gate_up_TN.shape[1] // 2))
            self.ops.gated(kept.gate_up_TN, inner_TK, self.fused.activation)
        ddown_TD = self._before(layer.down_norm, kept.down_TD, dy_TD)
        dinner_TK = layer.down.backward_rows(inner_TK, ddown_TD, step, kept_down)
        dgate_up_TN = torch.empty_like(kept.gate_up_TN)
        self.grads.gated(kept.gate_up_TN, dinner_TK, dgate_up_TN, self.fused.activation)
        del inner_TK, dinner_TK
        n_TD = self._again(layer.mlp_norm, kept.mid_TD) if layer.gate_up.trains(step) else None
        dn_TD = layer.gate_up.backward_rows(n_TD, dgate_up_TN, step, kept_gate_up)
        dmid_TD = self._through(layer.mlp_norm, kept.mid_TD, dn_TD, dy_TD)
        do_TD = self._before(layer.o_norm, kept.o_TD, dmid_TD)
        dout_TN = layer.o.backward_rows(kept.out_TN if layer.o.trains(step) else None, do_TD, step, kept_o)
        dqkv_TN, past = self._attention_backward(layer, kept, dout_TN, step)
        n_TD = self._again(layer.norm, kept.x_TD) if layer.qkv.trains(step) else None
        dn_TD = layer.qkv.backward_rows(n_TD, dqkv_TN, step, kept_qkv)
        return self._through(layer.norm, kept.x_TD, dn_TD, dmid_TD), past

    def _again(self, norm: Norm, x_TD: Tensor) -> Tensor:
        n_TD = torch.empty_like(x_TD)
        self.ops.rms_norm(x_TD, norm, n_TD, None)
        return n_TD

    def _through(self, norm: Norm, x_TD: Tensor, dn_TD: Tensor, past_it_TD: Tensor) -> Tensor:
        """Gradient of a half's input: through the norm, plus what goes past it; over `dn_TD`."""
        self.grads.rms_norm(x_TD, norm, dn_TD, dn_TD, more_TD=past_it_TD)
        return dn_TD

    def _before(self, norm: Norm | None, x_TD: Tensor | None, dy_TD: Tensor) -> Tensor:
        """Gradient of what a half adds, before the norm behind it; `dy_TD` itself where there is none."""
        if norm is None or x_TD is None:
            return dy_TD
        dx_TD = torch.empty_like(dy_TD)
        self.grads.rms_norm(x_TD, norm, dy_TD, dx_TD)
        return dx_TD

    def _attention_backward(
        self, layer: FusedLayer, kept: _Kept, dout_TN: Tensor, step: StepContext
    ) -> tuple[Tensor, list[Tensor]]:
        fused, (scale, rule) = self.fused, layer.attention_rule
        q, k, v = self._split(kept.qkv_TN)
        dqkv_TN = torch.empty_like(kept.qkv_TN)
        dq, dk, dv = self._split(dqkv_TN)
        out, dout = (t.view(q.shape) for t in (kept.out_TN, dout_TN))
        past: list[Tensor] = []
        for part in kept.attended:
            if part.kv is None:
                grads = (dq, dk, dv)
                self.attention.backward((q, k, v), out, part.lse_HT, dout, grads, part.spans, scale, rule)
            else:
                assert part.replay is not None, "a forward that is cut in windows has no backward of its own"
                wide = (torch.empty_like(part.kv[0]), torch.empty_like(part.kv[1]))
                inputs = (q, *part.kv)
                self.attention.backward(inputs, out, part.lse_HT, dout, (dq, *wide), part.spans, scale, rule)
                past += _share_out(wide, (dk, dv), part.replay)
        _add_later(dk, dv, step)
        heads, kv_heads, dim = fused.heads, fused.kv_heads, fused.head_dim
        if kept.angles is not None:
            self.grads.rotary(dqkv_TN, *kept.angles, heads + kv_heads)
        if kept.raw_TN is not None:
            for norm, first, count in ((layer.q_norm, 0, heads), (layer.k_norm, heads * dim, kv_heads)):
                if norm is not None:
                    self.grads.head_norm(kept.raw_TN, first, count, norm, dqkv_TN)
        return dqkv_TN, past


def _train(x_MD: Tensor, num_train: int) -> Tensor:
    """The TRAIN rows; copied where other rows would stay alive with them."""
    return x_MD if num_train == len(x_MD) else x_MD[:num_train].clone()


def _behind(past: Any, own: KV, start: int, stop: int, q: Tensor, span: ReplaySpan) -> _Attended:
    """A window's rows behind the earlier rows of their example."""
    k, v = (torch.cat([before, t[start:stop]]) for before, t in zip(past, own, strict=True))
    return _Attended([AttentionSpan(start, stop, 0, len(k))], empty_lse(q), (k, v), span)


def _share_out(wide: KV, own: KV, span: ReplaySpan) -> list[Tensor]:
    """Gradients of K and V of past and own rows: the own ones to their place; returns the past's, ``[K, past, D]``."""
    count = span.stop - span.start
    for whole, mine in zip(wide, own, strict=True):
        mine[span.start : span.stop] = whole[-count:]
    return [whole[:-count].transpose(0, 1) for whole in wide]


def _add_later(dk: Tensor, dv: Tensor, step: StepContext) -> None:
    """What later windows gave to the K and V of this window's rows."""
    for span in step.replay:
        if span.later_grads is not None:
            for mine, later in zip((dk, dv), span.later_grads, strict=True):
                rows = mine[span.start : span.stop]
                rows.copy_(rows.float() + later.transpose(0, 1))


def _apply(function: Any, *inputs: Any) -> Tensor:
    out: Tensor = function.apply(*inputs)
    return out


class _Layer(torch.autograd.Function):
    """One decoder layer: ``x [1, M, D]`` and the past K and V of its windows -> ``[1, M, D]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stack: TrainStack, number: int, angles: Angles, step: StepContext, *_: Tensor
    ) -> Any:
        y_MD, kept = stack.forward(number, x[0].contiguous(), angles, step)
        ctx.kept = kept if any(ctx.needs_input_grad) else None
        ctx.stack, ctx.number, ctx.step = stack, number, step
        return y_MD[None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        step, num_train = ctx.step, ctx.step.num_train
        dy_TD = grad_outputs[0][0, :num_train].contiguous()
        dx_TD, past = ctx.stack.backward(ctx.number, ctx.kept, dy_TD, step)
        ctx.kept = None
        return _with_other_rows(dx_TD, step.num_rows)[None], None, None, None, None, *past


class _LastNorm(torch.autograd.Function):
    """The stack's last norm: ``[M, D] -> [M, D]``."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, stack: TrainStack, num_train: int) -> Tensor:
        norm, y_MD = stack.fused.last_norm, torch.empty_like(x_MD)
        stack.ops.rms_norm(x_MD, norm, y_MD, None)
        ctx.stack, ctx.num_rows, ctx.x_TD = stack, len(x_MD), _train(x_MD.detach(), num_train)
        return y_MD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        norm, x_TD = ctx.stack.fused.last_norm, ctx.x_TD
        dx_TD = torch.empty_like(x_TD)
        ctx.stack.grads.rms_norm(x_TD, norm, grad_outputs[0][: len(x_TD)].contiguous(), dx_TD)
        return _with_other_rows(dx_TD, ctx.num_rows), None, None


def _with_other_rows(grad_TD: Tensor, num_rows: int) -> Tensor:
    """Zeros for the rows that are not trained."""
    if len(grad_TD) == num_rows:
        return grad_TD
    full_MD = grad_TD.new_zeros((num_rows, grad_TD.shape[1]))
    full_MD[: len(grad_TD)] = grad_TD
    return full_MD
