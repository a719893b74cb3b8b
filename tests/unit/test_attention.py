"""Reference attention against a naive float64 softmax, position by position."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loquetier.base.context import DecodeRows
from loquetier.base.kv_cache import KVCache
from loquetier.kernels.attention import MaskRule, causal_mask, decode_attention, span_attention

F32 = 2e-5
"""float32 softmax over at most 40 keys of unit size, against float64."""
RULES = {
    "full": MaskRule(),
    "window": MaskRule(window=5),
    "window 1": MaskRule(window=1),
    "window of all": MaskRule(window=40),
    "softcap": MaskRule(softcap=2.0),
    "both": MaskRule(window=7, softcap=1.5),
}


def naive(q_HLD: Tensor, k_KPD: Tensor, v_KPD: Tensor, scale: float, rule: MaskRule) -> Tensor:
    """One query, one head at a time: no mask tensor, no broadcasting, so nothing of the code under test."""
    num_heads, q_len, _ = q_HLD.shape
    kv_heads, k_len, _ = k_KPD.shape
    out = torch.zeros(num_heads, q_len, v_KPD.shape[2], dtype=torch.float64)
    for h in range(num_heads):
        kv = h // (num_heads // kv_heads)
        for i in range(q_len):
            position = k_len - q_len + i
            first = 0 if rule.window is None else max(0, position - rule.window + 1)
            keys = k_KPD[kv, first : position + 1].double()
            scores = keys @ q_HLD[h, i].double() * scale
            if rule.softcap is not None:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            out[h, i] = torch.softmax(scores, 0) @ v_KPD[kv, first : position + 1].double()
    return out


def qkv(heads: int, kv_heads: int, q_len: int, k_len: int, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(heads * 1000 + q_len * 50 + k_len)
    return (
        torch.randn(heads, q_len, dim, generator=g),
        torch.randn(kv_heads, k_len, dim, generator=g),
        torch.randn(kv_heads, k_len, dim, generator=g),
    )


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (12, 12), (1, 13), (5, 23), (16, 17)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_span_equals_naive_softmax(heads: int, kv_heads: int, q_len: int, k_len: int, rule: MaskRule) -> None:
    q, k, v = qkv(heads, kv_heads, q_len, k_len)
    scale = 1.3 / math.sqrt(8)
    out = span_attention(q, k, v, scale, rule)
    torch.testing.assert_close(out.double(), naive(q, k, v, scale, rule), rtol=F32, atol=F32)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_span_gradients_equal_those_of_naive_softmax(rule: MaskRule) -> None:
    tensors = [t.double() for t in qkv(4, 2, 6, 9)]
    weights = torch.randn(4, 6, 8, dtype=torch.float64)
    grads = []
    for function in (span_attention, naive):
        leaves = [t.clone().requires_grad_() for t in tensors]
        (function(*leaves, 0.4, rule) * weights).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        # The capped path takes its softmax in float32 by design (as Hugging Face does), the other in float64.
        tolerance = 1e-5 if rule.softcap is not None else 1e-10
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_causal_mask_ends_at_each_query() -> None:
    mask = causal_mask(2, 5, 3, torch.device("cpu"))
    assert mask.tolist() == [[False, True, True, True, False], [False, False, True, True, True]]


def fill(
    lengths: list[int], *, kv_heads: int, page_size: int
) -> tuple[KVCache, list[list[int]], list[Tensor], list[Tensor]]:
    """A cache with scattered pages in mixed order; K and V per sequence as ``[K, P, D]``."""
    g = torch.Generator().manual_seed(sum(lengths))
    pages_of = [-(-n // page_size) for n in lengths]
    order = (torch.randperm(sum(pages_of), generator=g) + 1).tolist()
    cache = KVCache(
        num_layers=2, num_pages=len(order), page_size=page_size, kv_heads=kv_heads, head_dim=8,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    for layer in range(2):  # memory comes as it is: what an engine clears before a page's first token, a test does too
        cache.clear(layer, torch.tensor(order))
    tables, keys, values = [], [], []
    for length, count in zip(lengths, pages_of, strict=True):
        pages, order = order[:count], order[count:]
        k, v = torch.randn(2, length, kv_heads, 8, generator=g)
        flat = torch.tensor([pages[i // page_size] * page_size + i % page_size for i in range(length)])
        cache.write(1, flat, k, v)
        tables.append(pages)
        keys.append(k.transpose(0, 1))
        values.append(v.transpose(0, 1))
    return cache, tables, keys, values


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("heads", "kv_heads", "page_size"), [(4, 2, 4), (4, 4, 16), (6, 1, 3)])
def test_decode_equals_naive_softmax_of_each_one(heads: int, kv_heads: int, page_size: int, rule: MaskRule) -> None:
    lengths = [1, 31, 8, 4, 17]
    cache, tables, keys, values = fill(lengths, kv_heads=kv_heads, page_size=page_size)
    width = max(map(len, tables))
    pages_NB = torch.tensor([t + [0] * (width - len(t)) for t in tables])
    rows = DecodeRows(0, torch.tensor(lengths) - 1, pages_NB, page_size)
    q_NHD = torch.randn(len(lengths), heads, 8)
    out_NHD = decode_attention(
        q_NHD, cache.keys[1], cache.values[1], pages_NB, rows.visible_NP(rule.window), 0.4, rule.softcap
    )
    for i in range(len(lengths)):
        expected = naive(q_NHD[i][:, None], keys[i], values[i], 0.4, rule)[:, 0]
        torch.testing.assert_close(out_NHD[i].double(), expected, rtol=F32, atol=F32)
    assert not cache.keys[0].any(), "a write to one layer must not reach another"
    assert not cache.keys[1][0].any(), "nothing may write to the trash page"


def test_read_gives_a_sequence_in_its_order() -> None:
    cache, tables, keys, values = fill([11, 6], kv_heads=2, page_size=4)
    for pages, k, v, length in zip(tables, keys, values, (11, 6), strict=True):
        k_PKD, v_PKD = cache.read(1, torch.tensor(pages), length)
        assert torch.equal(k_PKD.transpose(0, 1), k) and torch.equal(v_PKD.transpose(0, 1), v)
