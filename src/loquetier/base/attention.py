"""The one attention function that the Hugging Face model calls: every kind of rows of a step in one flat batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from loquetier.base.context import StepContext
from loquetier.base.replayed_attention import replayed_rows
from loquetier.errors import EngineError, UnsupportedModelError
from loquetier.kernels.attention import MaskRule, span_attention
from loquetier.kernels.decode import (
    chunk_attention,
    decode_attention,
    kv_write_for,
    prompts_read_pages,
    reads_written_tokens_only,
)
from loquetier.kernels.varlen import packed_attention

ATTENTION_NAME = "loquetier"
"""Value of ``config._attn_implementation`` on every base."""
STEP_KEYWORD = "loquetier_step"
"""Keyword of ``model(...)`` that carries the step to the attention."""


WRITTEN_KEYWORD = "loquetier_written"
"""Keyword that says whether K and V of the step's rows are in the cache already."""


def unified_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a step's rows: ``query [1, H, M, D]``, ``key/value [1, K, M, D]`` -> ``[1, M, H, D]``.

    K and V of PREFILL and DECODE rows are written to the cache first, unless they are there. TRAIN rows keep their
    graph, all other rows are detached, so nothing of them is kept for a backward.

    Raises:
        EngineError: called outside a step. UnsupportedModelError: attention sinks (`s_aux`).
    """
    step = kwargs.get(STEP_KEYWORD)
    if not isinstance(step, StepContext):
        raise EngineError("the base was called outside an engine step; go through Base.hidden")
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModelError("attention sinks (s_aux) are not supported")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rule = MaskRule(sliding_window, softcap)
    q_HMD, k_KMD, v_KMD = query[0], key[0], value[0]
    is_written = bool(kwargs.get(WRITTEN_KEYWORD)) or _turned(module, query, key, v_KMD, step)
    if step.replay:
        out_HMD = torch.cat(replayed_rows(q_HMD, k_KMD, v_KMD, scale, rule, step.replay), dim=1)
        return out_HMD.transpose(0, 1)[None], None
    if step.cuts is not None:
        step.cuts.keep_kv(k_KMD, v_KMD)
    parts = _train_rows(q_HMD, k_KMD, v_KMD, scale, rule, step)
    parts += other_rows(module, q_HMD, k_KMD, v_KMD, scale, rule, step, is_written=is_written)
    out_HMD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return out_HMD.transpose(0, 1)[None], None


def _turned(module: nn.Module, query: Tensor, key: Tensor, v_KMD: Tensor, step: StepContext) -> bool:
    """Do what the layer's rotary left to its attention, see `base.rotary`; whether K and V are written with it."""
    if not step.turns:
        return False
    turn = step.turns.pop()
    q_MHD, k_MKD, v_MKD = (t.transpose(0, 1) for t in (query[0], key[0], v_KMD))
    write = kv_write_for(q_MHD, k_MKD, v_MKD)
    if turn.q is not query or turn.k is not key or write is None:
        raise EngineError("q or k is not what the layer's rotary handed on")
    to = place_of(module, query[0], step)
    write(q_MHD, k_MKD, v_MKD, turn.angles, to)
    if step.check_turn is not None:
        step.check_turn(query, key)
    return to is not None


def place_of(module: nn.Module, q_HMD: Tensor, step: StepContext) -> tuple[Tensor, Tensor, Tensor] | None:
    """Where K and V of the step's last rows go, if the attention needs no page cleared before they are written."""
    if step.cache is None or step.cache_rows is None or step.cache_start >= step.num_rows:
        return None
    number = int(module.layer_idx)  # type: ignore[arg-type]
    keys = step.cache.keys[number]
    return (keys, step.cache.values[number], step.cache_rows) if reads_written_tokens_only(q_HMD, keys) else None


def other_rows(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    rule: MaskRule,
    step: StepContext,
    *,
    is_written: bool = False,
) -> list[Tensor]:
    """EVAL, PREFILL and DECODE rows, ``[H, n, D]`` each, in row order; nothing of them is kept for a backward.

    `is_written`: their K and V are in the cache already.
    """
    with torch.no_grad():
        q, k, v = q.detach(), k.detach(), v.detach()
        parts = _eval_rows(q, k, v, scale, rule, step)
        if step.cache is not None and step.cache_start < step.num_rows:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            if not is_written:
                _write_cache(k, v, step, layer)
            parts += _cached_rows(q, k, v, scale, rule, step, layer)
    return parts


