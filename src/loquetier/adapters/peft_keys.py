"""Tensor names in `adapter_model.safetensors`: which ones an adapter must have, and what any other one means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loquetier.adapters.methods import slot_method
from loquetier.adapters.methods.method import Part
from loquetier.adapters.safetensors_check import TensorEntry
from loquetier.adapters.spec import ModulePlan
from loquetier.errors import AdapterMismatchError, UnsupportedAdapterError

PREFIX: Final = "base_model.model."
_FEATURES: Final = (
    (re.compile(r"lora_magnitude_vector"), "DoRA in a config without use_dora"),
    (re.compile(r"\.lora_[AB]\.(.+\.)?bias$"), "a bias in the LoRA layers (lora_bias)"),
    (re.compile(r"\.lora_[AB]\.[^.]+\.weight$"), "an adapter name inside the tensor name; save it with PEFT"),
    (re.compile(r"lora_embedding_[AB]"), "LoRA on an embedding"),
    (re.compile(r"modules_to_save"), "fully trained modules (modules_to_save)"),
    (re.compile(r"token_adapter|trainable_tokens"), "trained tokens (trainable_token_indices)"),
    (re.compile(r"(embed_tokens|lm_head|wte|embed_in|embed_out)(\.base_layer)?\.weight$"), "full embedding weights"),
    (re.compile(r"\.bias$"), "trained biases (bias)"),
)


@dataclass(frozen=True, slots=True)
class FactorKey:
    """One tensor that must be there."""

    path: str
    number: int
    """Among the parts of its method."""
    shape: tuple[int, ...]


def tensor_name(path: str, part: Part) -> str:
    """The name under which PEFT stores a part on the linear at `path`."""
    return f"{PREFIX}{path}.{part.peft_name}"


def base_copy_name(path: str) -> str:
    """The name of the base's own weight ``[out, in]``, which PEFT stores beside a LoRA on lm_head."""
    return f"{PREFIX}{path}.base_layer.weight"


def expected_factors(modules: Iterable[ModulePlan]) -> dict[str, FactorKey]:
    """Every tensor that an adapter with these modules must have, by name."""
    modules = tuple(modules)
    method = slot_method(modules)
    return {
        tensor_name(plan.target.path, part): FactorKey(plan.target.path, number, part.peft_shape)
        for plan in modules
        for number, part in enumerate(method.parts(plan))
    }


def check_tensors(
    tensors: Mapping[str, TensorEntry], modules: Sequence[ModulePlan], *, allow_partial: bool
) -> dict[str, FactorKey]:
    """Check a file's tensor names and shapes against the modules that the config adapts.

    Returns:
        The adapter's tensors, by name. With `allow_partial`, those of other modules are left out.

    Raises:
        UnsupportedAdapterError: a tensor belongs to a feature that we do not honour.
        AdapterMismatchError: a tensor is missing, belongs to no adapted module, or has the wrong shape.
    """
    expected = expected_factors(modules)
    shapes = {name: key.shape for name, key in expected.items()}
    endings = tuple({f".{part.peft_name}" for plan in modules for part in slot_method(modules).parts(plan)})
    for plan in modules:
        shapes[base_copy_name(plan.target.path)] = (plan.target.out_features, plan.target.in_features)
    extra = [name for name in tensors if name not in shapes]
    for name in extra:
        _refuse_feature(name, endings)
    foreign = [name for name in extra if not (allow_partial and name.startswith(PREFIX) and name.endswith(endings))]
    if foreign:
        raise AdapterMismatchError(
            f"{len(foreign)} of {len(tensors)} tensors belong to no adapted linear of this base: {_first(foreign)}"
        )
    if missing := [name for name in expected if name not in tensors]:
        raise AdapterMismatchError(f"{len(missing)} of {len(expected)} tensors are missing: {_first(missing)}")
    for name, shape in shapes.items():
        found = tensors[name].shape if name in tensors else shape
        if found != shape:
            raise AdapterMismatchError(
                f"tensor {name}: shape {list(found)}, but this base and the config's rank need {list(shape)}"
            )
    return expected


def _refuse_feature(name: str, own_endings: tuple[str, ...]) -> None:
    ending = next((ending for ending in own_endings if name.endswith(ending)), "")
    for pattern, feature in _FEATURES:
        if pattern.search(name.removesuffix(ending)):
            raise UnsupportedAdapterError(f"tensor {name[:200]!r}: {feature}; not supported")


def _first(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(repr(name[:200]) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
