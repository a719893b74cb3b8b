"""A `TrainStack` where the machine has its kernels, used only if it gives the model's own gradients on a probe."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loquetier.base.attention import STEP_KEYWORD
from loquetier.base.context import StepContext
from loquetier.base.footprint import LayerFootprint
from loquetier.base.fused import FusedLayer, FusedStack
from loquetier.base.fused_train import TrainStack
from loquetier.kernels.native_train_attention import NativeTrainAttention
from loquetier.kernels.rowgrads import RowGrads
from loquetier.kernels.rowops import RowOps
from loquetier.kernels.select import Kernels

log = logging.getLogger("loquetier.base")

_SPANS = ((0, 7), (7, 24))
_TOLERANCE = 3e-2
"""Of the gradient of all rows (root mean square): bfloat16 rounds after every operation of the model's own code."""
_ROW_TOLERANCE = 8e-2
"""The same of the row that is furthest off: with a norm behind each half and few dimensions, rows reach 4e-2."""


def train_stack(
    fused: FusedStack, layers: list[nn.Module], kernels: Kernels, run: Callable[..., Any]
) -> TrainStack | None:
    """The stack with a backward, or None (with one log line) when a kernel is missing or gives other gradients.

    Args:
        fused: verified forward: what remains to be shown is the backward, whose code is the same for all layers.
        run: ``(call, step)``: makes `step` the running step around ``call()``.
    """
    library = kernels.native("row_grads")
    if library is None or kernels.native("train_attention") is None:
        return None
    stack = TrainStack(fused, RowOps(library), RowGrads(library), NativeTrainAttention(library))
    kinds = {(layer.angles, layer.attention_rule): number for number, layer in enumerate(fused.layers)}
    for number in sorted({0, *kinds.values()}):  # the first, and the last of each kind
        error, worst = _error(stack, number, layers[number], run)
        if not (error <= _TOLERANCE and worst <= _ROW_TOLERANCE):  # NaN fails too
            log.info(
                "training runs the model's own code: gradients of layer %d differ by %.1e, of a row by %.1e",
                number, error, worst,
            )  # fmt: skip
            return None
    return stack


def _error(stack: TrainStack, number: int, layer: nn.Module, run: Callable[..., Any]) -> tuple[float, float]:
    """Difference of what the layer adds to the gradient that goes past it: of all rows, and the largest of a row."""
    num_rows = _SPANS[-1][1]
    generator = torch.Generator().manual_seed(number)
    weight = stack.fused.last_norm.weight_D
    x, dy = (torch.randn(1, num_rows, len(weight), generator=generator).to(weight.dtype) for _ in range(2))
    positions = torch.cat([torch.arange(b - a) for a, b in _SPANS])
    cos_AMD, sin_AMD = stack.fused.angles(x[0], positions)
    kind = stack.fused.layers[number].angles or 0
    angles = (cos_AMD[kind][None], sin_AMD[kind][None])
    step = StepContext(num_rows=num_rows, num_train=num_rows, spans=_SPANS)

    def own(x: Tensor) -> Tensor:
        out = layer(x, position_embeddings=angles, **{STEP_KEYWORD: step})
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    grads = []
    for call in (own, lambda x: stack.run_layer(number, x, angles, step)):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            out = run(lambda call=call, leaf=leaf: call(leaf), step)
        grads.append(torch.autograd.grad(out, leaf, dy)[0].double() - dy.double())
    theirs, ours = grads
    worst = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max()
    return float((ours - theirs).norm() / theirs.norm()), float(worst)


def train_footprints(stack: TrainStack, widest: tuple[LayerFootprint, ...]) -> tuple[LayerFootprint, ...]:
    """What each layer of the stack keeps per TRAIN row, in place of the model's own layers' `widest`."""
    return tuple(
        LayerFootprint(_kept(stack.fused, layer), (), own.mlp)
        for layer, own in zip(stack.fused.layers, widest, strict=True)
    )


def _kept(fused: FusedStack, layer: FusedLayer) -> int:
    """Floats: see `fused_train._Kept`."""
    hidden = layer.o.weight_NK.shape[0]
    heads, kv_heads, dim = fused.heads, fused.kv_heads, fused.head_dim
    raw = (heads + kv_heads) * dim if layer.q_norm is not None or layer.k_norm is not None else 0
    log_sums = 2 * heads  # float32
    behind = hidden * sum(norm is not None for norm in (layer.o_norm, layer.down_norm))
    return 2 * hidden + behind + raw + (2 * heads + 2 * kv_heads) * dim + log_sums + layer.gate_up.weight_NK.shape[0]
