"""The base's linears: one GEMM over all rows, plus each segment's adapter, with a backward for train rows only.

Adapters' weights are not autograd inputs. Their gradients are added in place to the step's float32 buffers when the
backward passes, so the number of adapters in a step changes no graph, and a job's rows reach only its own buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loquetier.adapters.methods.method import Site
from loquetier.base.context import Binding, StepContext
from loquetier.base.gemm import BaseGemm
from loquetier.errors import UnsupportedModelError


class Member(NamedTuple):
    """One linear of a group: its module index (-1: no adapter may sit on it) and its columns of the output."""

    module: int
    start: int
    stop: int


Kept = list[Any]
"""What `Method.forward` returned, member by member, and for each in the order of `StepContext.method_rows`."""


class LinearGroup:
    """Linears that read the same tensor (q|k|v, gate|up), computed as one GEMM and handed out as column slices."""

    def __init__(self, linears: Sequence[nn.Linear], modules: Sequence[int], binding: Binding) -> None:
        self.binding = binding
        stops = list(accumulate(m.out_features for m in linears))
        starts = [0, *stops[:-1]]
        self.members = tuple(Member(i, a, b) for i, a, b in zip(modules, starts, stops, strict=True))
        self.adapted = tuple(m for m in self.members if m.module >= 0)
        self.weight_NK = linears[0].weight if len(linears) == 1 else _concatenate(linears)
        self.bias_N = _concatenate_bias(linears)
        self.sites = tuple((self._site(m), m.start, m.stop) for m in self.adapted)
        """What the methods know of each of `adapted`, and its columns of the output."""
        self.gemm = BaseGemm(self.weight_NK, self.bias_N)
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._handed_out = 0

    def _site(self, m: Member) -> Site:
        bias_N = None if self.bias_N is None else self.bias_N[m.start : m.stop]
        return Site(m.module, self.weight_NK[m.start : m.stop], bias_N, len(self.members) == 1)

    def drop_original(self) -> int:
        """See `BaseGemm.drop_original`; the linears' own weights are views of the same memory and go too."""
        freed = self.gemm.drop_original()
        if freed:
            self.weight_NK = self.gemm.weight_NK
            self.sites = tuple((self._site(m), m.start, m.stop) for m in self.adapted)
        return freed

    def member_output(self, x: Tensor, member: int) -> Tensor:
        """Columns of this member for input `x`; the GEMM runs when the first member asks with a new tensor."""
        if len(self.members) == 1:
            return self.apply(x)
        if self._input is not x:
            self._input, self._output, self._handed_out = x, self.apply(x), 0
        assert self._output is not None
        m = self.members[member]
        out = self._output[..., m.start : m.stop]
        self._handed_out += 1
        if self._handed_out == len(self.members):  # the last sibling: drop the references
            self._input = self._output = None
        return out

    def apply(self, x: Tensor) -> Tensor:
        """``x [..., K] -> [..., N]``: base and adapters."""
        step = self.binding.step
        if step is None or not self._has_adapter_rows(step):
            if step is not None and step.num_train and torch.is_grad_enabled() and x.requires_grad:
                return self._differentiable(x, step)
            return self.gemm(x)
        if x.numel() // x.shape[-1] != step.num_rows:
            raise UnsupportedModelError(
                f"a linear with an adapter received {x.numel() // x.shape[-1]} rows in a step of {step.num_rows}: "
                "this architecture routes rows around it; choose target_modules without it"
            )
        if step.num_train and torch.is_grad_enabled() and x.requires_grad:
            return self._differentiable(x, step)
        y = self.gemm(x)
        self.adapt(x.reshape(step.num_rows, -1), y.view(step.num_rows, -1), step, 0)
        return y

    def _differentiable(self, x: Tensor, step: StepContext) -> Tensor:
        if x.numel() // x.shape[-1] != step.num_rows:  # rows were routed (MoE): plain autograd, nothing adapted here
            return self.gemm(x)
        out: Tensor = _UnifiedLinear.apply(x, self, step)  # type: ignore[no-untyped-call]
        return out

    def _has_adapter_rows(self, step: StepContext) -> bool:
        if step.fixed_lora is not None:
            return any(m.module in step.fixed_lora.modules for m in self.adapted)
        return any(m.module in step.factors[s.slot] for s in step.segments for m in self.adapted)

    def adapt(self, x_MK: Tensor, y_MN: Tensor, step: StepContext, num_kept: int) -> Kept:
        """Every method on its segments and every member, in place; what `backward` needs of rows ``[0, num_kept)``."""
        kept: Kept = []
        rows, table, dropout = step.method_rows, step.factors, step.dropout
        for site, start, stop in self.sites:
            y_member = y_MN[:, start:stop]
            for method, segments, plan in rows:
                kept.append(method.forward(site, x_MK, y_member, segments, table, dropout, num_kept, plan))
        return kept

    def base_gradient(self, dy_TN: Tensor, step: StepContext) -> Tensor:
        """Gradient of the base's own output: `dy_TN` itself unless a method in training changes that output."""
        by_method = zip(step.method_rows, step.train_segments_by_method, strict=True)
        changing = [(method, own) for (method, _, _), own in by_method if own and method.changes_base_output]
        if not changing:
            return dy_TN
        dy_TN = dy_TN.clone()
        for site, start, stop in self.sites:
            for method, segments in changing:
                method.base_gradient(site, dy_TN[:, start:stop], segments, step.factors, step.dropout)
        return dy_TN

    def forward_rows(self, x_MK: Tensor, step: StepContext) -> tuple[Tensor, Kept]:
        """``[M, K] -> [M, N]``, base and adapters, and what `backward_rows` needs. No autograd."""
        y_MN = self.gemm(x_MK)
        return y_MN, self.adapt(x_MK, y_MN, step, step.num_train)

    def trains(self, step: StepContext) -> bool:
        """Whether a TRAIN segment's adapter sits here: then `backward_rows` needs the input."""
        return step.trains(tuple(m.module for m in self.adapted))

    def backward_rows(self, x_TK: Tensor | None, dy_TN: Tensor, step: StepContext, kept: Kept) -> Tensor:
        """Gradient of the TRAIN rows' input; adds the adapters' own. `x_TK` is None where nothing is trained."""
        dx_TK = dy_TN.new_empty((len(dy_TN), self.weight_NK.shape[1]))
        self.gemm.input_gradient(self.base_gradient(dy_TN, step), dx_TK)
        if x_TK is not None:
            self.backward(x_TK, dy_TN, dx_TK, step, kept)
        return dx_TK

    def backward(self, x_TK: Tensor, dy_TN: Tensor, dx_TK: Tensor, step: StepContext, kept: Kept) -> None:
        """Every method's gradients, and its part of `dx_TK`, in place."""
        own = iter(kept)
        for site, start, stop in self.sites:
            dy_member = dy_TN[:, start:stop]
            for (method, _, _), segments in zip(step.method_rows, step.train_segments_by_method, strict=True):
                kept_here = next(own)
                if segments:
                    where = (segments, step.factors, step.grads, step.dropout, kept_here)
                    method.backward(site, x_TK, dy_member, dx_TK, *where)


