"""Build a `FusedStack` for a model, and use it only if it gives the model's own results on a probe.

Three gates. By name: layers whose code was read, since numbers on a probe cannot show a branch that it did not take. By
structure: exactly the modules that `FusedStack` knows, nothing beside them. By numbers: each layer, given
the input that it had in a forward of the model itself, must give that forward's output; so must the embedding, the
rotary angles and the last norm. What attention is called with (scaling, window) is recorded in that same forward.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from loquetier.base.attention import ATTENTION_NAME, STEP_KEYWORD, unified_attention
from loquetier.base.context import StepContext
from loquetier.base.fused import FusedLayer, FusedStack, of_kind
from loquetier.base.linear import LinearGroup, VirtualLinear
from loquetier.kernels.rowops import GELU_TANH, SILU, Norm, RowKernels

log = logging.getLogger("loquetier.base")

LAYERS_READ = frozenset(
    f"{family}DecoderLayer"
    for family in (
        "Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "SeedOss", "Cwm", "SmolLM3", "Phi3",
        "Gemma", "Gemma2", "Gemma3",
    )
)  # fmt: skip
"""Decoder layers of transformers whose code is what `FusedLayer` says, whatever their config."""
_PROBE_NAME = "loquetier_probe"
_PROBE_SPANS = ((0, 5), (5, 16))
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Of what a layer adds (root mean square per row): float32 roundings; in bfloat16 those of every operation."""


class _Unlike(Exception):
    """The model is not of the shape, or not of the numbers; the message says where."""


