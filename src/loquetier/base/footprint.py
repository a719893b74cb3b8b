"""How many bytes a graph tape keeps per train row, from the shapes of the decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from loquetier.base.linear import VirtualLinear


def graph_row_bytes(layers: Sequence[nn.Module], config: Any, head_dim: int, itemsize: int) -> int:
    """Bytes per TRAIN row over all layers, with adapters on every linear; dense layers within 15 % of what is measured.

    Routed experts are counted by the rows that they gather; how they keep them is transformers' affair.
    """
    return itemsize * sum(_layer_floats(layer, config, head_dim) for layer in layers)


def _layer_floats(layer: nn.Module, config: Any, head_dim: int) -> int:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    leaf = int(config.hidden_size)
    attention = 2 * (heads + kv_heads) * head_dim + heads  # q, k, v, output, log-sum-exp
    inputs = {id(m.group): m.in_features for m in layer.modules() if isinstance(m, VirtualLinear)}
    return (
        leaf
        + attention
        + sum(inputs.values())
        + sum(_kept_by(name, module, config, head_dim) for name, module in layer.named_modules())
    )


def _kept_by(name: str, module: nn.Module, config: Any, head_dim: int) -> int:
    """Inputs of norms, of gated activations, and rows gathered by routed experts."""
    weight = getattr(module, "weight", None)
    if type(module).__name__.endswith("Norm") and not list(module.children()) and weight is not None:
        if weight.numel() != head_dim:
            return int(weight.numel())
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return int(kv_heads if "k_" in name.rpartition(".")[2] else heads) * head_dim
    down = getattr(module, "down_proj", None)
    if isinstance(down, nn.Module):
        return 2 * int(down.in_features)  # type: ignore[arg-type]
    if down is not None:  # [experts, hidden, intermediate]
        top_k = int(getattr(config, "num_experts_per_tok", None) or 1)
        return top_k * (2 * int(down.shape[1]) + 4 * int(down.shape[2]))
    return 0