def _train_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: MaskRule, step: StepContext) -> list[Tensor]:
    num_train = step.num_train
    if num_train == 0:
        return []
    if num_train < step.num_rows and q.requires_grad:  # SDPA keeps its inputs: a view would keep the inference rows too
        q, k, v = (t[:, :num_train].clone() for t in (q, k, v))
    spans = [span for span in step.spans if span[1] <= num_train]
    kv = [_seen(k, v, a, b, rule, step) for a, b in spans]
    packed = packed_attention(q, rule) if len(spans) > 1 else None
    if packed is not None:
        lengths = [(b - a, own[0].shape[1]) for (a, b), own in zip(spans, kv, strict=True)]
        fresh = all(rows == keys for rows, keys in lengths)
        k, v = (k[:, :num_train], v[:, :num_train]) if fresh else _joined(kv)
        return [packed(q[:, :num_train], k, v, lengths, scale, rule)]
    return [span_attention(q[:, a:b], *own, scale, rule) for (a, b), own in zip(spans, kv, strict=True)]


def _seen(k: Tensor, v: Tensor, a: int, b: int, rule: MaskRule, step: StepContext) -> tuple[Tensor, Tensor]:
    """K and V that the TRAIN rows ``[a, b)`` of one example attend to."""
    seen = step.cuts.seen_kv(a, b) if step.cuts is not None else None
    if seen is None:
        return k[:, a:b], v[:, a:b]
    # What the first query's window hides is hidden from all of these rows.
    first = 0 if rule.window is None else max(0, seen[0].shape[1] - (b - a) - rule.window + 1)
    return seen[0][:, first:], seen[1][:, first:]


def _joined(kv: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([k for k, _ in kv], dim=1), torch.cat([v for _, v in kv], dim=1)


def _eval_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: MaskRule, step: StepContext) -> list[Tensor]:
    return _whole(q, k, v, scale, rule, [span for span in step.spans if span[0] >= step.num_train])


def _whole(
    q: Tensor, k: Tensor, v: Tensor, scale: float, rule: MaskRule, spans: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Sequences of neighbouring rows that begin and end here."""
    packed = packed_attention(q, rule) if len(spans) > 1 else None
    if packed is not None:
        rows = slice(spans[0][0], spans[-1][1])
        return [packed(q[:, rows], k[:, rows], v[:, rows], [(b - a, b - a) for a, b in spans], scale, rule)]
    return [span_attention(q[:, a:b], k[:, a:b], v[:, a:b], scale, rule) for a, b in spans]


def _write_cache(k: Tensor, v: Tensor, step: StepContext, layer: int) -> None:
    cache, first, fresh = step.cache, step.cache_start, step.fresh_pages
    assert cache is not None and step.cache_rows is not None
    if fresh is not None and len(fresh) and not reads_written_tokens_only(k, cache.keys[layer]):
        cache.clear(layer, fresh)
    k_MKD, v_MKD = k.transpose(0, 1)[first:], v.transpose(0, 1)[first:]
    write = kv_write_for(k_MKD, v_MKD)
    if write is not None:
        write(k_MKD, k_MKD, v_MKD, None, (cache.keys[layer], cache.values[layer], step.cache_rows))
    else:
        cache.write(layer, step.cache_rows, k_MKD, v_MKD)


def _cached_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, rule: MaskRule, step: StepContext, layer: int
) -> list[Tensor]:
    cache = step.cache
    assert cache is not None
    keys, values = cache.keys[layer], cache.values[layer]
    read_pages = prompts_read_pages(q, keys, rule)
    parts: list[Tensor] = []
    for is_whole, group in groupby(step.prefill, lambda chunk: chunk.past == 0 and not read_pages):
        if is_whole:
            parts += _whole(q, k, v, scale, rule, [(chunk.start, chunk.stop) for chunk in group])
            continue
        for a, b, past, pages_B in group:
            read = partial(cache.read, layer, pages_B, past + b - a)
            parts.append(chunk_attention(q[:, a:b], keys, values, pages_B, past, read, scale, rule))
    if step.decode is not None:
        d = step.decode
        q_NHD = q.transpose(0, 1)[d.start :]
        out_NHD = decode_attention(
            q_NHD,
            keys,
            values,
            d.pages_NB,
            d.positions_N,
            d.visible_NP,
            scale,
            rule,
        )
        parts.append(out_NHD.transpose(0, 1))
    return parts


def register() -> None:
    """Make `unified_attention` known to transformers. No mask is registered, so transformers builds none."""
    AttentionInterface.register(ATTENTION_NAME, unified_attention)
