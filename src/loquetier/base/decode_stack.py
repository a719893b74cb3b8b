"""Steps of decode rows only: the whole fused stack as one C call, without Python between the kernels."""

from __future__ import annotations

from ctypes import addressof
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loquetier.base.context import StepContext
from loquetier.base.fused import FusedLayer, FusedStack, Norm
from loquetier.base.kv_cache import KVCache
from loquetier.base.linear import LinearGroup
from loquetier.kernels.gemm import PackedWeight
from loquetier.kernels.native_attention import NativeDecode
from loquetier.kernels.native_smlm import Rows
from loquetier.kernels.native_stack import DeltaArguments, LayerArguments, NativeStack, StackArguments
from loquetier.kernels.smlm import SmlmPlan, planned_rows


@dataclass(frozen=True, slots=True)
class _Deltas:
    """The adapters of one layout of segments, as C reads them; `rows` keeps alive what the addresses point to."""

    plan: SmlmPlan | None
    rows: tuple[Rows, ...]
    array: Any
    count: int


class DecodeStack:
    """Runs `FusedStack`'s arithmetic for steps that `takes` accepts.

    Args:
        fused: verified against the model; every GEMM has its packed copy.
    """

    def __init__(self, fused: FusedStack, native: NativeStack) -> None:
        self._fused, self._native = fused, native
        self._cache: KVCache | None = None
        self._layers: Any = None
        self._deltas = _Deltas(None, (), None, 0)

    def takes(self, step: StepContext) -> bool:
        """Decode rows and nothing else, on LoRA adapters that C can read, or on none."""
        if step.decode is None or step.decode.start or step.cache is None:
            return False
        if step.cache is not self._cache and not self._bind(step.cache):
            return False
        if not step.segments:
            return True
        if step.smlm_plan is None:
            return False
        if self._deltas.plan is not step.smlm_plan:
            deltas = self._read_deltas(step)
            if deltas is None:
                return False
            self._deltas = deltas
        return True

    def __call__(self, ids_M: Tensor, positions_M: Tensor, step: StepContext) -> Tensor:
        """Final hidden states ``[M, D]`` after the last norm. No autograd. Raises MemoryError."""
        decode, fused, cache = step.decode, self._fused, self._cache
        assert decode is not None and cache is not None and step.cache_rows is not None
        with torch.no_grad():
            hidden_MD = fused.embed(ids_M)
            cos_MD, sin_MD = fused.angles(hidden_MD, positions_M)
        out_MD = torch.empty_like(hidden_MD)
        pages_NB, deltas = decode.pages_NB, self._deltas if step.segments else _Deltas(None, (), None, 0)
        arguments = StackArguments(
            num_layers=len(fused.layers), rows=len(ids_M), hidden=hidden_MD.shape[1], heads=fused.heads,
            kv_heads=fused.kv_heads, head_dim=fused.head_dim, inner=_packed(fused.layers[0].down).k,
            page_size=cache.page_size, pages_width=pages_NB.shape[1], level=_packed(fused.layers[0].o).level,
            num_deltas=deltas.count, x=hidden_MD.data_ptr(), y=out_MD.data_ptr(), cosines=cos_MD.data_ptr(),
            sines=sin_MD.data_ptr(), cache_rows=step.cache_rows.data_ptr(), pages=pages_NB.data_ptr(),
            positions=decode.positions_N.data_ptr(), last_norm=fused.last_norm.weight_D.data_ptr(),
            last_epsilon=fused.last_norm.epsilon, deltas=addressof(deltas.array) if deltas.count else None,
        )  # fmt: skip
        work = torch.empty(self._native.work_elements(arguments), dtype=torch.bfloat16)
        arguments.work = work.data_ptr()
        self._native(arguments, self._layers)
        return out_MD

    def _bind(self, cache: KVCache) -> bool:
        """Make the layers' arguments for this cache; False when the attention kernel cannot take its shape."""
        fused = self._fused
        q_NHD = torch.empty((1, fused.heads, fused.head_dim), dtype=torch.bfloat16)
        if not NativeDecode.takes(q_NHD, cache.keys[0]):
            return False
        array = LayerArguments * len(fused.layers)
        self._layers = array(
            *(_layer_arguments(x, k, v) for x, k, v in zip(fused.layers, cache.keys, cache.values, strict=True))
        )
        self._cache = cache
        return True

    def _read_deltas(self, step: StepContext) -> _Deltas | None:
        """The step's adapters in the order of the GEMMs; None when some of them need torch."""
        found: list[tuple[DeltaArguments, Rows]] = []
        for i, layer in enumerate(self._fused.layers):
            for j, group in enumerate((layer.qkv, layer.o, layer.gate_up, layer.down)):
                for m in group.adapted:
                    rows = planned_rows(m.module, step.segments, step.factors, step.smlm_plan)
                    if rows is None or rows.long or rows.dtype != torch.float32:
                        return None
                    if rows.scales:
                        # C writes where it is told to: these are this module's columns and this step's rows.
                        assert rows.widths[1] == m.stop - m.start and rows.stop <= step.num_rows
                        table, scales = rows.table.buffer_info()[0], rows.scales.buffer_info()[0]
                        where = (4 * i + j, table, scales, len(rows.scales), m.start, m.stop - m.start)
                        found.append((DeltaArguments(*where), rows))
        array = (DeltaArguments * len(found))(*(arguments for arguments, _ in found))
        return _Deltas(step.smlm_plan, tuple(rows for _, rows in found), array, len(found))


def _layer_arguments(layer: FusedLayer, keys: Tensor, values: Tensor) -> LayerArguments:
    qkv, o, gate_up, down = (_packed(g) for g in (layer.qkv, layer.o, layer.gate_up, layer.down))
    scale, rule = layer.attention_rule
    return LayerArguments(
        norm=_address(layer.norm), norm_epsilon=layer.norm.epsilon,
        qkv=qkv.address, qkv_bias=qkv.bias_address,
        q_norm=_address(layer.q_norm), q_epsilon=layer.q_norm.epsilon if layer.q_norm else 0.0,
        k_norm=_address(layer.k_norm), k_epsilon=layer.k_norm.epsilon if layer.k_norm else 0.0,
        o=o.address, o_bias=o.bias_address,
        mlp_norm=_address(layer.mlp_norm), mlp_epsilon=layer.mlp_norm.epsilon,
        gate_up=gate_up.address, gate_up_bias=gate_up.bias_address,
        down=down.address, down_bias=down.bias_address,
        keys=keys.data_ptr(), values=values.data_ptr(),
        window=rule.window or 0, scale=scale, softcap=rule.softcap or 0.0,
    )  # fmt: skip


def _packed(group: LinearGroup) -> PackedWeight:
    packed = group.gemm.packed
    assert packed is not None
    return packed


def _address(norm: Norm | None) -> int | None:
    return None if norm is None else norm.weight_D.data_ptr()
