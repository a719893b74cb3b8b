"""Turn an unmodified Hugging Face causal LM into a base: swap its linears, cut its layers, limit its row-wise modules.

Nothing of the model's own code is replaced but module objects and bound forwards; paths and parameter names stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loquetier.adapters.spec import LinearTarget
from loquetier.base.context import Binding, LayerCall
from loquetier.base.kernel_rows import GateKernel, RowLibrary, gate_kernel, make_kernel_rows, norm_kernel
from loquetier.base.linear import LinearGroup, VirtualLinear
from loquetier.base.rowwise import make_row_limited

SIBLINGS: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears that read the same tensor; checked at run time by identity of the input."""


def swap_linears(model: nn.Module, targets: Sequence[LinearTarget], binding: Binding) -> None:
    """Replace every target by a `VirtualLinear`; siblings of one parent share one GEMM."""
    index = {t.path: t.index for t in targets}
    for parent_path, names in _groups(index):
        parent = model.get_submodule(parent_path)
        linears = [getattr(parent, n) for n in names]
        if len({m.weight.dtype for m in linears}) > 1:
            raise AssertionError(f"{parent_path}: siblings {names} differ in dtype")
        group = LinearGroup(linears, [index[f"{parent_path}.{n}".lstrip(".")] for n in names], binding)
        for member, (name, linear) in enumerate(zip(names, linears, strict=True)):
            setattr(parent, name, VirtualLinear(linear, group, member))


def _groups(paths: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Parents and the names under them that form one group; every path is in exactly one."""
    by_parent: dict[str, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        by_parent.setdefault(parent, []).append(name)
    groups = []
    for parent, names in by_parent.items():
        left = set(names)
        for siblings in SIBLINGS:
            if left.issuperset(siblings):
                groups.append((parent, siblings))
                left -= set(siblings)
        groups += [(parent, (n,)) for n in names if n in left]
    return groups


def limit_row_modules(
    model: nn.Module, layers: Iterable[nn.Module], binding: Binding, rows: RowLibrary | None = None
) -> bool:
    """Make norms keep train rows only, and gated MLPs the inputs of their activation only.

    Args:
        rows: kernels to run those of them on that give the same there.

    Returns:
        Whether there are gated MLPs and each has its activation in a kernel.
    """
    for module in model.modules():
        if type(module).__name__.endswith(("Norm", "RMSNorm")) and not list(module.children()):
            kernel = None if rows is None else norm_kernel(module, rows)
            limited = make_row_limited(module.forward, binding)
            module.forward = limited if kernel is None else make_kernel_rows(kernel, limited, binding, kernel.dtype)
    in_kernels: list[bool] = []
    for layer in layers:
        for module in layer.modules():
            limited, gate = _limited_mlp(module, binding, rows)
            if limited is not None:
                module.forward = limited
                in_kernels.append(gate is not None)
    return bool(in_kernels) and all(in_kernels)


def _limited_mlp(module: nn.Module, binding: Binding, rows: RowLibrary | None) -> tuple[Any, GateKernel | None]:
    """A forward equal to the module's own for the two gated MLP shapes of the field, and its kernel; None for others.

    "Verify, then swap": the swap stands only if it gives the original's result on random rows, bit for bit.
    """
    children = dict(module.named_children())
    act = children.get("act_fn") or children.get("activation_fn")
    if act is None or "down_proj" not in children:
        return None, None
    gated = make_row_limited(lambda gate, up: act(gate) * up, binding)
    down = children["down_proj"]

    if "gate_proj" in children and "up_proj" in children:
        gate_proj, up_proj = children["gate_proj"], children["up_proj"]

        def forward(x: Tensor) -> Tensor:
            out: Tensor = down(gated(gate_proj(x), up_proj(x)))
            return out

        width = gate_proj.in_features
    elif "gate_up_proj" in children:
        gate_up_proj = children["gate_up_proj"]

        def forward(x: Tensor) -> Tensor:
            gate, up = gate_up_proj(x).chunk(2, dim=-1)
            out: Tensor = down(gated(gate, up))
            return out

        width = gate_up_proj.in_features
    else:
        return None, None
    if not isinstance(width, int):
        return None, None
    weight = next(down.parameters())
    probe = torch.randn(1, 3, width, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        same = torch.equal(module(probe), forward(probe))
    if not same:
        return None, None
    inner = getattr(down, "in_features", None)
    kernel = gate_kernel(act, inner, probe, rows) if rows is not None and isinstance(inner, int) else None
    if kernel is not None:
        gated = make_kernel_rows(kernel, gated, binding, probe.dtype)  # `forward` looks the name up when it runs
    return forward, kernel


def cut_layers(layers: Sequence[nn.Module], binding: Binding) -> None:
    """Tell the step's tape, when there is one, of each decoder layer's input and output."""
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(_cut_hook(number, binding), with_kwargs=True)
        layer.register_forward_hook(_leave_hook(number, binding))


def _cut_hook(number: int, binding: Binding) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = binding.step
        if step is None or step.cuts is None:
            return None
        if args:
            return (step.cuts.cut(number, args[0], LayerCall(step, args[1:], kwargs)), *args[1:]), kwargs
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return args, {
            **rest,
            "hidden_states": step.cuts.cut(number, kwargs["hidden_states"], LayerCall(step, (), rest)),
        }

    return hook


def _leave_hook(number: int, binding: Binding) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        step = binding.step
        if step is None or step.cuts is None:
            return None
        if isinstance(output, tuple):
            return (step.cuts.leave(number, output[0]), *output[1:])
        return step.cuts.leave(number, output)

    return hook
