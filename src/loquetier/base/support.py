"""Which Hugging Face models can be served exactly, and where adapters may sit on them.

The gate is static: it reads the config and the module tree, works on a model without memory (torch's meta device), and
refuses by model name and reason. What it lets through still has to pass the numeric checks made at surgery.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from loquetier.adapters.spec import LinearTarget
from loquetier.errors import UnsupportedModelError

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_MLA = frozenset({"q_a_proj", "kv_a_proj", "kv_a_proj_with_mqa"})


def decoder_stack(model: Any) -> nn.Module:
    """The module that embeds tokens and runs the decoder layers (``model.model`` in a Llama).

    Raises:
        UnsupportedModelError: the model is not built that way.
    """
    stack = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
    layers = getattr(stack, "layers", None)
    expected = getattr(model.config, "num_hidden_layers", None)
    if not isinstance(stack, nn.Module) or not isinstance(layers, nn.ModuleList) or len(layers) != expected:
        raise _refusal(model.config, f"no list of {expected} decoder layers found at {model.base_model_prefix}.layers")
    return stack


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers in order. Raises as `decoder_stack`."""
    layers = decoder_stack(model).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def check_supported(model: Any) -> None:
    """Pass, or refuse a Hugging Face causal language model that we could not serve exactly.

    Raises:
        UnsupportedModelError: names the model type and the reason.
    """
    check_config(model.config)
    for rule in _MODEL_RULES:
        if reason := rule(model):
            raise _refusal(model.config, reason)
    for number, layer in enumerate(decoder_layers(model)):
        for layer_rule in _LAYER_RULES:
            if reason := layer_rule(layer):
                raise _refusal(model.config, f"decoder layer {number}: {reason}")
    sizes = {_head_dim(attention) for layer in decoder_layers(model) for attention in attention_modules(layer)}
    if len(sizes) > 1:
        raise _refusal(model.config, f"its layers differ in head size ({sorted(map(str, sizes))})")


def check_config(config: Any) -> None:
    """The part of the gate that needs no model. Raises as `check_supported`."""
    for rule in _CONFIG_RULES:
        if reason := rule(config):
            raise _refusal(config, reason)


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """The modules inside `layer` that call the attention interface: they know their layer and their causality."""
    return [m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


def linear_targets(model: Any) -> tuple[LinearTarget, ...]:
    """Every linear that an adapter may sit on, in module order; the canonical order of the arena's columns.

    Those are all nn.Linear inside decoder layers, and lm_head if it is a linear with weights of its own. Linears
    inside a list of experts are left out: they see a routed part of the rows, not all.
    """
    targets: list[LinearTarget] = []
    for path, linear, layer in _named_linears(model):
        targets.append(
            LinearTarget(
                path=path,
                index=len(targets),
                in_features=linear.in_features,
                out_features=linear.out_features,
                layer=layer,
            )
        )
    return tuple(targets)


def _named_linears(model: Any) -> Iterator[tuple[str, nn.Linear, int | None]]:
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and "experts" not in name.split("."):
                yield f"{prefix}.{number}.{name}", module, number
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and not getattr(model.config, "tie_word_embeddings", False):
        yield next(name for name, module in model.named_modules() if module is head), head, None


def _refusal(config: Any, reason: str) -> UnsupportedModelError:
    name = getattr(config, "model_type", type(config).__name__)
    return UnsupportedModelError(f"model type {name!r} cannot be served exactly: {reason}; choose another base")


# Rules: each returns the reason to refuse, or None.


def _multimodal(config: Any) -> str | None:
    if getattr(config, "text_config", None) is not None:
        return "multimodal wrapper (its config has a text_config); only text-only decoders are served"
    return None


def _encoder_decoder(config: Any) -> str | None:
    return "encoder-decoder model" if getattr(config, "is_encoder_decoder", False) else None


def _quantized(config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return f"quantized weights ({method}); only float weights are served for now"


def _layer_types(config: Any) -> str | None:
    names = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    if "attention" in names:  # how older hybrids spell it
        names = (names - {"attention"}) | {"full_attention"}
    if strange := sorted(names - _LAYER_TYPES):
        return f"hybrid or special layers ({', '.join(strange)}); only full and sliding attention layers are served"
    return None


def _rope(config: Any) -> str | None:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Either one dict, or one per layer type.
    for entry in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = entry.get("rope_type", entry.get("type", "default")) or "default"
        if kind == "longrope" or "dynamic" in kind:
            return (
                f"RoPE type {kind!r} takes its frequencies from the longest sequence of the batch, so one "
                "request would change another's answer"
            )
    return None


def _extra_inputs(config: Any) -> str | None:
    for field in ("hidden_size_per_layer_input", "altup_num_inputs"):
        if getattr(config, field, None):
            return f"per-layer inputs ({field})"
    if getattr(config, "num_kv_shared_layers", None):
        return "layers that share another layer's keys and values (num_kv_shared_layers)"
    return None


def _bidirectional(config: Any) -> str | None:
    return "bidirectional attention" if getattr(config, "use_bidirectional_attention", None) else None


def _no_interface(model: Any) -> str | None:
    # Falcon-like models set it per instance; only a plain True is a promise.
    if getattr(model, "_supports_attention_backend", False) is not True:
        return "its code has no pluggable attention (_supports_attention_backend)"
    return None


def _recurrent(model: Any) -> str | None:
    return "recurrent state (hybrid or state-space layers)" if getattr(model, "_is_stateful", False) else None


def _transposed_linears(model: Any) -> str | None:
    name = next((name for name, module in model.named_modules() if isinstance(module, Conv1D)), None)
    return f"{name} is a Conv1D, not a linear" if name is not None else None


def _quantizer(model: Any) -> str | None:
    return "quantized weights (hf_quantizer)" if getattr(model, "hf_quantizer", None) is not None else None


def _not_checkpointable(layer: nn.Module) -> str | None:
    if not isinstance(layer, GradientCheckpointingLayer):
        return f"{type(layer).__name__} is not a GradientCheckpointingLayer, so it cannot be cut at its input"
    return None


def _foreign_modules(layer: nn.Module) -> str | None:
    for name, module in layer.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Conv1d):
            return f"{name} mixes neighbouring tokens (convolution, as in hybrid and recurrent layers)"
        if last in _MLA:
            return f"multi-head latent attention ({name})"
        if re.search(r"mamba|deltanet|rwkv|recurrent|linearattention", type(module).__name__, re.IGNORECASE):
            return f"recurrent or linear attention ({type(module).__name__})"
    return None


def _sinks(layer: nn.Module) -> str | None:
    names = [name for name, _ in layer.named_parameters() if re.search(r"(^|\.|_)sinks?($|\.|_)", name)]
    return f"attention sinks ({names[0]})" if names else None


def _one_attention(layer: nn.Module) -> str | None:
    found = attention_modules(layer)
    if len(found) != 1:
        return f"{len(found)} attention modules, expected exactly one"
    return None if found[0].is_causal else "its attention is not causal"


def _head_dim(attention: nn.Module) -> Any:
    return getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)


_CONFIG_RULES: tuple[Callable[[Any], str | None], ...] = (
    _encoder_decoder,
    _multimodal,
    _quantized,
    _layer_types,
    _rope,
    _extra_inputs,
    _bidirectional,
)
_MODEL_RULES: tuple[Callable[[Any], str | None], ...] = (_recurrent, _transposed_linears, _no_interface, _quantizer)
_LAYER_RULES: tuple[Callable[[nn.Module], str | None], ...] = (
    _foreign_modules,
    _sinks,
    _not_checkpointable,
    _one_attention,
)
