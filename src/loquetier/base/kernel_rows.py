"""Norms and gated activations of the model on Triton kernels, with a backward of their own for the train rows.

"Verify, then swap": a module gets its kernel only if forward and backward give what the module's own code gives on
random rows. What was swapped keeps its train rows' inputs, as `base.rowwise` does, and runs no autograd in between.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loquetier.base.context import Binding
from loquetier.base.rowwise import RowFunction, pad_rows, row_axis

_PROBE_ROWS = 5
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of the largest value: the backward of eager code rounds each of its steps to the type, the kernel once."""


class RowKernel(Protocol):
    """A row-wise function with its gradient; rows are ``[rows, D]``."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Of its own memory."""
        ...

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One gradient per input."""
        ...


class NormKernel:
    """RMSNorm with a frozen weight; `one_plus` is Gemma's ``1 + weight``."""

    def __init__(self, weight_D: Tensor, epsilon: float, *, one_plus: bool) -> None:
        self._weight_D, self._epsilon, self._one_plus = weight_D, epsilon, one_plus
        self.dtype = weight_D.dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        """The norm of ``[rows, D]``."""
        from loquetier.kernels import triton_rows

        return triton_rows.rms_norm(inputs[0], self._weight_D, self._epsilon, one_plus=self._one_plus)

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradient of the norm's input."""
        from loquetier.kernels import triton_rows

        return (triton_rows.rms_norm_backward(inputs[0], self._weight_D, self._epsilon, dy, one_plus=self._one_plus),)


class GateKernel:
    """``act(gate) * up`` with one of the activations of `triton_rows`."""

    def __init__(self, activation: int) -> None:
        self._activation = activation

    def forward(self, *inputs: Tensor) -> Tensor:
        """Of gate and up, ``[rows, K]`` each."""
        from loquetier.kernels import triton_rows
        from loquetier.kernels.triton_smlm import side_by_side

        gate_MK, up_MK = (side_by_side(x) for x in inputs)
        y_MK = torch.empty(gate_MK.shape, dtype=gate_MK.dtype, device=gate_MK.device)
        triton_rows.gated(gate_MK, up_MK, y_MK, self._activation)
        return y_MK

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradients of gate and up."""
        from loquetier.kernels import triton_rows

        return triton_rows.gated_backward(inputs[0], inputs[1], dy, self._activation)


def norm_kernel(module: nn.Module) -> NormKernel | None:
    """The kernel that computes what this norm computes; None when there is none."""
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    weight = getattr(module, "weight", None)
    if not isinstance(epsilon, float) or weight is None or len(list(module.parameters())) != 1 or weight.dim() != 1:
        return None
    if not _takes(weight.dtype, len(weight)):
        return None
    probe = (_random(len(weight), weight, seed=1),)
    candidates = (NormKernel(weight.detach(), epsilon, one_plus=one_plus) for one_plus in (False, True))
    return next((c for c in candidates if _agrees(c, module, probe)), None)


def gate_kernel(activation: nn.Module, width: int, like: Tensor) -> GateKernel | None:
    """The kernel of this activation times a second input; None when there is none."""
    if not _takes(like.dtype, width):
        return None
    probe = (_random(width, like, seed=1), _random(width, like, seed=2))
    candidates = (GateKernel(number) for number in (0, 1))
    return next((c for c in candidates if _agrees(c, lambda gate, up: activation(gate) * up, probe)), None)


def make_kernel_rows(kernel: RowKernel, own: RowFunction, binding: Binding, dtype: torch.dtype) -> RowFunction:
    """Run `kernel` instead of `own` on rows of `dtype`; under a tape it keeps the train rows only."""

    def forward(*inputs: Tensor) -> Tensor:
        if inputs[0].dtype != dtype:
            return own(*inputs)
        if not (torch.is_grad_enabled() and inputs[0].requires_grad):
            return _run(kernel, inputs)
        step = binding.step
        axis = None if step is None else row_axis(inputs[0], step.num_rows)
        if step is None or axis is None:  # where the rows are is not clear: the module's own code and autograd
            return own(*inputs)
        out: Tensor = _KernelRows.apply(kernel, axis, step.num_train, *inputs)  # type: ignore[no-untyped-call]
        return out

    return forward


class _KernelRows(torch.autograd.Function):
    """As `rowwise._RowWise`, with a gradient that is known."""

    @staticmethod
    def forward(ctx: Any, kernel: RowKernel, axis: int, num_train: int, *inputs: Tensor) -> Tensor:
        partial = num_train < inputs[0].shape[axis]
        ctx.save_for_backward(*(x.narrow(axis, 0, num_train).clone() if partial else x for x in inputs))
        ctx.kernel, ctx.axis, ctx.num_rows = kernel, axis, inputs[0].shape[axis]
        return _run(kernel, inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        inputs = ctx.saved_tensors
        dy = grad_outputs[0].narrow(ctx.axis, 0, inputs[0].shape[ctx.axis])
        grads = ctx.kernel.backward(_flat(dy), *(_flat(x) for x in inputs))
        shaped = (g.view(x.shape) for g, x in zip(grads, inputs, strict=True))
        return None, None, None, *(pad_rows(g, ctx.axis, ctx.num_rows) for g in shaped)


def _run(kernel: RowKernel, inputs: tuple[Tensor, ...]) -> Tensor:
    return kernel.forward(*(_flat(x) for x in inputs)).view(inputs[0].shape)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _takes(dtype: torch.dtype, width: int) -> bool:
    from loquetier.kernels import triton_rows

    return triton_rows.takes(dtype, width)


def _random(width: int, like: Tensor, *, seed: int) -> Tensor:
    rows = torch.randn(_PROBE_ROWS, width, generator=torch.Generator().manual_seed(seed))
    return rows.to(like.device, like.dtype)


def _agrees(kernel: RowKernel, own: RowFunction, probe: tuple[Tensor, ...]) -> bool:
    """Forward and backward on the probe, which is its own upstream gradient too."""
    leaves = tuple(x.clone().requires_grad_() for x in probe)
    with torch.enable_grad():
        theirs = own(*leaves)
    expected = (theirs.detach(), *torch.autograd.grad(theirs, leaves, probe[0]))
    ours = (kernel.forward(*probe), *kernel.backward(probe[0], *probe))
    return all(
        bool((a.float() - b.float()).abs().max() <= _TOLERANCE[b.dtype] * b.float().abs().max())
        for a, b in zip(ours, expected, strict=True)
    )
