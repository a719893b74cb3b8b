"""Decode attention in C, every ISA variant, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.native import native_library
from torch import Tensor

from loquetier.kernels import attention, decode
from loquetier.kernels.attention import MaskRule
from loquetier.kernels.native import ISA_NAMES, NativeLibrary
from loquetier.kernels.native_attention import NativeDecode
from loquetier.kernels.select import process_kernels

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: 2e-5, BF16: 1e-2}
"""Of values around 1: float32 softmax over up to 600 keys; bfloat16's rounding of the result."""
RULES = {
    "full": MaskRule(),
    "window": MaskRule(window=5),
    "window 1": MaskRule(window=1),
    "window of all": MaskRule(window=10_000),
    "softcap": MaskRule(softcap=2.0),
    "both": MaskRule(window=300, softcap=1.5),
}


@pytest.fixture(scope="module", params=ISA_NAMES)
def library(request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    with native_library(request.param) as found:
        yield found


class Case:
    """A cache in which everything that no query may see is NaN."""

    def __init__(
        self,
        lengths: list[int],
        *,
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 20,
        page: int = 4,
        dtype: torch.dtype = F32,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        counts = [-(-n // page) for n in lengths]
        order = (torch.randperm(sum(counts), generator=g) + 1).split(counts)
        self.pages_NB = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
        self.k, self.v = (torch.full((sum(counts) + 1, page, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
        for pages, length in zip(order, lengths, strict=True):
            at = (pages[:, None] * page + torch.arange(page)).flatten()[:length]
            for cache in (self.k, self.v):
                cache.flatten(0, 1)[at] = torch.randn(length, kv_heads, dim, generator=g).to(dtype)
        self.positions_N = torch.tensor(lengths) - 1
        # As the model hands them over: [1, H, M, D] in memory order M, H, D or H, M, D.
        self.q_NHD = torch.randn(heads, len(lengths), dim, generator=g).to(dtype).transpose(0, 1)

    def visible(self, window: int | None) -> Tensor:
        at_P = torch.arange(self.pages_NB.shape[1] * self.k.shape[1])
        visible_NP = at_P <= self.positions_N[:, None]
        return visible_NP if window is None else visible_NP & (self.positions_N[:, None] - at_P < window)

    def expected(self, scale: float, rule: MaskRule) -> Tensor:
        k, v = (c.double().nan_to_num() for c in (self.k, self.v))  # masked keys: 0 * NaN would be NaN there
        visible_NP = self.visible(rule.window)
        return attention.decode_attention(self.q_NHD.double(), k, v, self.pages_NB, visible_NP, scale, rule.softcap)


def check(library: NativeLibrary, case: Case, scale: float, rule: MaskRule) -> Tensor:
    kernel = NativeDecode(library)
    assert kernel.takes(case.q_NHD, case.k)
    out_NHD = kernel(case.q_NHD, case.k, case.v, case.pages_NB, case.positions_N, scale, rule)
    tolerance = TOLERANCE[case.k.dtype]
    assert out_NHD.dtype == case.k.dtype
    torch.testing.assert_close(out_NHD.double(), case.expected(scale, rule), rtol=tolerance, atol=tolerance)
    return out_NHD


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule(library: NativeLibrary, rule: MaskRule, dtype: torch.dtype) -> None:
    """Lengths of one token, one page, one chunk of 256 tokens to the token, and several."""
    check(library, Case([1, 4, 31, 256, 257, 600], dtype=dtype), 0.4, rule)


SHAPES = {
    "no groups": {"heads": 4, "kv_heads": 4, "dim": 64},
    "smollm2": {"heads": 9, "kv_heads": 3, "dim": 64, "page": 16},
    "one kv head": {"heads": 7, "kv_heads": 1, "dim": 8, "page": 3},
    "large head": {"heads": 8, "kv_heads": 4, "dim": 256, "page": 16},
    "80": {"heads": 4, "kv_heads": 2, "dim": 80},
    "odd": {"heads": 10, "kv_heads": 2, "dim": 5, "page": 1},
    "one element": {"heads": 1, "kv_heads": 1, "dim": 1},
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(library: NativeLibrary, shape: dict, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    check(library, Case([1, 70, 3, 280], **shape, dtype=dtype), 0.2, MaskRule())


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 6),
    dim=st.integers(1, 70),
    page=st.integers(1, 20),
    window=st.none() | st.integers(1, 310),
    softcap=st.none() | st.floats(0.5, 50.0),
    dtype=st.sampled_from([F32, BF16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything(
    library: NativeLibrary, lengths: list[int], kv_heads: int, groups: int, dim: int, page: int, window: int | None,
    softcap: float | None, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    case = Case(lengths, heads=kv_heads * groups, kv_heads=kv_heads, dim=dim, page=page, dtype=dtype, seed=seed)
    check(library, case, dim**-0.5, MaskRule(window, softcap))


def test_large_scores_do_not_overflow(library: NativeLibrary) -> None:
    """Scores in the hundreds: softmax is then one key alone, which no naive exp would survive."""
    case = Case([300], dim=16)
    check(library, case, 100.0, MaskRule())
    check(library, case, 100.0, MaskRule(softcap=80.0))


def test_a_sequence_has_the_same_bits_in_any_company(library: NativeLibrary) -> None:
    case = Case([600, 3, 70])
    together = check(library, case, 0.4, MaskRule())
    for i in range(3):
        q_1HD, pages_1B, position_1 = case.q_NHD[i : i + 1], case.pages_NB[i : i + 1], case.positions_N[i : i + 1]
        alone = NativeDecode(library)(q_1HD, case.k, case.v, pages_1B, position_1, 0.4, MaskRule())
        assert torch.equal(alone[0], together[i])


def test_what_is_not_finite_stays_in_its_sequence(library: NativeLibrary) -> None:
    """NaN in a visible key is NaN in the answer, whatever the scores beside it; other sequences do not see it."""
    case = Case([300, 20])
    case.k[case.pages_NB[0, 30], 1] = torch.nan
    out_NHD = NativeDecode(library)(
        case.q_NHD, case.k, case.v, case.pages_NB, case.positions_N, 0.4, MaskRule(softcap=3.0)
    )
    assert out_NHD[0].isnan().all() and out_NHD[1].isfinite().all()


@pytest.mark.parametrize("num_rows", [1, 8, 9, 40])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rows_of_a_chunk_see_what_is_before_them(rule: MaskRule, num_rows: int) -> None:
    """Each sees itself and what is before it, in its window; where there is C, no page is gathered."""
    case = Case([400])
    past = 400 - num_rows
    q_HLD = torch.randn(6, num_rows, 20)
    at_P = (case.pages_NB[0][:, None] * 4 + torch.arange(4)).flatten()[:400]
    k_PKD, v_PKD = (c.flatten(0, 1)[at_P] for c in (case.k, case.v))
    reads = []

    def read() -> tuple[Tensor, Tensor]:
        reads.append(1)
        return k_PKD, v_PKD

    out_HLD = decode.chunk_attention(q_HLD, case.k, case.v, case.pages_NB[0], past, read, 0.4, rule)
    k_KPD, v_KPD = k_PKD.double().transpose(0, 1), v_PKD.double().transpose(0, 1)
    expected = attention.span_attention(q_HLD.double(), k_KPD, v_KPD, 0.4, rule)
    torch.testing.assert_close(out_HLD.double(), expected, rtol=2e-5, atol=2e-5)
    in_c = process_kernels().native("prefill_attention") is not None
    assert bool(reads) is not in_c


def test_what_c_cannot_take_runs_on_the_reference() -> None:
    """float64; another dtype than the cache's; heads beyond the kernel's work space."""
    case = Case([5, 9])
    q, k, v = case.q_NHD.double(), case.k.double().nan_to_num(), case.v.double().nan_to_num()
    out = decode.decode_attention(q, k, v, case.pages_NB, case.positions_N, case.visible, 0.4, MaskRule())
    assert torch.equal(out, case.expected(0.4, MaskRule()))
    assert not NativeDecode.takes(case.q_NHD.bfloat16(), case.k)
    assert not NativeDecode.takes(torch.zeros(1, 65, 8), torch.zeros(2, 4, 1, 8))
    assert not NativeDecode.takes(torch.zeros(1, 2, 16)[..., ::2], torch.zeros(2, 4, 1, 8)), "gaps in a head"
    assert not NativeDecode.takes(torch.zeros(1, 64, 256), torch.zeros(2, 4, 1, 256))
