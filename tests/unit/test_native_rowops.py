"""Norms, rotary and gated activations in C, every ISA variant and dtype, against Hugging Face's own code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.native import native_library
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from loquetier.kernels.kv_write import NativeKvWrite
from loquetier.kernels.native import DTYPE_CODES, ISA_NAMES
from loquetier.kernels.rowops import GELU_TANH, SILU, Norm, RowOps

BF16 = torch.bfloat16
WIDTHS = [1, 3, 16, 33, 64, 100]
SMALL = {torch.float32: 2e-6, BF16: 2**-7}
"""Relative, beside an equal absolute part: float32 sums in another order; in bfloat16 at most the last bit."""


@pytest.fixture(scope="module", params=ISA_NAMES)
def ops(request: pytest.FixtureRequest) -> Iterator[RowOps]:
    with native_library(request.param) as library:
        yield RowOps(library)


@pytest.fixture(scope="module", params=ISA_NAMES)
def kv_write(request: pytest.FixtureRequest) -> Iterator[NativeKvWrite]:
    with native_library(request.param) as library:
        yield NativeKvWrite(library)


@pytest.fixture(params=DTYPE_CODES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    small = SMALL[ours.dtype]
    error = (ours.double() - theirs.double()).abs()
    assert (error <= small * (theirs.double().abs() + 1)).all()
    if ours.dtype == BF16:  # same roundings in the same places: hardly an element may differ at all
        assert (error > 0).double().mean() <= 0.02


@pytest.mark.parametrize("dim", WIDTHS)
@torch.no_grad()
def test_rms_norm_with_and_without_a_residual(ops: RowOps, dtype: torch.dtype, dim: int) -> None:
    norm = LlamaRMSNorm(dim, eps=1e-3).to(dtype)
    norm.weight.copy_(random(dim, dtype=dtype))
    x, delta = random(7, dim, dtype=dtype), random(7, dim, dtype=dtype, seed=1)
    y, before = torch.empty_like(x), x.clone()
    ops.rms_norm(x, Norm(norm.weight, 1e-3), y, None)
    assert torch.equal(x, before)
    assert_same(y, norm(x))
    ops.rms_norm(x, Norm(norm.weight, 1e-3), y, delta)
    assert torch.equal(x, before + delta)
    assert_same(y, norm(x))


@torch.no_grad()
def test_head_norm_leaves_the_other_columns(ops: RowOps, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(20, eps=1e-6).to(dtype)
    norm.weight.copy_(random(20, dtype=dtype))
    x = random(5, 100, dtype=dtype)
    expected = x.clone()
    expected[:, 20:80] = norm(x[:, 20:80].reshape(5, 3, 20)).view(5, 60)
    ops.head_norm(x, 20, 3, Norm(norm.weight, 1e-6))
    assert torch.equal(x[:, :20], expected[:, :20]) and torch.equal(x[:, 80:], expected[:, 80:])
    assert_same(x, expected)


@pytest.mark.parametrize("dim", [2, 6, 32, 66])
@torch.no_grad()
def test_rotary(ops: RowOps, dtype: torch.dtype, dim: int) -> None:
    x = random(5, 3 * dim + 4, dtype=dtype)
    angles = 10 * torch.rand(5, dim)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # halves that differ, as the formula allows
    q = x[:, : 2 * dim].reshape(1, 5, 2, dim).transpose(1, 2)
    rotated, _ = apply_rotary_pos_emb(q, q, cos[None], sin[None])
    rest = x[:, 2 * dim :].clone()
    ops.rotary(x, cos, sin, 2)
    assert torch.equal(x[:, 2 * dim :], rest)
    assert_same(x[:, : 2 * dim], rotated[0].transpose(0, 1).reshape(5, 2 * dim))


@pytest.mark.parametrize("dim", WIDTHS)
@torch.no_grad()
def test_gemmas_norms_before_and_behind_the_addition(ops: RowOps, dtype: torch.dtype, dim: int) -> None:
    norm, post = Gemma3RMSNorm(dim, eps=1e-3).to(dtype), Gemma3RMSNorm(dim, eps=1e-5).to(dtype)
    norm.weight.copy_(random(dim, dtype=dtype))
    post.weight.copy_(random(dim, dtype=dtype, seed=1))
    ours, ours_post = Norm(norm.weight, 1e-3, True), Norm(post.weight, 1e-5, True)
    x, delta = random(7, dim, dtype=dtype), random(7, dim, dtype=dtype, seed=1)
    y, before, added = torch.empty_like(x), x.clone(), delta.clone()
    ops.rms_norm(x, ours, y, None)
    assert torch.equal(x, before)
    assert_same(y, norm(x))
    ops.rms_norm(x, ours, y, delta, ours_post)
    assert torch.equal(delta, added), "what is added is only read"
    assert_same(x, before + post(delta))
    assert_same(y, norm(x))


def test_no_rows(ops: RowOps, dtype: torch.dtype) -> None:
    x = random(0, 6, dtype=dtype)
    norm = Norm(random(6, dtype=dtype), 1e-6, True)
    ops.rms_norm(x, norm, x, x, norm)
    ops.gated(x, torch.empty(0, 3, dtype=dtype), GELU_TANH)
    cache = torch.zeros(2, 3, 1, 2, dtype=dtype)
    angles = (torch.ones(0, 2, dtype=dtype), torch.ones(0, 2, dtype=dtype))
    assert ops.rotary_and_write(x, angles, 1, 1, (cache, cache, torch.empty(0, dtype=torch.int64)))
    assert not cache.any()


@pytest.mark.parametrize("kind", [SILU, GELU_TANH])
@pytest.mark.parametrize("inner", WIDTHS)
def test_gated(ops: RowOps, dtype: torch.dtype, inner: int, kind: int) -> None:
    x = 4 * random(9, 2 * inner, dtype=dtype)
    x[0], x[1] = 200.0, -200.0  # beyond the range of exp
    y = torch.empty(9, inner, dtype=dtype)
    ops.gated(x, y, kind)
    gate, up = x.chunk(2, dim=-1)
    expected = (F.silu(gate) if kind == SILU else F.gelu(gate, approximate="tanh")) * up
    assert_same(y, expected)
    assert torch.equal(ops.gated_pair(gate, up, kind), y)


def heads_of(rows: int, heads: int, dim: int, layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    """``[rows, heads, dim]`` whose rows or whose heads lie side by side, or with gaps between them."""
    if layout == "heads first":
        return random(heads, rows, dim, dtype=dtype, seed=seed).transpose(0, 1)
    wide = random(rows, heads * dim + (5 if layout == "gaps" else 0), dtype=dtype, seed=seed)
    return wide[:, : heads * dim].view(rows, heads, dim)


@pytest.mark.parametrize("layout", ["side by side", "gaps", "heads first"])
@pytest.mark.parametrize(("dim", "turned"), [(2, 2), (20, 20), (20, 6), (66, 0)])
@pytest.mark.parametrize("cached", [0, 2, 5])
def test_rotary_and_kv_write(
    kv_write: NativeKvWrite, dtype: torch.dtype, dim: int, turned: int, cached: int, layout: str
) -> None:
    """The last `cached` of five rows go to the cache; others there stay. Float32 gives the model's own bits."""
    q, k, v = (heads_of(5, heads, dim, layout, dtype, seed) for seed, heads in enumerate((4, 2, 2)))
    cos, sin = (random(5, turned, dtype=dtype, seed=s) for s in (1, 2))
    theirs_q, theirs_k, theirs_v = q.clone(), k.clone(), v.clone()
    if turned:
        part_q, part_k = (t[None, ..., :turned].transpose(1, 2) for t in (theirs_q, theirs_k))
        for whole, part in zip(
            (theirs_q, theirs_k), apply_rotary_pos_emb(part_q, part_k, cos[None], sin[None]), strict=True
        ):
            whole[..., :turned] = part[0].transpose(0, 1)
    caches = [torch.full((3, 4, 2, dim), 7.0, dtype=dtype) for _ in range(2)]
    at = torch.tensor([9, 4, 6, 0, 11])[5 - cached :]
    kv_write(q, k, v, (cos, sin) if turned else None, (*caches, at) if cached else None)
    assert torch.equal(v, theirs_v)
    if dtype == torch.float32:
        assert torch.equal(q, theirs_q) and torch.equal(k, theirs_k)
    assert_same(q, theirs_q)
    assert_same(k, theirs_k)
    for cache, own in zip(caches, (k, v), strict=True):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[at], own[5 - cached :])
        others = torch.ones(12, dtype=torch.bool).index_fill(0, at, False)
        assert (flat[others] == 7).all()


def test_nan_stays_in_its_row(ops: RowOps, dtype: torch.dtype) -> None:
    x, weight = random(4, 33, dtype=dtype), random(33, dtype=dtype)
    clean, y = torch.empty_like(x), torch.empty_like(x)
    ops.rms_norm(x, Norm(weight, 1e-6), clean, None)
    x[2, 7] = torch.nan
    ops.rms_norm(x, Norm(weight, 1e-6), y, None)
    assert y[2].isnan().all()
    keep = [0, 1, 3]
    assert torch.equal(y[keep], clean[keep])
