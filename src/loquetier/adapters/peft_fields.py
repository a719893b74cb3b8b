"""Values of an `adapter_config.json` in both directions, as every method's settings have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loquetier.adapters.spec import AdapterSpec, ModulePlan, is_all_linear


def names_in(value: Any) -> Any:
    """JSON has no tuples. Other types go through, for the spec to refuse by field name."""
    return tuple(value) if isinstance(value, list) else value


def names_out(value: str | tuple[str, ...]) -> str | list[str]:
    """A pattern as it is, names as a list."""
    return value if isinstance(value, str) else list(value)


def number(value: float) -> int | float:
    """Whole numbers as integers: readers with a typed `lora_alpha` expect one."""
    return int(value) if value.is_integer() else value


def written_targets(spec: AdapterSpec, modules: Sequence[ModulePlan]) -> list[str]:
    """`target_modules` as a list, because SGLang takes nothing else.

    The spec's own names, or for a spec with a string the names that match exactly the adapted modules.
    """
    if is_all_linear(spec) and not spec.exclude_modules:
        return list(dict.fromkeys(plan.target.path.rpartition(".")[2] for plan in modules))
    if isinstance(spec.target_modules, str):
        return [plan.target.path for plan in modules]
    return list(spec.target_modules)


def short(value: object) -> str:
    """`repr`, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