@dataclass
class _Record:
    """What a forward of the model itself did."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    angles: list[Any] = field(default_factory=list)
    attention: dict[int, dict[str, Any]] = field(default_factory=dict)
    final: Tensor | None = None


def fused_stack(
    model: nn.Module, stack: nn.Module, layers: Sequence[nn.Module], ops: RowKernels, run: Callable[..., Any]
) -> FusedStack | None:
    """The fused form of `stack`, or None (with one log line) when it is of another shape or gives other numbers.

    Args:
        run: ``(call, step)``: makes `step` the running step around ``call()``.
    """
    try:
        if other := next((n for layer in layers if (n := type(layer).__name__) not in LAYERS_READ), None):
            raise _Unlike(f"there is no fused form of {other}")
        ids_M, positions_M, step = _probe(model)
        record = _recorded(model, stack, layers, ids_M, positions_M, step, run)
        fused = _build(stack, layers, ops, record)
        run(lambda: _compare(fused, ops, record, ids_M, positions_M, step), step)
    except _Unlike as reason:
        log.info("layers run as the model's own code: %s", reason)
        return None
    return fused


def _probe(model: nn.Module) -> tuple[Tensor, Tensor, StepContext]:
    num_rows = _PROBE_SPANS[-1][1]
    generator = torch.Generator().manual_seed(0)
    ids_M = torch.randint(0, int(model.config.vocab_size), (num_rows,), generator=generator)  # type: ignore[union-attr,arg-type]
    positions_M = torch.cat([torch.arange(stop - start) for start, stop in _PROBE_SPANS])
    device = next(model.parameters()).device
    ids_M, positions_M = ids_M.to(device), positions_M.to(device)
    return ids_M, positions_M, StepContext(num_rows=num_rows, spans=_PROBE_SPANS)


def _recorded(
    model: nn.Module,
    stack: nn.Module,
    layers: Sequence[nn.Module],
    ids_M: Tensor,
    positions_M: Tensor,
    step: StepContext,
    run: Callable[..., Any],
) -> _Record:
    record = _Record()

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        record.attention[int(module.layer_idx)] = {n: a for n, a in kwargs.items() if n in _ATTENTION_KEYWORDS}  # type: ignore[arg-type]
        return unified_attention(module, q, k, v, mask, **kwargs)

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record.inputs.append((args[0] if args else kwargs["hidden_states"])[0].clone())
        record.outputs.append((output[0] if isinstance(output, tuple) else output)[0].clone())
        record.angles.append(kwargs.get("position_embeddings"))

    hooks = [layer.register_forward_hook(leave, with_kwargs=True) for layer in layers]
    AttentionInterface.register(_PROBE_NAME, attend)
    model.set_attn_implementation(_PROBE_NAME)  # type: ignore[operator]
    try:
        with torch.no_grad():
            call = {"input_ids": ids_M[None], "position_ids": positions_M[None], STEP_KEYWORD: step}
            out = run(lambda: stack(past_key_values=None, use_cache=False, **call), step)
    finally:
        model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
        for hook in hooks:
            hook.remove()
    record.final = out.last_hidden_state[0]
    return record


_ATTENTION_KEYWORDS = ("scaling", "sliding_window", "softcap", "s_aux")


def _build(stack: nn.Module, layers: Sequence[nn.Module], ops: RowKernels, record: _Record) -> FusedStack:
    children = _children(stack, {"embed_tokens", "layers", "norm", "rotary_emb"})
    if len(record.outputs) != len(layers):
        raise _Unlike("layers run more or less than once")
    rotaries, kinds = _rotaries(stack, children["rotary_emb"], layers)
    fused = [_layer(layer, number, kinds[number], record) for number, layer in enumerate(layers)]
    dim = int(layers[0].self_attn.head_dim)  # type: ignore[union-attr,arg-type]
    heads = fused[0].o.weight_NK.shape[1] // dim
    activations = {_activation(layer.mlp) for layer in layers}
    norms = [n for x in fused for n in (x.norm, x.q_norm, x.k_norm, x.o_norm, x.mlp_norm, x.down_norm) if n is not None]
    last = _norm(children["norm"])
    if len(activations) > 1 or any(n.one_plus != last.one_plus for n in norms):
        raise _Unlike("layers differ in their activations or in the form of their norms")
    return FusedStack(
        ops, children["embed_tokens"], rotaries, fused, last,
        heads=heads, kv_heads=(fused[0].qkv.weight_NK.shape[0] // dim - heads) // 2, head_dim=dim,
        activation=activations.pop(),
    )  # fmt: skip


def _rotaries(
    stack: nn.Module, rotary: nn.Module, layers: Sequence[nn.Module]
) -> tuple[list[Callable[..., Any]], list[int | None]]:
    """What gives the angles, one per type of layer where the model has such, and which of them each layer uses."""
    types: list[str] = [""] * len(layers)
    if by_type := "layer_type" in inspect.signature(rotary.forward).parameters:
        types = list(stack.config.layer_types)  # type: ignore[union-attr,arg-type]
    names = sorted(set(types))
    turns = [bool(getattr(layer.self_attn, "use_rope", True)) for layer in layers]
    kinds = [names.index(name) if turned else None for name, turned in zip(types, turns, strict=True)]
    return [partial(rotary, layer_type=name) if by_type else rotary for name in names], kinds


def _layer(layer: nn.Module, number: int, angles: int | None, record: _Record) -> FusedLayer:
    around = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
    parts = _children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}, around)
    attention = _children(
        parts["self_attn"], {"o_proj"}, {"q_proj", "k_proj", "v_proj", "qkv_proj", "q_norm", "k_norm"}
    )
    mlp = _children(parts["mlp"], {"down_proj"}, {"gate_proj", "up_proj", "gate_up_proj", *_ACTIVATIONS})
    if number not in record.attention:
        raise _Unlike(f"layer {number} did not call the attention function")
    if not isinstance(record.attention[number].get("scaling"), float) or "s_aux" in record.attention[number]:
        raise _Unlike(f"layer {number} calls the attention function in another way")
    sandwich = around <= set(parts)
    if not sandwich and around & set(parts):
        raise _Unlike(f"layer {number} has one of two norms")
    behind = _norm(parts["post_attention_layernorm"])
    return FusedLayer(
        norm=_norm(parts["input_layernorm"]),
        qkv=_group(*_parts_of(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj")),
        q_norm=_norm(attention["q_norm"]) if "q_norm" in attention else None,
        k_norm=_norm(attention["k_norm"]) if "k_norm" in attention else None,
        attention=parts["self_attn"],
        attention_kwargs=record.attention[number],
        angles=angles,
        o=_group(attention["o_proj"]),
        o_norm=behind if sandwich else None,
        mlp_norm=_norm(parts["pre_feedforward_layernorm"]) if sandwich else behind,
        gate_up=_group(*_parts_of(mlp, ("gate_proj", "up_proj"), "gate_up_proj")),
        down=_group(mlp["down_proj"]),
        down_norm=_norm(parts["post_feedforward_layernorm"]) if sandwich else None,
    )


def _parts_of(children: dict[str, nn.Module], apart: tuple[str, ...], joined: str) -> list[nn.Module]:
    """Linears that read one tensor: side by side, or one that is all of them."""
    here = [name for name in (*apart, joined) if name in children]
    if here != [joined] and here != list(apart):
        raise _Unlike(f"there are {', '.join(here) or 'no linears'} where {', '.join(apart)} should be")
    return [children[name] for name in here]


_ACTIVATIONS = ("act_fn", "activation_fn")


def _activation(mlp: Any) -> int:
    """Which of `rowops`' activations this MLP has, by its numbers."""
    own = getattr(mlp, _ACTIVATIONS[0], None) or getattr(mlp, _ACTIVATIONS[1], None)
    x = torch.linspace(-8, 8, 257)
    for number, theirs in ((SILU, F.silu(x)), (GELU_TANH, F.gelu(x, approximate="tanh"))):
        if own is not None and torch.allclose(own(x), theirs, rtol=0, atol=1e-5):  # gelu's two forms: up to 5e-4 apart
            return number
    raise _Unlike(f"{type(own).__name__} is none of the activations that there are kernels for")


