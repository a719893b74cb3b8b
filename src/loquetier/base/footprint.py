"""How many bytes the tapes take, from the shapes of the decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loquetier.base.linear import VirtualLinear


def graph_row_bytes(layers: Sequence[nn.Module], config: Any, head_dim: int, itemsize: int) -> int:
    """Bytes per TRAIN row over all layers, with adapters on every linear; dense layers within 15 % of what is measured.

    Routed experts are counted by the rows that they gather; how they keep them is transformers' affair.
    """
    return itemsize * sum(_layer_floats(layer, config, head_dim) for layer in layers)


@dataclass(frozen=True, slots=True)
class ReplayFootprint:
    """Bytes of a replay tape: what it keeps of a row, and what is made beside that while something of it runs."""

    row: int
    """Kept per TRAIN row: layer inputs, K and V of all layers, the gradient of one layer's output, cos and sin."""
    forward_row: int
    """Per row of the window whose forward runs."""
    unit_row: int
    """Per row of the window whose unit runs: one layer's graph and, for its backward, seven tenths of it again."""
    past_row: int
    """Per TRAIN row before that window: gradients of one layer's K and V, and their sum in the making."""
    score: int
    """Per row of a window and row that it attends to: soft-capped scores, which are written out, or else the mask."""
    loss_row: int
    """Per labelled row whose logits live: these and their gradient."""

    def peak(self, rows: int, forward_rows: int, unit_rows: int, loss_rows: int) -> int:
        """Most bytes at once of a tape of so many rows. The adapters' own gradients are not part of it.

        Args:
            rows: of the tape.
            forward_rows: most rows of a forward's window: `max_train_rows`.
            unit_rows: most rows of a unit's window: `train_window`.
            loss_rows: most labelled rows whose logits live at once: `training.loss.CHUNK_ROWS`.
        """
        width, unit_width = min(rows, forward_rows), min(rows, unit_rows)
        forward = width * (self.forward_row + rows * self.score // 2)
        unit = (rows - unit_width) * self.past_row + unit_width * (self.unit_row + rows * self.score)
        return rows * self.row + max(forward, unit, min(width, loss_rows) * self.loss_row)


def replay_footprint(layers: Sequence[nn.Module], config: Any, head_dim: int, itemsize: int) -> ReplayFootprint:
    """What a replay tape takes with trained weights in every layer; dense layers, within 16 % of what is measured."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    kv = 2 * int(getattr(config, "num_key_value_heads", None) or heads) * head_dim
    widest = max(_layer_floats(layer, config, head_dim) for layer in layers)
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return ReplayFootprint(
        row=itemsize * (len(layers) * (hidden + kv) + hidden + 2 * head_dim) + 8,
        past_row=2 * 4 * kv,
        forward_row=itemsize * widest,
        unit_row=17 * itemsize * widest // 10,
        score=4 * heads * 4 if is_capped else 1,
        # In float32 the logits and their gradient; in a narrower type these in float32 beside both in that type.
        loss_row=int(config.vocab_size) * (8 if itemsize == 4 else 8 + 2 * itemsize),
    )


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
