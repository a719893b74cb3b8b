"""Row-wise modules (norms, gated activations) that keep only the train rows for their backward.

The forward is the original module's own forward, so the numbers are the model's, whatever the architecture. The
backward runs that same forward again on the saved train rows and differentiates it: inference rows leave nothing
behind, and of the train rows only the inputs are kept, not the module's temporaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loquetier.base.context import Binding

RowFunction = Callable[..., Tensor]


class _RowWise(torch.autograd.Function):
    """``fn(*inputs)`` where row t of the output depends on row t of the inputs only."""

    @staticmethod
    def forward(ctx: Any, fn: RowFunction, axis: int, num_train: int, *inputs: Tensor) -> Tensor:
        partial = num_train < inputs[0].shape[axis]
        # A narrowed view would keep all rows' storage alive; clone only when there is something to drop.
        saved = [x.narrow(axis, 0, num_train).clone() if partial else x for x in inputs]
        ctx.save_for_backward(*saved)
        ctx.fn, ctx.axis, ctx.shape = fn, axis, inputs[0].shape
        return fn(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        num_train = inputs[0].shape[ctx.axis]
        with torch.enable_grad():
            out = ctx.fn(*inputs)
        grads = torch.autograd.grad(out, inputs, grad_outputs[0].narrow(ctx.axis, 0, num_train))
        return None, None, None, *(pad_rows(g, ctx.axis, ctx.shape[ctx.axis]) for g in grads)


def pad_rows(grad: Tensor, axis: int, num_rows: int) -> Tensor:
    """Zeros for the rows that are not trained."""
    if grad.shape[axis] == num_rows:
        return grad
    shape = list(grad.shape)
    shape[axis] = num_rows
    full = grad.new_zeros(shape)
    full.narrow(axis, 0, grad.shape[axis]).copy_(grad)
    return full


def row_axis(x: Tensor, num_rows: int) -> int | None:
    """Where the rows are: 1 in ``[1, M, ...]``, 2 in ``[1, H, M, D]``; None when the shape does not tell."""
    at_1 = x.dim() >= 3 and x.shape[1] == num_rows
    at_2 = x.dim() == 4 and x.shape[2] == num_rows
    return None if at_1 == at_2 else (1 if at_1 else 2)


def make_row_limited(fn: RowFunction, binding: Binding) -> RowFunction:
    """Wrap a row-wise function so that under a tape it keeps the train rows only. Bit-equal output."""

    def forward(*inputs: Tensor) -> Tensor:
        step = binding.step
        if step is None or step.num_train == 0 or not (torch.is_grad_enabled() and inputs[0].requires_grad):
            return fn(*inputs)
        axis = row_axis(inputs[0], step.num_rows)
        if axis is None:  # as many heads as rows: plain autograd is exact too, it only keeps more
            return fn(*inputs)
        out: Tensor = _RowWise.apply(fn, axis, step.num_train, *inputs)  # type: ignore[no-untyped-call]
        return out

    return forward
