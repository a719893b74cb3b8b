"""Attention of a window of train rows whose layer runs again for its backward.

The window's rows see their example's earlier rows through K and V kept from the forward: leaves, whose gradients the
tape collects. What later windows gave to this window's own K and V joins the backward here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loquetier.base.context import ReplaySpan
from loquetier.kernels.attention import MaskRule, span_attention


def replayed_rows(
    q_HnD: Tensor, k_KnD: Tensor, v_KnD: Tensor, scale: float, rule: MaskRule, spans: Sequence[ReplaySpan]
) -> list[Tensor]:
    """Per span ``[H, rows, D]``. Differentiable in q, k, v and every span's past."""
    parts = []
    for span in spans:
        q, k, v = (t[:, span.start : span.stop] for t in (q_HnD, k_KnD, v_KnD))
        if span.later_grads is not None:
            k, v = (_with_gradient(t, g) for t, g in zip((k, v), span.later_grads, strict=True))
        if span.past_kv is not None:
            past_k, past_v = span.past_kv
            # What the first query's window hides is hidden from all: not read, and its gradient is zero.
            first = 0 if rule.window is None else max(0, past_k.shape[1] - rule.window + 1)
            k, v = torch.cat([past_k[:, first:], k], dim=1), torch.cat([past_v[:, first:], v], dim=1)
        parts.append(span_attention(q, k, v, scale, rule))
    return parts


class _AddGradient(torch.autograd.Function):
    """The identity, whose backward adds a gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return (grad_outputs[0] + grad).to(grad_outputs[0].dtype), None


def _with_gradient(x: Tensor, grad: Tensor) -> Tensor:
    out: Tensor = _AddGradient.apply(x, grad)  # type: ignore[no-untyped-call]
    return out
