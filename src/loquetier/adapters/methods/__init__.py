"""The adapter methods. A new one is one file beside `lora.py`, and its name here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loquetier.adapters.methods.dora import Dora
from loquetier.adapters.methods.ia3 import Ia3
from loquetier.adapters.methods.lora import Lora
from loquetier.adapters.methods.method import Method
from loquetier.adapters.peft_fields import short
from loquetier.adapters.spec import ModulePlan
from loquetier.errors import UnsupportedAdapterError

LORA_METHOD: Final[Method] = Lora()
METHODS: Final[tuple[Method, ...]] = (LORA_METHOD, Dora(), Ia3())


def find_method(name: object) -> Method | None:
    """The method of this name, if there is one."""
    return next((method for method in METHODS if method.name == name), None)


def method_of(name: str) -> Method:
    """The method of a spec or a plan. An unknown one is our own bug: they name the method that made them."""
    method = find_method(name)
    assert method is not None, name
    return method


def method_of_config(fields: Mapping[str, Any]) -> Method:
    """The method of an `adapter_config.json`.

    Raises:
        UnsupportedAdapterError: a type of adapter that we do not have.
    """
    method = next((method for method in METHODS if method.reads(fields)), None)
    if method is None:
        known = ", ".join(dict.fromkeys(repr(method.rules.peft_type) for method in METHODS))
        raise UnsupportedAdapterError(
            f"adapter_config.json: peft_type={short(fields.get('peft_type'))}; only {known} are supported"
        )
    return method


def slot_method(modules: Sequence[ModulePlan]) -> Method:
    """The method of a slot with these modules."""
    assert len({plan.method for plan in modules}) <= 1, "a slot holds one method"
    return method_of(modules[0].method) if modules else LORA_METHOD
