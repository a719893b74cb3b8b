"""Small random models, one per architecture family, and directories that hold them. Built by config: no downloads.

Weights are drawn with a standard deviation of 0.3 (0.02 is Hugging Face's): logits then differ by whole units between
tokens, so that a wrong mask, position or row shows far above rounding error, and greedy choices are not ties.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

VOCAB = 300
"""256 bytes, 4 special tokens, the rest unused."""
PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
STD = 0.3

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ':' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)

_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Supported families with a builder here, each of a shape of its own."""

_FAMILIES |= {
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "ministral": ("MinistralConfig", "MinistralForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
    "seed_oss": ("SeedOssConfig", "SeedOssForCausalLM", {}),
    "cwm": (
        "CwmConfig",
        "CwmForCausalLM",
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}
BESIDE: tuple[str, ...] = tuple(name for name in _FAMILIES if name not in FAMILIES)
"""More of them, of the same shapes: for what goes by a family's name."""


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    head_dim: int = 8,
    kv_heads: int = 2,
    vocab: int = VOCAB,
    context: int = 256,
    tie: bool = False,
    **overrides: Any,
) -> Any:
    """A random fp32 `PreTrainedModel` in eval mode, two q heads per kv head; `overrides` go to the config."""
    config_class, model_class, extra = _FAMILIES[family]
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": tie,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **{key: _per_layer(value, layers) for key, value in extra.items()},
        **overrides,
    }
    # phi3, granite, olmo2 and smollm3 derive the head size instead of taking it.
    if family in ("phi3", "granite", "olmo2", "smollm3"):
        settings.setdefault("hidden_size", 2 * kv_heads * head_dim)
        assert settings["hidden_size"] == 2 * kv_heads * head_dim, "this family needs hidden == heads * head_dim"
    else:
        settings["head_dim"] = head_dim
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config)
    randomize(model, seed)
    return model.float().eval()


def _per_layer(value: Any, layers: int) -> Any:
    """A list in _FAMILIES is one entry per layer: repeated or cut to the number of layers."""
    return [value[i % len(value)] for i in range(layers)] if isinstance(value, list) else value


def randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter seeded random values; norms stay near their start, so activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(STD * noise)


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer with a chat template: token 4 + b is byte b, so any text round-trips."""
    alphabet = _byte_alphabet()
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _byte_alphabet() -> list[str]:
    """The printable stand-ins of byte-level BPE, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [stand_in[byte] for byte in range(256)]


def save_tiny(directory: Path, family: str, **settings: Any) -> Any:
    """Write a loadable Hugging Face directory (config, safetensors, tokenizer); returns the model that it holds."""
    model = tiny_model(family, **settings)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model


_REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "dynamic_rope": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
        },
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 1},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
}

REFUSED: tuple[str, ...] = tuple(_REFUSED)
"""Kinds of models that must not pass the gate."""


def refused_model(kind: str) -> Any:
    """A tiny model that cannot be served exactly."""
    config_class, model_class, extra = _REFUSED[kind]
    settings: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if kind != "gpt2":
        settings |= {"hidden_size": 32, "num_hidden_layers": 2}
    if kind not in ("gpt2", "mamba2"):
        settings |= {
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
    config = getattr(transformers, config_class)(**(settings | extra))
    return getattr(transformers, model_class)(config).float().eval()
