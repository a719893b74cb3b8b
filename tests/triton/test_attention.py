"""The paged attention kernel against the reference, which gathers pages and asks torch."""

from __future__ import annotations

import pytest
import torch
from tests.triton.device import DEVICE, FLOAT32
from torch import Tensor

from loquetier.kernels import attention, triton_plan
from loquetier.kernels.attention import MaskRule
from loquetier.kernels.triton_attention import TritonAttention

TOLERANCE = {torch.float32: FLOAT32, torch.bfloat16: 1e-2}
"""Outputs are averages of values of size one: float32 sums in another order; bfloat16 rounds weights and result."""
RULES = {
    "plain": MaskRule(),
    "window": MaskRule(window=7),
    "window of one": MaskRule(window=1),
    "softcap": MaskRule(softcap=2.0),
    "window and softcap": MaskRule(window=40, softcap=2.0),
}
SHAPES = {"one head": (1, 1, 8), "groups of 3": (6, 2, 20), "groups of 20": (20, 1, 16), "all heads": (4, 4, 32)}
"""Query heads, kv heads, head size."""


def paged(
    lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype, *, page_size: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """K, V on scattered pages and the page tables; whatever no sequence wrote is NaN, the trash page 0 too."""
    g = torch.Generator().manual_seed(1)
    width = max(-(-n // page_size) for n in lengths) + 1
    shape = (len(lengths) * width + 1, page_size, kv_heads, dim)
    k, v = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    pages_NB = (torch.randperm(shape[0] - 1, generator=g) + 1).view(len(lengths), width)
    for pages_B, length in zip(pages_NB, lengths, strict=True):
        used = -(-length // page_size)
        for cache in (k, v):
            rows = torch.full((used * page_size, kv_heads, dim), float("nan"))
            rows[:length] = torch.randn(length, kv_heads, dim, generator=g)
            cache[pages_B[:used]] = rows.view(used, page_size, kv_heads, dim).to(dtype)
        pages_B[used:] = 0
    return k.to(DEVICE), v.to(DEVICE), pages_NB.to(DEVICE)


def read(cache: Tensor, pages_B: Tensor, length: int) -> Tensor:
    return cache[pages_B].flatten(0, 1)[:length].transpose(0, 1)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_decode(shape: tuple[int, int, int], rule: MaskRule, dtype: torch.dtype) -> None:
    heads, kv_heads, dim = shape
    lengths = [1, 8, 30, 9]
    k, v, pages_NB = paged(lengths, kv_heads, dim, dtype)
    q_NHD = torch.randn(len(lengths), heads, dim, generator=torch.Generator().manual_seed(2)).to(DEVICE).to(dtype)
    ours = TritonAttention().decode(q_NHD, k, v, pages_NB, torch.tensor(lengths, device=DEVICE) - 1, 0.3, rule)
    for i, n in enumerate(lengths):
        one = attention.span_attention(q_NHD[i][:, None], read(k, pages_NB[i], n), read(v, pages_NB[i], n), 0.3, rule)
        close(ours[i], one[:, 0], dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("past", "rows"), [(0, 1), (0, 21), (5, 3), (33, 17)])
def test_chunk(past: int, rows: int, rule: MaskRule, dtype: torch.dtype) -> None:
    """A prompt's first rows and rows with a past, GQA; queries in the layout that the model gives: heads first."""
    k, v, pages_NB = paged([past + rows], 2, 20, dtype)
    q_HLD = torch.randn(6, rows, 20, generator=torch.Generator().manual_seed(2)).to(DEVICE).to(dtype)
    ours = TritonAttention().chunk(q_HLD.transpose(0, 1), k, v, pages_NB[0], past, 0.3, rule)
    k_KPD, v_KPD = (read(c, pages_NB[0], past + rows) for c in (k, v))
    close(ours.transpose(0, 1), attention.span_attention(q_HLD, k_KPD, v_KPD, 0.3, rule), dtype)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_few_sequences_are_split_and_merged(rule: MaskRule) -> None:
    """600 keys in parts, some of which a short sequence or a window leaves empty."""
    lengths = [600, 3]
    k, v, pages_NB = paged(lengths, 1, 16, torch.float32, page_size=16)
    plan = triton_plan.attention_plan(2, 1, 2, 16, pages_NB.shape[1] * 16, decode=True, wide=True)
    assert plan.split > 1
    q_NHD = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ours = TritonAttention().decode(q_NHD, k, v, pages_NB, torch.tensor(lengths, device=DEVICE) - 1, 0.3, rule)
    for i, n in enumerate(lengths):
        one = attention.span_attention(q_NHD[i][:, None], read(k, pages_NB[i], n), read(v, pages_NB[i], n), 0.3, rule)
        close(ours[i], one[:, 0], torch.float32)


def test_what_the_kernel_cannot_take_goes_to_the_reference() -> None:
    cache = torch.empty(2, 8, 1, 16)
    assert TritonAttention.takes(torch.empty(1, 2, 16), cache)
    assert not TritonAttention.takes(torch.empty(1, 2, 16).double(), cache.double())
    assert not TritonAttention.takes(torch.empty(1, 2, 16).bfloat16(), cache)
    assert not TritonAttention.takes(torch.empty(1, 16, 2).transpose(1, 2), cache)
    assert not TritonAttention.takes(torch.empty(1, 2, 512), torch.empty(2, 8, 1, 512))
