"""Attention in plain torch, per kind of rows: the oracle and the fallback.

Shapes: H query heads, K kv heads (H a multiple of K), L query rows, P cached tokens, D head size, N sequences.
All softmax arithmetic that we do ourselves (softcap) is float32; otherwise torch's SDPA decides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class MaskRule:
    """What a layer lets a query see, beside causality."""

    __slots__ = ("softcap", "window")

    def __init__(self, window: int | None = None, softcap: float | None = None) -> None:
        self.window = window
        """Keys with ``q_pos - k_pos >= window`` are hidden (Hugging Face's convention); None = all visible."""
        self.softcap = softcap
        """``softcap * tanh(score / softcap)`` before the softmax (Gemma 2); None = off."""


def causal_mask(q_len: int, k_len: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean ``[q_len, k_len]``, True = visible; queries are the last `q_len` of the `k_len` positions."""
    q_pos = torch.arange(k_len - q_len, k_len, device=device)[:, None]
    k_pos = torch.arange(k_len, device=device)[None, :]
    visible = k_pos <= q_pos
    return visible if window is None else visible & (q_pos - k_pos < window)


def span_attention(q_HLD: Tensor, k_KPD: Tensor, v_KPD: Tensor, scale: float, rule: MaskRule) -> Tensor:
    """Causal attention of one sequence's last L positions over its P >= L positions -> ``[H, L, D]``.

    Differentiable in all three inputs. Without window, softcap or past it is torch's own causal SDPA.
    """
    q_len, k_len = q_HLD.shape[1], k_KPD.shape[1]
    window = rule.window if rule.window is not None and rule.window < k_len else None
    if rule.softcap is not None:
        return _softcap_attention(
            q_HLD, k_KPD, v_KPD, scale, causal_mask(q_len, k_len, window, q_HLD.device), rule.softcap
        )
    plain = q_len == k_len and window is None
    mask = None if plain or (q_len == 1 and window is None) else causal_mask(q_len, k_len, window, q_HLD.device)
    out = F.scaled_dot_product_attention(
        q_HLD[None], k_KPD[None], v_KPD[None], attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=True
    )
    return out[0]


def _softcap_attention(
    q_HLD: Tensor, k_KPD: Tensor, v_KPD: Tensor, scale: float, visible: Tensor, softcap: float
) -> Tensor:
    """Grouped-query attention with capped scores; SDPA has no hook between score and softmax."""
    groups = q_HLD.shape[-3] // k_KPD.shape[-3]
    k_HPD, v_HPD = (t.repeat_interleave(groups, dim=-3) for t in (k_KPD, v_KPD))
    scores = (q_HLD @ k_HPD.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q_HLD.dtype) @ v_HPD


def decode_attention(
    q_NHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages_NB: Tensor,
    visible_NP: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """One query per sequence over its cached tokens -> ``[N, H, D]``.

    Args:
        q_NHD: queries.
        k_cache, v_cache: ``[pages, page_size, K, D]``.
        pages_NB: page numbers of each sequence, padded with the trash page 0.
        visible_NP: boolean ``[N, B * page_size]``: causality, window and padding in one mask.
        scale, softcap: as in `span_attention`.

    The whole pages are gathered (a copy of the live KV per call); kernels that read the pages in place replace this.
    """
    n, num_heads, dim = q_NHD.shape
    k_NPKD, v_NPKD = (
        cache.index_select(0, pages_NB.reshape(-1)).view(n, -1, *cache.shape[2:]) for cache in (k_cache, v_cache)
    )
    kv_heads = k_NPKD.shape[2]
    # The query heads of one kv head are rows of one small matrix: no repeated K and V.
    q_NKGD = q_NHD.reshape(n, kv_heads, num_heads // kv_heads, dim)
    k_NKPD, v_NKPD = k_NPKD.transpose(1, 2), v_NPKD.transpose(1, 2)
    mask = visible_NP[:, None, None, :]
    if softcap is not None:
        out = _softcap_attention(q_NKGD, k_NKPD, v_NKPD, scale, mask, softcap)
    else:
        out = F.scaled_dot_product_attention(q_NKGD, k_NKPD, v_NKPD, attn_mask=mask, scale=scale)
    return out.reshape(n, num_heads, -1)
