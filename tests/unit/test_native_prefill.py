"""Attention of prefill rows in C, every ISA variant and AMX, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.native import native_library
from torch import Tensor

from loquetier.kernels.attention import MaskRule, span_attention
from loquetier.kernels.gemm import AMX, GemmKernel
from loquetier.kernels.native import ISA_NAMES
from loquetier.kernels.native_attention import NativePrefill

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: 2e-5, BF16: 2e-2}
"""Of values around 1: float32 softmax over some hundred keys; in bfloat16 weights and result are rounded."""
RULES = {
    "full": MaskRule(),
    "window": MaskRule(window=5),
    "window 1": MaskRule(window=1),
    "window of all": MaskRule(window=10_000),
    "softcap": MaskRule(softcap=2.0),
    "both": MaskRule(window=70, softcap=1.5),
}


@pytest.fixture(scope="module", params=[*ISA_NAMES, "amx"])
def prefill(request: pytest.FixtureRequest) -> Iterator[NativePrefill]:
    with native_library("avx512" if request.param == "amx" else request.param) as library:
        if request.param != "amx":
            yield NativePrefill(library, level=0)
        elif GemmKernel(library).level == AMX:
            yield NativePrefill(library)
        else:
            pytest.skip("this machine has no AMX")


class Case:
    """One sequence on scattered pages; everything behind its last token is NaN."""

    def __init__(
        self, past: int, rows: int, *, heads: int = 6, kv_heads: int = 2, dim: int = 20, page: int = 4,
        dtype: torch.dtype = F32, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.past, total = past, past + rows
        count = -(-total // page)
        self.pages_B = torch.randperm(count, generator=g) + 1
        self.k, self.v = (torch.full((count + 1, page, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
        at = (self.pages_B[:, None] * page + torch.arange(page)).flatten()[:total]
        self.seen = []
        for cache in (self.k, self.v):
            values = torch.randn(total, kv_heads, dim, generator=g).to(dtype)
            cache.flatten(0, 1)[at] = values
            self.seen.append(values.transpose(0, 1).double())
        self.q_LHD = torch.randn(heads, rows, dim, generator=g).to(dtype).transpose(0, 1)

    def ours(self, prefill: NativePrefill, scale: float, rule: MaskRule) -> Tensor:
        return prefill(self.q_LHD, self.k, self.v, self.pages_B, self.past, scale, rule)

    def expected(self, scale: float, rule: MaskRule) -> Tensor:
        return span_attention(self.q_LHD.transpose(0, 1).double(), *self.seen, scale, rule).transpose(0, 1)


def check(prefill: NativePrefill, case: Case, scale: float, rule: MaskRule, bound: float | None = None) -> Tensor:
    ours_LHD = case.ours(prefill, scale, rule)
    bound = bound or TOLERANCE[ours_LHD.dtype]
    torch.testing.assert_close(ours_LHD.double(), case.expected(scale, rule), rtol=bound, atol=bound)
    return ours_LHD


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", [(0, 1), (0, 70), (63, 1), (64, 64), (129, 9), (40, 150)], ids=str)
def test_every_rule(prefill: NativePrefill, shape: tuple[int, int], rule: MaskRule, dtype: torch.dtype) -> None:
    """Runs shorter and longer than a tile of tokens and a task of columns, with and without a past."""
    check(prefill, Case(*shape, dtype=dtype), 0.4, rule)


@pytest.mark.parametrize("dim", [1, 8, 31, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_every_head_size(prefill: NativePrefill, dim: int, dtype: torch.dtype) -> None:
    check(prefill, Case(33, 40, dim=dim, page=16, dtype=dtype), dim**-0.5, MaskRule())


@given(
    past=st.integers(0, 200), rows=st.integers(1, 90), kv_heads=st.integers(1, 3), groups=st.integers(1, 9),
    dim=st.integers(1, 70), page=st.integers(1, 33), window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.floats(0.5, 50), dtype=st.sampled_from([F32, BF16]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything(
    prefill: NativePrefill, past: int, rows: int, kv_heads: int, groups: int, dim: int, page: int, window: int | None,
    softcap: float | None, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    case = Case(past, rows, heads=kv_heads * groups, kv_heads=kv_heads, dim=dim, page=page, dtype=dtype, seed=seed)
    check(prefill, case, dim**-0.5, MaskRule(window, softcap))


def test_large_scores_do_not_overflow(prefill: NativePrefill) -> None:
    """Scores in the hundreds: their own float32 rounding, some 1e-4, is the weights' relative error."""
    case = Case(100, 30, dim=16)
    check(prefill, case, 100.0, MaskRule(), 1e-3)
    check(prefill, case, 100.0, MaskRule(softcap=80.0), 1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_a_nan_among_the_queries_stays_in_its_row(prefill: NativePrefill, dtype: torch.dtype) -> None:
    case = Case(70, 20, dtype=dtype)
    case.q_LHD[7, 2] = torch.nan
    broken = case.ours(prefill, 0.4, MaskRule(softcap=3.0)).isnan()
    expected = torch.zeros(20, 6, dtype=torch.bool)
    expected[7, 2] = True
    assert torch.equal(broken.all(-1), expected) and torch.equal(broken.any(-1), expected)


def test_a_nan_key_breaks_the_rows_that_see_it(prefill: NativePrefill) -> None:
    """It is not swallowed by the search for the largest score."""
    case = Case(0, 90)
    case.k[case.pages_B[40 // 4], 40 % 4] = torch.nan
    broken_LH = case.ours(prefill, 0.4, MaskRule()).isnan().all(-1)
    assert broken_LH[40:].all()


def test_heads_beyond_the_work_space_are_not_taken() -> None:
    assert not NativePrefill.takes(torch.zeros(1, 2, 257), torch.zeros(2, 4, 1, 257))
    assert not NativePrefill.takes(torch.zeros(1, 2, 8).double(), torch.zeros(2, 4, 1, 8).double())
    assert not NativePrefill.takes(torch.zeros(1, 2, 16)[..., ::2], torch.zeros(2, 4, 1, 8)), "gaps in a head"
    assert not NativePrefill.takes(torch.zeros(1, 2, 8).bfloat16(), torch.zeros(2, 4, 1, 8))
