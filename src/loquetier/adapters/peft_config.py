"""`adapter_config.json`: each key of PEFT 0.21's configs is honoured, inert when serving, or refused by name.

Which key is what, a method says (`Method.rules`). A key that PEFT 0.21 does not have is ignored, and told, where it or
an older one wrote the file: then the key is none of PEFT's. In a newer one's file it may be a feature, and is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loquetier.adapters.methods import method_of, method_of_config
from loquetier.adapters.methods.method import ConfigRules
from loquetier.adapters.peft_fields import short
from loquetier.adapters.safetensors_check import parse_json_object
from loquetier.adapters.spec import LORA, AdapterSpec, ModulePlan
from loquetier.errors import AdapterError, ConfigError, UnsupportedAdapterError

MAX_CONFIG_BYTES: Final = 1 << 20
KNOWN_PEFT: Final = (0, 21)
"""The version whose keys the rules list."""
_NEVER_IGNORED: Final = {
    "auto_map": "it names code to run",
    "enable_lora": "PEFT 0.2 split merged linears by it, and newer ones cannot read such an adapter",
}
"""Keys that PEFT 0.21 does not have and that mean something all the same."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What we take from one `adapter_config.json`."""

    spec: AdapterSpec
    base_name: str | None
    ignored: tuple[str, ...] = ()
    """Keys with a value that are not PEFT's, shortened."""


def parse_config(text: bytes) -> PeftConfig:
    """Read the text of an `adapter_config.json`.

    Raises:
        UnsupportedAdapterError: a feature that we do not honour, or an unknown key that may be one, named.
        AdapterError: not JSON, or a value of the wrong type or out of range.
    """
    fields = parse_json_object(text, "adapter_config.json")
    method = method_of_config(fields)
    ignored = [key for key, value in fields.items() if _is_ignored(method.rules, key, value)]
    if ignored:
        _refuse_unknown(ignored, fields)
    for key in method.rules.required:
        if fields.get(key) is None:
            kind = method.rules.peft_type
            raise AdapterError(
                f"adapter_config.json: {key} is missing or null; PEFT writes it in every adapter of type {kind}"
            )
    base_name = fields.get("base_model_name_or_path")
    if base_name is not None and not isinstance(base_name, str):
        raise AdapterError(f"adapter_config.json: base_model_name_or_path={short(base_name)} must be a string")
    try:
        return PeftConfig(method.spec_of(fields), base_name or None, tuple(key[:100] for key in ignored))
    except ConfigError as error:
        raise AdapterError(f"adapter_config.json: {error}") from error


def render_config(spec: AdapterSpec, modules: Sequence[ModulePlan], base_name: str | None) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter, with what PEFT (and for LoRA vLLM and SGLang) read."""
    method = method_of(spec.method)
    return {
        "peft_type": method.rules.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        **method.settings(spec, modules),
        **method.rules.constants,
    }


def canonical_json(spec: AdapterSpec) -> bytes:
    """The settings that decide what an adapter computes, as bytes for a digest: no base name, no order of names."""
    fields = method_of(spec.method).settings(spec)
    for key, value in fields.items():
        if isinstance(value, list) and key.endswith("_modules"):
            fields[key] = sorted(set(value))
        if isinstance(value, dict):
            # The order of a pattern's keys decides when two match, so sort_keys must not touch it.
            fields[key] = list(value.items())
    if spec.method != LORA:
        fields["method"] = spec.method
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def adapter_digest(weights_sha256: bytes, spec: AdapterSpec) -> str:
    """Identity of an adapter's content: sha256 (hex) over the weights file's own sha256 and the canonical settings."""
    return hashlib.sha256(weights_sha256 + canonical_json(spec)).hexdigest()


def _is_ignored(rules: ConfigRules, key: str, value: object) -> bool:
    """Whether a key is none of PEFT 0.21's and has a value. Raises UnsupportedAdapterError."""
    if key in rules.required or key in rules.honoured or key in rules.inert:
        return False
    if key in rules.defaults:
        # `type` too: 0 == False and 1 == True in Python, and neither is what PEFT writes.
        if any(value == allowed and type(value) is type(allowed) for allowed in rules.defaults[key]):
            return False
        defaults = " or ".join(repr(allowed) for allowed in rules.defaults[key])
        raise UnsupportedAdapterError(
            f"adapter_config.json: {key}={short(value)} is not supported (only {defaults}); "
            "retrain without it, or convert the adapter to plain LoRA"
        )
    # Switched off, it changes nothing, whatever it is.
    return value not in (None, False, "", 0) and value != [] and value != {}


def _refuse_unknown(keys: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Raises UnsupportedAdapterError where one of these keys, which PEFT 0.21 does not have, may mean something."""
    for key in keys:
        if key in _NEVER_IGNORED:
            raise UnsupportedAdapterError(
                f"adapter_config.json: {key}={short(fields[key])} is refused: {_NEVER_IGNORED[key]}; remove it if the "
                "adapter does not need it"
            )
    version = fields.get("peft_version")
    if version is not None and not _is_known(version):
        raise UnsupportedAdapterError(
            f"adapter_config.json: unknown key {keys[0][:100]!r} with value {short(fields[keys[0]])}, and PEFT "
            f"{short(version)} wrote it: it may be a feature that PEFT {'.'.join(map(str, KNOWN_PEFT))} does not have, "
            "and ours are that version's; remove it if it has no effect"
        )


def _is_known(version: object) -> bool:
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) <= KNOWN_PEFT
