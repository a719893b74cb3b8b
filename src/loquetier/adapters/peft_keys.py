"""Tensor names in `adapter_model.safetensors`: which ones an adapter must have, and what any other one means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from loquetier.adapters.safetensors_check import TensorEntry
from loquetier.adapters.spec import ModulePlan
from loquetier.errors import AdapterMismatchError, UnsupportedAdapterError

PREFIX: Final = "base_model.model."
_FACTOR_KEY: Final = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_[AB]\.weight", re.DOTALL)
_FEATURES: Final = (
    (re.compile(r"lora_magnitude_vector"), "DoRA (use_dora)"),
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
    factor: Literal["A", "B"]
    shape: tuple[int, int]


def factor_name(path: str, factor: Literal["A", "B"]) -> str:
    """The name under which PEFT stores factor A ``[rank, in]`` or B ``[out, rank]`` of the linear at `path`."""
    return f"{PREFIX}{path}.lora_{factor}.weight"


def base_copy_name(path: str) -> str:
    """The name of the base's own weight ``[out, in]``, which PEFT stores beside a LoRA on lm_head."""
    return f"{PREFIX}{path}.base_layer.weight"


def expected_factors(modules: Iterable[ModulePlan]) -> dict[str, FactorKey]:
    """Every tensor that an adapter with these modules must have, by name."""
    found: dict[str, FactorKey] = {}
    for plan in modules:
        path, target = plan.target.path, plan.target
        found[factor_name(path, "A")] = FactorKey(path, "A", (plan.rank, target.in_features))
        found[factor_name(path, "B")] = FactorKey(path, "B", (target.out_features, plan.rank))
    return found


def check_tensors(
    tensors: Mapping[str, TensorEntry], modules: Sequence[ModulePlan], *, allow_partial: bool
) -> dict[str, FactorKey]:
    """Check a file's tensor names and shapes against the modules that the config adapts.

    Returns:
        The factor tensors, by name. With `allow_partial`, LoRA factors of other modules are left out.

    Raises:
        UnsupportedAdapterError: a tensor belongs to a feature that we do not honour.
        AdapterMismatchError: a tensor is missing, belongs to no adapted module, or has the wrong shape.
    """
    expected = expected_factors(modules)
    shapes = {name: key.shape for name, key in expected.items()}
    for plan in modules:
        shapes[base_copy_name(plan.target.path)] = (plan.target.out_features, plan.target.in_features)
    extra = [name for name in tensors if name not in shapes]
    for name in extra:
        _refuse_feature(name)
    foreign = [name for name in extra if not (allow_partial and _FACTOR_KEY.fullmatch(name))]
    if foreign:
        raise AdapterMismatchError(
            f"{len(foreign)} of {len(tensors)} tensors belong to no adapted linear of this base: {_first(foreign)}"
        )
    if missing := [name for name in expected if name not in tensors]:
        raise AdapterMismatchError(f"{len(missing)} of {len(expected)} LoRA tensors are missing: {_first(missing)}")
    for name, shape in shapes.items():
        found = tensors[name].shape if name in tensors else shape
        if found != shape:
            raise AdapterMismatchError(
                f"tensor {name}: shape {list(found)}, but this base and the config's rank need {list(shape)}"
            )
    return expected


def _refuse_feature(name: str) -> None:
    for pattern, feature in _FEATURES:
        if pattern.search(name):
            raise UnsupportedAdapterError(f"tensor {name[:200]!r}: {feature}; not supported")


def _first(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(repr(name[:200]) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
