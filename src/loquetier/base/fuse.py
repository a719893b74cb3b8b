"""Build a `FusedStack` for a model, and use it only if it gives the model's own results on a probe.

Three gates. By name: layers whose code was read, since numbers on a probe cannot show a branch that it did not take. By
structure: exactly the modules that `FusedStack` knows, nothing beside them. By numbers: each layer, given
the input that it had in a forward of the model itself, must give that forward's output; so must the embedding, the
rotary angles and the last norm. What attention is called with (scaling, window) is recorded in that same forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from loquetier.base.attention import ATTENTION_NAME, STEP_KEYWORD, unified_attention
from loquetier.base.context import StepContext
from loquetier.base.fused import FusedLayer, FusedStack, Norm
from loquetier.base.linear import LinearGroup, VirtualLinear
from loquetier.kernels.rowops import RowKernels

log = logging.getLogger("loquetier.base")

LAYERS_READ = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
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
        run(lambda: _compare(fused, record, ids_M, positions_M, step), step)
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
    fused = [_layer(layer, number, record) for number, layer in enumerate(layers)]
    attention: Any = layers[0].self_attn
    dim = int(attention.head_dim)
    q, k = (getattr(attention, name).out_features // dim for name in ("q_proj", "k_proj"))
    return FusedStack(
        ops, children["embed_tokens"], children["rotary_emb"], fused, _norm(children["norm"]),
        heads=q, kv_heads=k, head_dim=dim,
    )  # fmt: skip


def _layer(layer: nn.Module, number: int, record: _Record) -> FusedLayer:
    parts = _children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    attention = _children(parts["self_attn"], {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"})
    mlp = _children(parts["mlp"], {"gate_proj", "up_proj", "down_proj", "act_fn"})
    if number not in record.attention:
        raise _Unlike(f"layer {number} did not call the attention function")
    if not isinstance(record.attention[number].get("scaling"), float) or "s_aux" in record.attention[number]:
        raise _Unlike(f"layer {number} calls the attention function in another way")
    return FusedLayer(
        norm=_norm(parts["input_layernorm"]),
        qkv=_group(attention["q_proj"], attention["k_proj"], attention["v_proj"]),
        q_norm=_norm(attention["q_norm"]) if "q_norm" in attention else None,
        k_norm=_norm(attention["k_norm"]) if "k_norm" in attention else None,
        attention=parts["self_attn"],
        attention_kwargs=record.attention[number],
        o=_group(attention["o_proj"]),
        mlp_norm=_norm(parts["post_attention_layernorm"]),
        gate_up=_group(mlp["gate_proj"], mlp["up_proj"]),
        down=_group(mlp["down_proj"]),
    )


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
    return Norm(weight.detach(), epsilon)


def _compare(fused: FusedStack, record: _Record, ids_M: Tensor, positions_M: Tensor, step: StepContext) -> None:
    with torch.no_grad():
        hidden_MD = fused.embed(ids_M)
        if not torch.equal(hidden_MD, record.inputs[0]):
            raise _Unlike("the first layer's input is not the embedding")
        cos_MD, sin_MD = fused.angles(hidden_MD, positions_M)
        for number, (layer, angles) in enumerate(zip(fused.layers, record.angles, strict=True)):
            if angles is None or not (torch.equal(angles[0][0], cos_MD) and torch.equal(angles[1][0], sin_MD)):
                raise _Unlike(f"layer {number} gets other rotary angles")
            before_MD = record.inputs[number].clone()
            delta_MD = fused.run_layer(layer, before_MD, None, (cos_MD, sin_MD), step)
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
