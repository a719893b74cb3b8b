"""An adapter's weights between a slot's layout and PEFT's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from loquetier.adapters.arena import part_views
from loquetier.adapters.methods import slot_method
from loquetier.adapters.spec import ModulePlan

PeftTensors = Mapping[str, tuple[Tensor, ...]]
"""By module path, the tensors of `Method.parts` in PEFT's shapes; LoRA: A ``[rank, in]`` and B ``[out, rank]``."""


def to_peft(flat: Tensor, modules: Sequence[ModulePlan]) -> dict[str, tuple[Tensor, ...]]:
    """A flat buffer of `num_elements` as PEFT's tensors: contiguous copies, on the CPU."""
    method, views = slot_method(modules), part_views(flat.detach(), modules)
    return {
        m.target.path: tuple(
            (view.T if part.transposed else view).reshape(part.peft_shape).contiguous().cpu().clone()
            for part, view in zip(method.parts(m), views[m.target.index], strict=True)
        )
        for m in modules
    }


def from_peft(tensors: PeftTensors, flat: Tensor, modules: Sequence[ModulePlan]) -> None:
    """Write PEFT's tensors of the shapes that `to_peft` gives into a flat buffer of any dtype, on any device."""
    method, views = slot_method(modules), part_views(flat, modules)
    for m in modules:
        for part, view, tensor in zip(method.parts(m), views[m.target.index], tensors[m.target.path], strict=True):
            view.copy_(tensor.reshape(part.shape[::-1]).T if part.transposed else tensor.reshape(part.shape))
