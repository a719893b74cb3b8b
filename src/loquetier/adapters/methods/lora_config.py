"""The keys of PEFT 0.21's ``LoraConfig``, for the two methods that have it: LoRA and DoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from loquetier.adapters.methods.method import ConfigRules
from loquetier.adapters.peft_fields import names_in, names_out, number, written_targets
from loquetier.adapters.spec import LoraSpec, ModulePlan

RULES: Final = ConfigRules(
    peft_type="LORA",
    required=("peft_type", "r", "lora_alpha", "target_modules"),
    honoured=frozenset(
        {
            "base_model_name_or_path",
            "lora_dropout",
            "exclude_modules",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "layers_to_transform",
            "layers_pattern",
        }
    ),
    inert=frozenset(
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
    ),
    defaults={
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
        # pissa, olora, corda, loftq and lora_ga change the base's own weights at load, and the base is frozen and
        # shared.
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
    },
    constants={
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": False,
        "modules_to_save": None,
        "revision": None,
        "use_dora": False,
    },
)
DORA_RULES: Final = replace(
    RULES,
    honoured=RULES.honoured | {"use_dora"},
    defaults={key: values for key, values in RULES.defaults.items() if key != "use_dora"},
    constants={**RULES.constants, "use_dora": True},
)


def settings(spec: LoraSpec, modules: Sequence[ModulePlan] | None) -> dict[str, Any]:
    """`spec` under PEFT's names and JSON types; the inverse of `spec_of`."""
    layers = spec.layers_to_transform
    return {
        "r": spec.r,
        "lora_alpha": number(spec.alpha),
        "lora_dropout": spec.dropout,
        "target_modules": names_out(spec.target_modules) if modules is None else written_targets(spec, modules),
        "exclude_modules": names_out(spec.exclude_modules) or None,
        "use_rslora": spec.use_rslora,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {key: number(alpha) for key, alpha in spec.alpha_pattern.items()},
        "layers_to_transform": None if layers is None else list(layers),
        # PEFT refuses an empty list here when target_modules is a string.
        "layers_pattern": list(spec.layers_pattern) or None,
    }


def spec_of(fields: Mapping[str, Any]) -> LoraSpec:
    """Raises ConfigError for a value of the wrong type or out of range."""
    layers, by_name = fields.get("layers_to_transform"), fields.get("layers_pattern")
    return LoraSpec(
        r=fields["r"],
        alpha=fields["lora_alpha"],
        dropout=fields.get("lora_dropout", 0.0),
        target_modules=names_in(fields["target_modules"]),
        exclude_modules=names_in(fields.get("exclude_modules") or ()),
        use_rslora=fields.get("use_rslora", False),
        rank_pattern=_or_empty(fields.get("rank_pattern")),
        alpha_pattern=_or_empty(fields.get("alpha_pattern")),
        # To PEFT one number is a list of one, and an empty list is no filter.
        layers_to_transform=(layers,) if isinstance(layers, int) else names_in(layers) or None,
        layers_pattern=(by_name,) if isinstance(by_name, str) and by_name else names_in(by_name or ()),
        use_dora=fields.get("use_dora", False),
    )


def _or_empty(value: Any) -> Any:
    return {} if value is None else value
