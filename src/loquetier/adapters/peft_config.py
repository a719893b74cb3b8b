"""`adapter_config.json`: each key of PEFT 0.21's ``LoraConfig`` is honoured, inert when serving, or refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loquetier.adapters.safetensors_check import parse_json_object
from loquetier.adapters.spec import LoraSpec, ModulePlan
from loquetier.errors import AdapterError, ConfigError, UnsupportedAdapterError

MAX_CONFIG_BYTES: Final = 1 << 20

_REQUIRED: Final = ("peft_type", "r", "lora_alpha", "target_modules")
_HONOURED: Final = frozenset(
    {
        *_REQUIRED,
        "base_model_name_or_path",
        "lora_dropout",
        "exclude_modules",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
    }
)
_INERT: Final = frozenset(
    {
        "task_type",
        "auto_mapping",  # names the base's class when task_type is not set; we import nothing by it
        "peft_version",
        "revision",
        "inference_mode",
        "runtime_config",  # ignored by PEFT too when it is in a file
        "megatron_core",  # a module name, used only with megatron_config
        "qalora_group_size",  # used only with use_qalora
        "eva_config",  # shapes the initial A only; the ranks it chose are in rank_pattern
        "velora_config",  # changes what training keeps for backward, not the forward pass
    }
)
"""Keys that do not change what a finished adapter computes, whatever their value."""

_DEFAULTS: Final[Mapping[str, tuple[object, ...]]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "fan_in_fan_out": (False,),
    "layer_replication": (None, []),
    "megatron_config": (None, {}),
    "loftq_config": (None, {}),
    "corda_config": (None, {}),
    "lora_ga_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "arrow_config": (None, {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "ensure_weight_tying": (False,),
    # pissa, olora, corda, loftq and lora_ga change the base's own weights at load, and the base is frozen and shared.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}
"""Features that we do not honour, with the values under which PEFT does not use them either."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What we take from one `adapter_config.json`."""

    spec: LoraSpec
    base_name: str | None


def parse_config(text: bytes) -> PeftConfig:
    """Read the text of an `adapter_config.json`.

    Raises:
        UnsupportedAdapterError: a feature that we do not honour, or an unknown key with a value, named.
        AdapterError: not JSON, or a value of the wrong type or out of range.
    """
    fields = parse_json_object(text, "adapter_config.json")
    if fields.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(
            f"adapter_config.json: peft_type={_short(fields.get('peft_type'))}; only 'LORA' is supported"
        )
    for key, value in fields.items():
        _refuse_unsupported(key, value)
    for key in _REQUIRED:
        if fields.get(key) is None:
            raise AdapterError(f"adapter_config.json: {key} is missing or null; PEFT writes it in every LoRA adapter")
    base_name = fields.get("base_model_name_or_path")
    if base_name is not None and not isinstance(base_name, str):
        raise AdapterError(f"adapter_config.json: base_model_name_or_path={_short(base_name)} must be a string")
    return PeftConfig(_spec(fields), base_name or None)


def render_config(spec: LoraSpec, modules: Sequence[ModulePlan], base_name: str | None) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter, with what PEFT, vLLM and SGLang read.

    `target_modules` is always a list, because SGLang takes nothing else: the spec's own names, or for a spec with a
    string the names that match exactly the adapted modules.
    """
    fields = _settings(spec)
    if spec.is_all_linear and not spec.exclude_modules:
        fields["target_modules"] = list(dict.fromkeys(plan.target.path.rpartition(".")[2] for plan in modules))
    elif isinstance(spec.target_modules, str):
        fields["target_modules"] = [plan.target.path for plan in modules]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        **fields,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": False,
        "modules_to_save": None,
        "revision": None,
        "use_dora": False,
    }


def canonical_json(spec: LoraSpec) -> bytes:
    """The settings that decide what an adapter computes, as bytes for a digest: no base name, no order of names."""
    fields = _settings(spec)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(fields[key], list):
            fields[key] = sorted(set(fields[key]))
    # The order of a pattern's keys decides when two match, so it is part of the digest and sort_keys must not touch it.
    for key in ("rank_pattern", "alpha_pattern"):
        fields[key] = list(fields[key].items())
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def adapter_digest(weights_sha256: bytes, spec: LoraSpec) -> str:
    """Identity of an adapter's content: sha256 (hex) over the weights file's own sha256 and the canonical settings."""
    return hashlib.sha256(weights_sha256 + canonical_json(spec)).hexdigest()


def _settings(spec: LoraSpec) -> dict[str, Any]:
    """`spec` under PEFT's names and JSON types; the inverse of `_spec`."""
    layers = spec.layers_to_transform
    return {
        "r": spec.r,
        "lora_alpha": _number(spec.alpha),
        "lora_dropout": spec.dropout,
        "target_modules": _names_out(spec.target_modules),
        "exclude_modules": _names_out(spec.exclude_modules) or None,
        "use_rslora": spec.use_rslora,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {key: _number(alpha) for key, alpha in spec.alpha_pattern.items()},
        "layers_to_transform": None if layers is None else list(layers),
        # PEFT refuses an empty list here when target_modules is a string.
        "layers_pattern": list(spec.layers_pattern) or None,
    }


def _spec(fields: Mapping[str, Any]) -> LoraSpec:
    layers = fields.get("layers_to_transform")
    by_name = fields.get("layers_pattern")
    try:
        return LoraSpec(
            r=fields["r"],
            alpha=fields["lora_alpha"],
            dropout=fields.get("lora_dropout", 0.0),
            target_modules=_names_in(fields["target_modules"]),
            exclude_modules=_names_in(fields.get("exclude_modules") or ()),
            use_rslora=fields.get("use_rslora", False),
            rank_pattern=_or_empty(fields.get("rank_pattern")),
            alpha_pattern=_or_empty(fields.get("alpha_pattern")),
            # To PEFT one number is a list of one, and an empty list is no filter.
            layers_to_transform=(layers,) if isinstance(layers, int) else _names_in(layers) or None,
            layers_pattern=(by_name,) if isinstance(by_name, str) and by_name else _names_in(by_name or ()),
        )
    except ConfigError as error:
        raise AdapterError(f"adapter_config.json: {error}") from error


def _refuse_unsupported(key: str, value: object) -> None:
    if key in _HONOURED or key in _INERT:
        return
    if key in _DEFAULTS:
        # `type` too: 0 == False and 1 == True in Python, and neither is what PEFT writes.
        if any(value == allowed and type(value) is type(allowed) for allowed in _DEFAULTS[key]):
            return
        defaults = " or ".join(repr(allowed) for allowed in _DEFAULTS[key])
        raise UnsupportedAdapterError(
            f"adapter_config.json: {key}={_short(value)} is not supported (only {defaults}); "
            "retrain without it, or convert the adapter to plain LoRA"
        )
    # Not a key of PEFT 0.21. Switched off, it changes nothing; with a value, it may change everything.
    if value not in (None, False, "", 0) and value != [] and value != {}:
        raise UnsupportedAdapterError(
            f"adapter_config.json: unknown key {key[:100]!r} with value {_short(value)}; remove it if it has no effect"
        )


def _names_in(value: Any) -> Any:
    """JSON has no tuples. Other types go through, for LoraSpec to refuse by field name."""
    return tuple(value) if isinstance(value, list) else value


def _names_out(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _or_empty(value: Any) -> Any:
    return {} if value is None else value


def _number(value: float) -> int | float:
    """Whole numbers as integers: readers with a typed `lora_alpha` expect one."""
    return int(value) if value.is_integer() else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