def _children(module: nn.Module, needed: set[str], optional: set[str] = frozenset()) -> dict[str, nn.Module]:  # type: ignore[assignment]
    children = dict(module.named_children())
    names = {name for name, child in children.items() if not isinstance(child, nn.Dropout | nn.Identity)}
    if not needed <= names <= needed | optional:
        raise _Unlike(f"{type(module).__name__} has {', '.join(sorted(names))}")
    return children


def _group(*members: nn.Module) -> LinearGroup:
    """The group that consists of exactly these linears, in this order."""
    first = members[0]
    if not isinstance(first, VirtualLinear):
        raise _Unlike(f"{type(first).__name__} stands where a linear should")
    group = first.group
    if not all(isinstance(m, VirtualLinear) and m.group is group for m in members):
        raise _Unlike("siblings do not share a GEMM")
    if [m.stop - m.start for m in group.members] != [m.out_features for m in members]:
        raise _Unlike("a group holds other linears")
    return group


def _norm(module: nn.Module) -> Norm:
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    weight = getattr(module, "weight", None)
    if not isinstance(epsilon, float) or weight is None or len(list(module.parameters())) != 1:
        raise _Unlike(f"{type(module).__name__} is no RMSNorm with a weight")
    x_nD = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        own_nD, wide_nD, wide_D = module(x_nD).double(), x_nD.double(), weight.double()
    unit_nD = wide_nD * (wide_nD.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    # Whether it is exactly one of the two forms shows in the layer's own numbers.
    one_plus = bool((own_nD - (1 + wide_D) * unit_nD).norm() < (own_nD - wide_D * unit_nD).norm())
    return Norm(weight.detach(), epsilon, one_plus)


def _same_angles(theirs: Any, ours: tuple[Tensor, Tensor], head_dim: int) -> bool:
    """Whole heads turn, by the very numbers that the model gave this layer."""
    return (
        theirs is not None
        and ours[0].shape[-1] == head_dim
        and all(torch.equal(a[0], b) for a, b in zip(theirs, ours, strict=True))
    )


def _compare(
    fused: FusedStack, ops: RowKernels, record: _Record, ids_M: Tensor, positions_M: Tensor, step: StepContext
) -> None:
    with torch.no_grad():
        hidden_MD = fused.embed(ids_M)
        if not torch.equal(hidden_MD, record.inputs[0]):
            raise _Unlike("the first layer's input is not the embedding")
        cos_AMD, sin_AMD = fused.angles(hidden_MD, positions_M)
        for number, (layer, angles) in enumerate(zip(fused.layers, record.angles, strict=True)):
            own = of_kind((cos_AMD, sin_AMD), layer.angles)
            if own is not None and not _same_angles(angles, own, fused.head_dim):
                raise _Unlike(f"layer {number} gets other rotary angles")
            before_MD = record.inputs[number].clone()
            delta_MD = fused.run_layer(layer, before_MD, None, None, (cos_AMD, sin_AMD), step)
            if layer.down_norm is not None:
                ops.rms_norm(delta_MD.clone(), layer.down_norm, delta_MD, None)
            _same(f"layer {number}", before_MD + delta_MD, record.outputs[number], record.inputs[number])
            if number and not torch.equal(record.inputs[number], record.outputs[number - 1]):
                raise _Unlike(f"layer {number} does not get the output of the layer before")
        assert record.final is not None
        _same("the whole stack", fused(ids_M, positions_M, step), record.final, torch.zeros_like(record.final))


def _same(what: str, ours_MD: Tensor, theirs_MD: Tensor, before_MD: Tensor) -> None:
    added_MD = (theirs_MD - before_MD).double()
    error_M = (ours_MD.double() - theirs_MD.double()).norm(dim=-1) / added_MD.norm(dim=-1)
    if not bool((error_M <= _TOLERANCE[ours_MD.dtype]).all()):  # NaN fails too
        raise _Unlike(f"{what} differs by {float(error_M.max()):.1e} of what it adds")
