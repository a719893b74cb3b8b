"""The base's GEMM in C, at every level that this machine has, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.native import native_library
from torch import Tensor, nn
from torch.nn import functional as F

from loquetier.base import gemm as base_gemm
from loquetier.base.gemm import BaseGemm, FrozenLinear, pack_base
from loquetier.config import Hardware
from loquetier.kernels.gemm import AMX, AVX512_BF16, NO_KERNEL, GemmKernel, pack_weights
from loquetier.kernels.select import process_kernels

LEVELS = {"avx512": AVX512_BF16, "amx": AMX}
ROUNDING = 2**-8
"""bfloat16 keeps 8 bits: rounding is 2**-9 of the result; twice that, for the float32 sum before it."""
SHAPES = [(16, 32), (17, 33), (40, 7), (33, 64), (1, 1), (48, 95), (100, 200)]
"""N and K: multiples of the tile or not, odd, smaller than one."""


@pytest.fixture(scope="module", params=LEVELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[GemmKernel]:
    with native_library("avx512") as library:
        found = GemmKernel(library, LEVELS[request.param])
        if found.level != LEVELS[request.param]:
            pytest.skip("this machine has no AMX")
        yield found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def assert_close(ours: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    expected = x.double() @ w.double().T + (0 if bias is None else bias.double())
    # Where terms cancel, float32 sums of K products of size 1 leave an error of their own.
    slack = 1e-6 * w.shape[1]
    assert ((ours.double() - expected).abs() <= ROUNDING * expected.abs() + slack).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_matrix_product(kernel: GemmKernel, shape: tuple[int, int], with_bias: bool) -> None:
    n, k = shape
    w, bias = random(n, k), random(n, seed=1) if with_bias else None
    (packed,) = pack_weights(kernel, [w], [bias])
    for rows in (*range(1, 34), 40, 65):
        x = random(rows, k, seed=2)
        assert_close(packed(x), x, w, bias)


def test_weights_lie_side_by_side_and_do_not_touch(kernel: GemmKernel) -> None:
    weights = [random(n, k, seed=n) for n, k in SHAPES]
    for w, packed in zip(weights, pack_weights(kernel, weights, [None] * len(weights)), strict=True):
        x = random(5, w.shape[1])
        assert_close(packed(x), x, w, None)


def test_a_row_that_is_not_finite_stays_alone(kernel: GemmKernel) -> None:
    w, x = random(33, 70), random(20, 70)
    (packed,) = pack_weights(kernel, [w], [None])
    clean = packed(x)
    x[3, 5], x[18, 0] = torch.nan, torch.inf
    ours = packed(x)
    keep = [i for i in range(20) if i not in (3, 18)]
    assert torch.equal(ours[keep], clean[keep])
    assert ours[3].isnan().all() and not ours[18].isfinite().any()


def test_a_row_is_the_same_in_any_company(kernel: GemmKernel) -> None:
    w, x = random(80, 96), random(40, 96)
    (packed,) = pack_weights(kernel, [w], [None])
    together = packed(x)
    for rows in (1, 2, 7, 16, 17, 33):
        # Sums run in the same order, split only by how many rows share a register: float32 rounding, then bfloat16's.
        error = (packed(x[:rows]).float() - together[:rows].float()).abs()
        assert (error <= 2 * ROUNDING * together[:rows].float().abs() + 1e-4).all()


def test_any_leading_shape_and_no_rows(kernel: GemmKernel) -> None:
    w = random(10, 12)
    (packed,) = pack_weights(kernel, [w], [None])
    x = random(2, 3, 24)[..., ::2]
    assert packed(x).shape == (2, 3, 10)
    assert_close(packed(x).reshape(6, 10), x.reshape(6, 12), w, None)
    assert packed(x[:0]).shape == (0, 3, 10)


def test_gradients_take_torchs_way(kernel: GemmKernel) -> None:
    gemm = BaseGemm(random(24, 32), random(24))
    (gemm.packed,) = pack_weights(kernel, [gemm.weight_NK], [gemm.bias_N])
    x = random(4, 32).requires_grad_()
    gemm(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(4, 24, dtype=torch.bfloat16) @ gemm.weight_NK)
    with torch.no_grad():
        assert torch.equal(gemm(x), gemm.packed(x))
        assert torch.equal(gemm(x.float().bfloat16()), gemm.packed(x.detach()))


def test_many_rows_without_amx_are_torchs() -> None:
    with native_library("avx512") as library:
        kernel = GemmKernel(library, AVX512_BF16)
        gemm = BaseGemm(random(24, 32), None)
        (gemm.packed,) = pack_weights(kernel, [gemm.weight_NK], [None])
        gemm.packed.address = 0  # would crash if it were used
        x = random(kernel.max_rows + 1, 32)
        assert torch.equal(gemm(x), F.linear(x, gemm.weight_NK))


def test_other_variants_have_no_kernel() -> None:
    for isa in ("generic", "avx2"):
        with native_library(isa) as library:
            assert GemmKernel(library).level == NO_KERNEL


def test_what_is_packed_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = process_kernels()
    library = kernels.native("base_gemm")
    if library is None or GemmKernel(library).level == NO_KERNEL:
        pytest.skip("no C kernel here")
    linear = nn.Linear(64, 96, bias=False).bfloat16()
    frozen = FrozenLinear(linear)
    assert pack_base([frozen.gemm], kernels) >= 2 * 64 * 96
    assert frozen.gemm.packed is not None
    x = random(3, 64)
    with torch.no_grad():
        assert_close(frozen(x), x, linear.weight, None)
    float32 = BaseGemm(torch.randn(8, 8), None)
    assert pack_base([float32], kernels) == 0 and float32.packed is None
    with monkeypatch.context() as patch:
        little = Hardware(has_cuda=False, cpu_bf16_fast=True, free_memory=1000)
        patch.setattr(base_gemm, "detect_hardware", lambda device: little)
        other = FrozenLinear(linear)
        assert pack_base([other.gemm], kernels) == 0 and other.gemm.packed is None
