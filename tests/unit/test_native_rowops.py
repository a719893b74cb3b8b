"""RMSNorm, rotary and SwiGLU in C, every ISA variant and dtype, against Hugging Face's own code on the same rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.native import native_library
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from loquetier.kernels.native import DTYPE_CODES, ISA_NAMES
from loquetier.kernels.rowops import RowOps

BF16 = torch.bfloat16
WIDTHS = [1, 3, 16, 33, 64, 100]
SMALL = {torch.float32: 2e-6, BF16: 2**-7}
"""Relative, beside an equal absolute part: float32 sums in another order; in bfloat16 at most the last bit."""


@pytest.fixture(scope="module", params=ISA_NAMES)
def ops(request: pytest.FixtureRequest) -> Iterator[RowOps]:
    with native_library(request.param) as library:
        yield RowOps(library)


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
    ops.rms_norm(x, norm.weight, 1e-3, y, None)
    assert torch.equal(x, before)
    assert_same(y, norm(x))
    ops.rms_norm(x, norm.weight, 1e-3, y, delta)
    assert torch.equal(x, before + delta)
    assert_same(y, norm(x))


@torch.no_grad()
def test_head_norm_leaves_the_other_columns(ops: RowOps, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(20, eps=1e-6).to(dtype)
    norm.weight.copy_(random(20, dtype=dtype))
    x = random(5, 100, dtype=dtype)
    expected = x.clone()
    expected[:, 20:80] = norm(x[:, 20:80].reshape(5, 3, 20)).view(5, 60)
    ops.head_norm(x, 20, 3, norm.weight, 1e-6)
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


@pytest.mark.parametrize("inner", WIDTHS)
def test_swiglu(ops: RowOps, dtype: torch.dtype, inner: int) -> None:
    x = 4 * random(9, 2 * inner, dtype=dtype)
    x[0], x[1] = 200.0, -200.0  # beyond the range of exp
    y = torch.empty(9, inner, dtype=dtype)
    ops.swiglu(x, y)
    gate, up = x.chunk(2, dim=-1)
    assert_same(y, F.silu(gate) * up)


def test_nan_stays_in_its_row(ops: RowOps, dtype: torch.dtype) -> None:
    x, weight = random(4, 33, dtype=dtype), random(33, dtype=dtype)
    clean, y = torch.empty_like(x), torch.empty_like(x)
    ops.rms_norm(x, weight, 1e-6, clean, None)
    x[2, 7] = torch.nan
    ops.rms_norm(x, weight, 1e-6, y, None)
    assert y[2].isnan().all()
    keep = [0, 1, 3]
    assert torch.equal(y[keep], clean[keep])
