"""Steps of served rows and nothing else: the whole fused stack as one C call, without Python between the kernels."""

from __future__ import annotations

from ctypes import addressof
from typing import Any

import torch
from torch import Tensor

from loquetier.base.context import StepContext
from loquetier.base.fused import FusedLayer, FusedStack
from loquetier.base.kv_cache import KVCache
from loquetier.base.linear import LinearGroup
from loquetier.base.stack_deltas import StackCut, StackDeltas
from loquetier.kernels.gemm import PackedWeight
from loquetier.kernels.native import DTYPE_CODES
from loquetier.kernels.native_attention import NativeDecode, NativePrefill
from loquetier.kernels.native_stack import LayerArguments, NativeStack, SpanArguments, StackArguments
from loquetier.kernels.rowops import Norm
from loquetier.kernels.smlm import SmlmPlan


class DecodeStack:
    """Runs `FusedStack`'s arithmetic for steps that `takes` accepts.

    Args:
        fused: verified against the model; every GEMM has its packed copy.
    """

    def __init__(self, fused: FusedStack, native: NativeStack) -> None:
        self._fused, self._native = fused, native
        self._cache: KVCache | None = None
        self._layers: Any = None
        self._deltas = StackDeltas(fused, native, _packed(fused.layers[0].o).level)

    def takes(self, step: StepContext) -> bool:
        """PREFILL and DECODE rows and nothing else, on LoRA adapters that C can read, or on none."""
        if step.cache is None or step.cache_start or step.cuts is not None:
            return False
        if step.cache is not self._cache and not self._bind(step.cache):
            return False
        if not step.segments:
            return True
        return step.smlm_plan is not None and self._cut(step, step.smlm_plan).pieces is not None

    def _cut(self, step: StepContext, plan: SmlmPlan) -> StackCut:
        if plan.stack is None:
            plan.stack = self._deltas.cut(step.segments, step.factors)
        assert isinstance(plan.stack, StackCut)
        return plan.stack

    def __call__(self, ids_M: Tensor, positions_M: Tensor, step: StepContext) -> Tensor:
        """Final hidden states ``[M, D]`` after the last norm. No autograd. Raises MemoryError."""
        decode, fused, cache = step.decode, self._fused, self._cache
        assert cache is not None and step.cache_rows is not None and len(step.cache_rows) == step.num_rows
        with torch.no_grad():
            hidden_MD = fused.embed(ids_M)
            cos_AMD, sin_AMD = fused.angles(hidden_MD, positions_M)
        out_MD = torch.empty_like(hidden_MD)
        spans = (SpanArguments * len(step.prefill))(
            *(SpanArguments(a, b - a, past, pages_B.data_ptr()) for a, b, past, pages_B in step.prefill)
        )
        cut = self._cut(step, step.smlm_plan).pieces if step.segments and step.smlm_plan is not None else None
        arguments = StackArguments(
            num_layers=len(fused.layers), rows=len(ids_M), hidden=hidden_MD.shape[1], heads=fused.heads,
            kv_heads=fused.kv_heads, head_dim=fused.head_dim, inner=_packed(fused.layers[0].down).k,
            page_size=cache.page_size, level=_packed(fused.layers[0].o).level, num_spans=len(spans),
            first_decode=decode.start if decode else step.num_rows, x=hidden_MD.data_ptr(), y=out_MD.data_ptr(),
            cosines=cos_AMD.data_ptr(), sines=sin_AMD.data_ptr(), cache_rows=step.cache_rows.data_ptr(),
            spans=addressof(spans), last_norm=fused.last_norm.weight_D.data_ptr(),
            last_epsilon=fused.last_norm.epsilon, one_plus=fused.last_norm.one_plus, activation=fused.activation,
        )  # fmt: skip
        if decode is not None:
            arguments.pages, arguments.pages_width = decode.pages_NB.data_ptr(), decode.pages_NB.shape[1]
            arguments.positions = decode.positions_N.data_ptr()
        if cut is not None:
            arguments.pieces, arguments.longs = addressof(cut.pieces), addressof(cut.longs)
            arguments.by_gemm, arguments.w_dtype = addressof(cut.by_gemm), DTYPE_CODES[cut.dtype]
            arguments.num_s, arguments.num_packed = cut.num_s, cut.num_packed
        work = torch.empty(self._native.work_bytes(arguments), dtype=torch.uint8)
        arguments.work = work.data_ptr()
        self._native(arguments, self._layers)
        return out_MD

    def _bind(self, cache: KVCache) -> bool:
        """Make the layers' arguments for this cache; False when the attention kernel cannot take its shape."""
        fused = self._fused
        q_NHD = torch.empty((1, fused.heads, fused.head_dim), dtype=torch.bfloat16)
        if not (NativeDecode.takes(q_NHD, cache.keys[0]) and NativePrefill.takes(q_NHD, cache.keys[0])):
            return False
        array = LayerArguments * len(fused.layers)
        self._layers = array(
            *(_layer_arguments(x, k, v) for x, k, v in zip(fused.layers, cache.keys, cache.values, strict=True))
        )
        self._cache = cache
        return True


def _layer_arguments(layer: FusedLayer, keys: Tensor, values: Tensor) -> LayerArguments:
    qkv, o, gate_up, down = (_packed(g) for g in (layer.qkv, layer.o, layer.gate_up, layer.down))
    scale, rule = layer.attention_rule
    return LayerArguments(
        norm=_address(layer.norm), norm_epsilon=layer.norm.epsilon,
        qkv=qkv.address, qkv_bias=qkv.bias_address,
        q_norm=_address(layer.q_norm), q_epsilon=_epsilon(layer.q_norm),
        k_norm=_address(layer.k_norm), k_epsilon=_epsilon(layer.k_norm),
        o=o.address, o_bias=o.bias_address, o_norm=_address(layer.o_norm), o_epsilon=_epsilon(layer.o_norm),
        mlp_norm=_address(layer.mlp_norm), mlp_epsilon=layer.mlp_norm.epsilon,
        gate_up=gate_up.address, gate_up_bias=gate_up.bias_address,
        down=down.address, down_bias=down.bias_address,
        down_norm=_address(layer.down_norm), down_epsilon=_epsilon(layer.down_norm),
        keys=keys.data_ptr(), values=values.data_ptr(),
        window=rule.window or 0, angles=-1 if layer.angles is None else layer.angles,
        scale=scale, softcap=rule.softcap or 0.0,
    )  # fmt: skip


def _packed(group: LinearGroup) -> PackedWeight:
    packed = group.gemm.packed
    assert packed is not None
    return packed


def _address(norm: Norm | None) -> int | None:
    return None if norm is None else norm.weight_D.data_ptr()


def _epsilon(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm.epsilon