class _UnifiedLinear(torch.autograd.Function):
    """Rows ``[0, num_train)`` are differentiated; the other rows pass through and leave nothing behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LinearGroup, step: StepContext) -> Tensor:
        num_rows, num_train = step.num_rows, step.num_train
        y = group.gemm(x)
        x_MK = x.reshape(num_rows, -1)
        ctx.kept = group.adapt(x_MK, y.view(num_rows, -1), step, num_train)
        ctx.group, ctx.step, ctx.shape = group, step, x.shape
        ctx.has_input = group.trains(step)
        if ctx.has_input:
            ctx.save_for_backward(x_MK if num_train == num_rows else x_MK[:num_train].clone())
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        group, step = ctx.group, ctx.step
        num_train = step.num_train
        dy_TN = grad_outputs[0].reshape(step.num_rows, -1)[:num_train]
        partial = num_train < step.num_rows
        dx = dy_TN.new_zeros(ctx.shape) if partial else dy_TN.new_empty(ctx.shape)
        dx_TK = dx.view(step.num_rows, -1)[:num_train]
        group.gemm.input_gradient(group.base_gradient(dy_TN, step), dx_TK)
        if ctx.has_input:
            (x_TK,) = ctx.saved_tensors
            group.backward(x_TK, dy_TN, dx_TK, step, ctx.kept)
        return dx, None, None


class VirtualLinear(nn.Module):
    """Stands where the model had an ``nn.Linear``; same weight object, same call, adapters added per segment."""

    def __init__(self, linear: nn.Linear, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._group, self._member = group, member

    @property
    def group(self) -> LinearGroup:
        """The linears that share its GEMM, and keep one input together."""
        return self._group

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        return self._group.member_output(x, self._member)


def _concatenate(linears: Sequence[nn.Linear]) -> Tensor:
    """One weight for the group; the originals become views of it, so memory does not double."""
    joined = torch.cat([m.weight.data for m in linears])
    start = 0
    for m in linears:
        m.weight.data = joined[start : start + m.out_features]
        start += m.out_features
    return joined


def _concatenate_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(m.bias is None for m in linears):
        return None
    return torch.cat([m.bias.data if m.bias is not None else m.weight.new_zeros(m.out_features) for m in linears])
