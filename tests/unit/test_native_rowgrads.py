"""Backward of RMSNorm, rotary and gated activations in C, every variant and dtype, against autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.native import native_library
from torch import Tensor
from torch.nn import functional as F

from loquetier.kernels.native import DTYPE_CODES, ISA_NAMES
from loquetier.kernels.rowgrads import RowGrads
from loquetier.kernels.rowops import GELU_TANH, SILU, Norm, RowOps

BF16 = torch.bfloat16
WIDTHS = [1, 3, 16, 33, 100]
SMALL = {torch.float32: 5e-6, BF16: 2**-7}
"""Relative, beside an equal part of the largest value: float32 sums; in bfloat16 one rounding of the result."""


@pytest.fixture(scope="module", params=ISA_NAMES)
def kernels(request: pytest.FixtureRequest) -> Iterator[tuple[RowGrads, RowOps]]:
    with native_library(request.param) as library:
        yield RowGrads(library), RowOps(library)


@pytest.fixture(params=DTYPE_CODES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    small = SMALL[ours.dtype]
    error = (ours.double() - theirs).abs()
    assert (error <= small * (theirs.abs() + theirs.abs().max())).all()


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("dim", WIDTHS)
def test_rms_norm(kernels: tuple[RowGrads, RowOps], dtype: torch.dtype, dim: int, one_plus: bool) -> None:
    grads, ops = kernels
    x, dy, more = (random(7, dim, dtype=dtype, seed=s) for s in range(3))
    weight = random(dim, dtype=dtype)
    how = Norm(weight, 1e-3, one_plus)
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(norm(wide, weight.double() + one_plus, 1e-3), wide, dy.double())
    dx, y, again = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    grads.rms_norm(x, how, dy, dx, y_TD=y)
    assert_near(dx, expected)
    ops.rms_norm(x.clone(), how, again, None)
    assert torch.equal(y, again), "the output again is the forward's to the bit"
    added = torch.empty_like(x)
    grads.rms_norm(x, how, dy, added, more_TD=more)
    assert_near(added, expected + more.double())
    grads.rms_norm(x, how, dy, dy)
    assert torch.equal(dy, dx), "in place of dy"


def test_head_norm_leaves_the_other_columns(kernels: tuple[RowGrads, RowOps], dtype: torch.dtype) -> None:
    x, dy, weight = random(5, 100, dtype=dtype), random(5, 100, dtype=dtype, seed=1), random(20, dtype=dtype)
    wide = x[:, 20:80].double().reshape(5, 3, 20).requires_grad_()
    (expected,) = torch.autograd.grad(norm(wide, weight.double(), 1e-6), wide, dy[:, 20:80].double().view(5, 3, 20))
    before = dy.clone()
    kernels[0].head_norm(x, 20, 3, Norm(weight, 1e-6), dy)
    assert_near(dy[:, 20:80], expected.reshape(5, 60))
    assert torch.equal(dy[:, :20], before[:, :20]) and torch.equal(dy[:, 80:], before[:, 80:])


@pytest.mark.parametrize("dim", [2, 6, 32, 66])
def test_rotary(kernels: tuple[RowGrads, RowOps], dtype: torch.dtype, dim: int) -> None:
    dy = random(5, 3 * dim + 4, dtype=dtype)
    angles = 10 * torch.rand(5, dim, generator=torch.Generator().manual_seed(dim))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # halves that differ, as the formula allows
    x = torch.zeros(5, 2, dim, dtype=torch.float64, requires_grad=True)
    turned = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
    out = x * cos.double()[:, None] + turned * sin.double()[:, None]
    (expected,) = torch.autograd.grad(out, x, dy[:, : 2 * dim].double().reshape(5, 2, dim))
    rest = dy[:, 2 * dim :].clone()
    kernels[0].rotary(dy, cos, sin, 2)
    assert_near(dy[:, : 2 * dim], expected.reshape(5, 2 * dim))
    assert torch.equal(dy[:, 2 * dim :], rest)


@pytest.mark.parametrize("kind", [SILU, GELU_TANH])
@pytest.mark.parametrize("inner", WIDTHS)
def test_gated(kernels: tuple[RowGrads, RowOps], dtype: torch.dtype, inner: int, kind: int) -> None:
    x, dy = 4 * random(9, 2 * inner, dtype=dtype), random(9, inner, dtype=dtype)
    x[0], x[1] = 60.0, -60.0  # where the activation is flat
    wide = x.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    active = F.silu(gate) if kind == SILU else F.gelu(gate, approximate="tanh")
    (expected,) = torch.autograd.grad(active * up, wide, dy.double())
    dx, y = torch.empty_like(x), torch.empty_like(dy)
    kernels[0].gated(x, dy, dx, kind, y)
    assert_near(dx, expected)
    assert_near(y, (active * up).detach())
    apart = torch.cat(kernels[0].gated_pair(*x.chunk(2, dim=-1), dy, kind), dim=-1)
    assert torch.equal(apart, dx)
