"""How many bytes training keeps per train row, from the shapes of the decoder layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loquetier.base.linear import VirtualLinear


@dataclass(frozen=True, slots=True)
class LinearInput:
    """One tensor that a group of linears reads. It is kept when one of them is trained."""

    modules: frozenset[int]
    floats: int


@dataclass(frozen=True, slots=True)
class LayerFootprint:
    """Floats per TRAIN row of one layer, by what keeps them."""

    fixed: int
    """The layer's input, attention, norms, gated activations."""
    inputs: tuple[LinearInput, ...]
    mlp: int
    """Width of the widest MLP: its temporaries are the layer's largest."""

    def kept(self, trained: Collection[int] | None = None) -> int:
        """What the layer's graph keeps when these modules are trained (None: all)."""
        kept = (i.floats for i in self.inputs if trained is None or not i.modules.isdisjoint(trained))
        return self.fixed + sum(kept)


def layer_footprints(layers: Sequence[nn.Module], config: Any, head_dim: int) -> tuple[LayerFootprint, ...]:
    """One for each layer; dense layers within 15 % of what is measured.

    Routed experts are counted by the rows that they gather; how they keep them is transformers' affair.
    """
    return tuple(_layer(layer, config, head_dim) for layer in layers)


def _layer(layer: nn.Module, config: Any, head_dim: int) -> LayerFootprint:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    hidden = int(config.hidden_size)
    attention = 2 * (heads + kv_heads) * head_dim + heads  # q, k, v, output, log-sum-exp
    groups = {id(m.group): m for m in layer.modules() if isinstance(m, VirtualLinear)}
    inputs = tuple(
        LinearInput(frozenset(a.module for a in m.group.adapted), int(m.in_features)) for m in groups.values()
    )
    others = sum(_kept_by(name, module, config, head_dim) for name, module in layer.named_modules())
    return LayerFootprint(hidden + attention + others, inputs, max((_mlp_width(m) for m in layer.modules()), default=0))


def _mlp_width(module: nn.Module) -> int:
    down = getattr(module, "down_proj", None)
    if isinstance(down, nn.Module):
        return int(down.in_features)  # type: ignore[arg-type]
    return 0 if down is None else int(down.shape[2])


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
