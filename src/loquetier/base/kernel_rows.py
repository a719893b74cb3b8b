"""Norms and gated activations of the model on kernels, with a backward of their own for the train rows.

"Verify, then swap": a module gets its kernel only if forward and backward give what the module's own code gives on
random rows. What was swapped keeps its train rows' inputs, as `base.rowwise` does, and runs no autograd in between.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loquetier.base.context import Binding
from loquetier.base.rowwise import RowFunction, pad_rows, row_axis
from loquetier.kernels.native import DTYPE_CODES
from loquetier.kernels.rowgrads import RowGrads
from loquetier.kernels.rowops import GELU_TANH, SILU, Norm, RowOps
from loquetier.kernels.select import Kernels

_PROBE_ROWS = 5
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of the largest value: the backward of eager code rounds each of its steps to the type, the kernel once."""


class RowLibrary(Protocol):
    """The kernels of one kind of device; rows are ``[rows, D]``, each result has memory of its own."""

    def takes(self, dtype: torch.dtype, width: int) -> bool:
        """Whether there are kernels for rows of this type and width."""
        ...

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """``norm(x)``."""
        ...

    def norm_backward(self, x: Tensor, norm: Norm, dy: Tensor) -> Tensor:
        """Gradient of x."""
        ...

    def gated(self, gate: Tensor, up: Tensor, activation: int) -> Tensor:
        """``act(gate) * up``; `activation` is one of `rowops`."""
        ...

    def gated_backward(self, gate: Tensor, up: Tensor, dy: Tensor, activation: int) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        ...


class TritonRows:
    """On a GPU. `triton` is imported when a kernel runs."""

    def takes(self, dtype: torch.dtype, width: int) -> bool:
        """As `RowLibrary` has it."""
        from loquetier.kernels import triton_rows

        return triton_rows.takes(dtype, width)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """As `RowLibrary` has it."""
        from loquetier.kernels import triton_rows

        return triton_rows.rms_norm(x, norm.weight_D, norm.epsilon, one_plus=norm.one_plus)

    def norm_backward(self, x: Tensor, norm: Norm, dy: Tensor) -> Tensor:
        """As `RowLibrary` has it."""
        from loquetier.kernels import triton_rows

        return triton_rows.rms_norm_backward(x, norm.weight_D, norm.epsilon, dy, one_plus=norm.one_plus)

    def gated(self, gate: Tensor, up: Tensor, activation: int) -> Tensor:
        """As `RowLibrary` has it."""
        from loquetier.kernels import triton_rows
        from loquetier.kernels.triton_smlm import side_by_side

        gate, up = side_by_side(gate), side_by_side(up)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        triton_rows.gated(gate, up, y, activation)
        return y

    def gated_backward(self, gate: Tensor, up: Tensor, dy: Tensor, activation: int) -> tuple[Tensor, Tensor]:
        """As `RowLibrary` has it."""
        from loquetier.kernels import triton_rows

        return triton_rows.gated_backward(gate, up, dy, activation)


class NativeRows:
    """In C."""

    def __init__(self, ops: RowOps, grads: RowGrads) -> None:
        self._ops, self._grads = ops, grads

    def takes(self, dtype: torch.dtype, width: int) -> bool:
        """As `RowLibrary` has it."""
        return dtype in DTYPE_CODES

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """As `RowLibrary` has it."""
        x = _near(x)
        y = x.new_empty(x.shape)
        self._ops.rms_norm(x, norm, y, None)
        return y

    def norm_backward(self, x: Tensor, norm: Norm, dy: Tensor) -> Tensor:
        """As `RowLibrary` has it."""
        x, dy = _near(x), _near(dy)
        dx = x.new_empty(x.shape)
        self._grads.rms_norm(x, norm, dy, dx)
        return dx

    def gated(self, gate: Tensor, up: Tensor, activation: int) -> Tensor:
        """As `RowLibrary` has it."""
        return self._ops.gated_pair(*_alike(gate, up), activation)

    def gated_backward(self, gate: Tensor, up: Tensor, dy: Tensor, activation: int) -> tuple[Tensor, Tensor]:
        """As `RowLibrary` has it."""
        return self._grads.gated_pair(*_alike(gate, up), _near(dy), activation)


def _near(x: Tensor) -> Tensor:
    """With a row's elements side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _alike(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """With rows equally far apart in both, a row's elements side by side."""
    same = gate.stride() == up.stride() and gate.stride(-1) == 1
    return (gate, up) if same else (gate.contiguous(), up.contiguous())


def row_library(kernels: Kernels) -> RowLibrary | None:
    """What these kernels have for norms and activations, forward and backward."""
    if kernels.in_triton("row_ops"):
        return TritonRows()
    library = kernels.native("row_ops")
    if library is None or kernels.native("row_grads") is None:
        return None
    return NativeRows(RowOps(library), RowGrads(library))


class RowKernel(Protocol):
    """A row-wise function with its gradient; rows are ``[rows, D]``."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Of its own memory."""
        ...

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One gradient per input."""
        ...


class NormKernel:
    """RMSNorm with a frozen weight."""

    def __init__(self, rows: RowLibrary, norm: Norm) -> None:
        self._rows, self._norm = rows, norm
        self.dtype = norm.weight_D.dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        """The norm of ``[rows, D]``."""
        return self._rows.norm(inputs[0], self._norm)

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradient of the norm's input."""
        return (self._rows.norm_backward(inputs[0], self._norm, dy),)


class GateKernel:
    """``act(gate) * up`` with one of the activations of `rowops`."""

    def __init__(self, rows: RowLibrary, activation: int) -> None:
        self._rows, self._activation = rows, activation

    def forward(self, *inputs: Tensor) -> Tensor:
        """Of gate and up, ``[rows, K]`` each."""
        return self._rows.gated(inputs[0], inputs[1], self._activation)

    def backward(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradients of gate and up."""
        return self._rows.gated_backward(inputs[0], inputs[1], dy, self._activation)


def norm_kernel(module: nn.Module, rows: RowLibrary) -> NormKernel | None:
    """The kernel that computes what this norm computes; None when there is none."""
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    weight = getattr(module, "weight", None)
    if not isinstance(epsilon, float) or weight is None or len(list(module.parameters())) != 1 or weight.dim() != 1:
        return None
    if not rows.takes(weight.dtype, len(weight)):
        return None
    probe = (_random(len(weight), weight, seed=1),)
    candidates = (NormKernel(rows, Norm(weight.detach(), epsilon, one_plus)) for one_plus in (False, True))
    return next((c for c in candidates if _agrees(c, module, probe)), None)


def gate_kernel(activation: nn.Module, width: int, like: Tensor, rows: RowLibrary) -> GateKernel | None:
    """The kernel of this activation times a second input; None when there is none."""
    if not rows.takes(like.dtype, width):
        return None
    probe = (_random(width, like, seed=1), _random(width, like, seed=2))
    candidates = (GateKernel(rows, number) for number in (SILU, GELU_TANH))
    return next((c for c in candidates if _agrees(c, lambda gate, up: activation(gate) * up, probe)), None)


def make_kernel_rows(kernel: RowKernel, own: RowFunction, binding: Binding, dtype: torch.dtype) -> RowFunction:
    """Run `kernel` instead of `own` on rows of `dtype`; under a tape it keeps the train rows only.

    While `binding.own_code` is set, `own` runs.
    """

    def forward(*inputs: Tensor) -> Tensor:
        if inputs[0].dtype != dtype or binding.own_code:
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
