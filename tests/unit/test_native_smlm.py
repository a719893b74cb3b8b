"""SMLM in C, every ISA variant, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.native import native_library
from torch import Tensor

from loquetier.base.context import StepContext
from loquetier.kernels import native_smlm, reference, smlm
from loquetier.kernels.native import ISA_NAMES, NativeLibrary
from loquetier.kernels.native_smlm import NativeSmlm, backward_rows, forward_rows, usable_matrix
from loquetier.kernels.reference import Factors, FactorTable, Segment
from loquetier.kernels.select import process_kernels
from loquetier.kernels.smlm import SmlmPlans

MODULE = 3
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"float32": (F32, F32), "bfloat16 rows": (BF16, F32), "bfloat16": (BF16, BF16)}
"""Of rows and weights."""
TOLERANCE = {F32: 5e-7, BF16: 1e-2}
"""float32: of the largest sum of absolute values, for what a sum loses does not shrink when it cancels; 8 roundings of
2**-24, where up to 700 products in 16 lanes make about 7. bfloat16's rounding of the result, 2**-8, of the largest."""


@pytest.fixture(scope="module", params=ISA_NAMES)
def library(request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    with native_library(request.param) as found:
        yield found


class Case:
    """Rows, segments and adapters; segment i has `lengths[i]` rows after `gaps[i]` base rows, on slot ``i % slots``."""

    def __init__(
        self,
        lengths: list[int],
        ranks: list[int | None],
        *,
        gaps: list[int] | None = None,
        k: int = 37,
        n: int = 21,
        dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
        pad: int = 0,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        segments, at = [], 0
        for i, length in enumerate(lengths):
            at += gaps[i] if gaps else 0
            segments.append(Segment(i % len(ranks), at, at + length))
            at += length
        self.segments, self.rows, self.pad = tuple(segments), at + 2, pad
        row, weight = dtypes

        def rand(*shape: int, dtype: torch.dtype = row) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        self.x_TK = rand(self.rows, k + pad)[:, :k]
        self.y_TW, self.n = rand(self.rows, n + 2 * pad), n
        self.dx_TK = rand(self.rows, k)
        self.table: dict[int, dict[int, Factors]] = {}
        self.grads: dict[int, dict[int, Factors]] = {}
        for slot, rank in enumerate(ranks):
            self.table[slot], self.grads[slot] = {}, {}
            if rank is not None:
                self.table[slot][MODULE] = Factors(rand(rank, k, dtype=weight), rand(rank, n, dtype=weight), 0.5 + slot)
                self.grads[slot][MODULE] = Factors(rand(rank, k, dtype=F32), rand(rank, n, dtype=F32), 0.0)

    def y(self, wide: Tensor) -> Tensor:
        """The columns of a wider output that belong to the module."""
        return wide[:, self.pad : self.pad + self.n]

    def doubled(self, table: FactorTable, *, unsigned: bool = False) -> dict[int, dict[int, Factors]]:
        """A copy in float64; `unsigned`: of the absolute values."""

        def copy(matrix: Tensor) -> Tensor:
            return matrix.double().abs() if unsigned else matrix.double()

        return {
            slot: {m: Factors(copy(f.a_RK), copy(f.b_RN), f.scale) for m, f in modules.items()}
            for slot, modules in table.items()
        }


def assert_near(ours: Tensor, exact: Tensor, dtype: torch.dtype, sums: Tensor | None = None) -> None:
    """`sums`: what `exact` is when every number in it is taken without its sign; None where little cancels."""
    assert ours.dtype == dtype
    error = (ours.double() - exact).abs().max() if exact.numel() else torch.zeros(())
    largest = sums if dtype == F32 and sums is not None else exact
    assert error <= TOLERANCE[dtype] * max(1.0, float(largest.abs().max()) if exact.numel() else 1.0)


def check_forward(library: NativeLibrary, case: Case) -> None:
    wide_TW = case.y_TW.clone()
    rows = forward_rows(MODULE, case.segments, case.table)
    assert rows is not None and not rows.long
    NativeSmlm(library).forward(case.x_TK, case.y(wide_TW), rows)
    exact_TW = case.y_TW.double()
    reference.smlm_forward(case.x_TK.double(), case.y(exact_TW), MODULE, case.segments, case.doubled(case.table))
    sums_TW = case.y_TW.double().abs()
    unsigned = case.doubled(case.table, unsigned=True)
    reference.smlm_forward(case.x_TK.double().abs(), case.y(sums_TW), MODULE, case.segments, unsigned)
    assert_near(case.y(wide_TW), case.y(exact_TW), wide_TW.dtype, case.y(sums_TW))
    untouched = torch.ones(case.rows, dtype=torch.bool)
    for s in case.segments:
        untouched[s.start : s.stop] = MODULE not in case.table[s.slot]
    assert torch.equal(wide_TW[untouched], case.y_TW[untouched]), "base rows keep their bits"
    case.y(wide_TW).copy_(case.y(case.y_TW))
    assert torch.equal(wide_TW, case.y_TW), "the columns beside keep their bits"


def check_backward(library: NativeLibrary, case: Case) -> None:
    dy_TN, dx_TK = case.y(case.y_TW), case.dx_TK.clone()
    exact_dx_TK, exact_grads = case.dx_TK.double(), case.doubled(case.grads)
    sums_dx_TK, sums_grads = exact_dx_TK.abs(), case.doubled(case.grads, unsigned=True)
    rows = backward_rows(MODULE, case.segments, case.table, case.grads)
    assert rows is not None and not rows.long
    NativeSmlm(library).backward(case.x_TK, dy_TN, dx_TK, rows)
    reference.smlm_backward(
        case.x_TK.double(), dy_TN.double(), exact_dx_TK, MODULE, case.segments, case.doubled(case.table), exact_grads
    )
    reference.smlm_backward(
        case.x_TK.double().abs(), dy_TN.double().abs(), sums_dx_TK, MODULE, case.segments,
        case.doubled(case.table, unsigned=True), sums_grads,
    )  # fmt: skip
    assert_near(dx_TK, exact_dx_TK, dx_TK.dtype, sums_dx_TK)
    for slot, modules in exact_grads.items():
        for module, exact in modules.items():
            sums = sums_grads[slot][module]
            # Gradients are float32 sums whatever the rows' dtype; S and dS are not rounded in between.
            assert_near(case.grads[slot][module].a_RK, exact.a_RK, F32, sums.a_RK)
            assert_near(case.grads[slot][module].b_RN, exact.b_RN, F32, sums.b_RN)


SHAPES = {
    "one": {"lengths": [5], "ranks": [4]},
    "decode": {"lengths": [1] * 6, "ranks": [4, 8, 16, 64, 5, None], "k": 96, "n": 64},
    "mixed": {"lengths": [3, 1, 6, 2], "ranks": [1, 8, 64, 5], "gaps": [2, 0, 1, 3], "pad": 3},
    "empty segments": {"lengths": [0, 3, 0, 20, 0], "ranks": [4, 2, 1, 3, 8]},
    "one adapter, many segments": {"lengths": [3, 17, 1, 40], "ranks": [6], "gaps": [0, 1, 0, 2]},
    "narrow": {"lengths": [4, 5, 33], "ranks": [2, 9, 3], "k": 1, "n": 1},
    "wide": {"lengths": [4, 19, 1], "ranks": [12, 3, 7], "k": 700, "n": 300, "pad": 5},
    "no adapter": {"lengths": [3, 3], "ranks": [None, None]},
    "rank beyond the stack's block": {"lengths": [3], "ranks": [900], "k": 5, "n": 6},
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(library: NativeLibrary, shape: dict, dtypes: tuple) -> None:  # type: ignore[type-arg]
    case = Case(**shape, dtypes=dtypes)
    check_forward(library, case)
    check_backward(library, case)


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 3), st.none() | st.integers(1, 70)), min_size=1, max_size=6
    ),
    k=st.integers(1, 80),
    n=st.integers(1, 80),
    pad=st.integers(0, 3),
    dtypes=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout(library: NativeLibrary, parts: list, k: int, n: int, pad: int, dtypes: tuple, seed: int) -> None:  # type: ignore[type-arg]
    case = Case(
        [p[0] for p in parts], [p[2] for p in parts], gaps=[p[1] for p in parts], k=k, n=n, pad=pad, dtypes=dtypes,
        seed=seed,
    )  # fmt: skip
    check_forward(library, case)
    check_backward(library, case)


@pytest.mark.parametrize("rank", [1, 8, 13])
def test_a_row_has_the_same_bits_in_any_company(library: NativeLibrary, rank: int) -> None:
    """Alone, or in a segment of 23: whatever tile it falls into, its sums run in the same order."""
    case = Case([23], [rank], k=90, n=70, dtypes=(BF16, F32))
    together, alone = case.y_TW.clone(), case.y_TW.clone()
    rows = forward_rows(MODULE, case.segments, case.table)
    assert rows is not None
    NativeSmlm(library).forward(case.x_TK, together, rows)
    for t in range(23):
        one = forward_rows(MODULE, [Segment(0, t, t + 1)], case.table)
        assert one is not None
        NativeSmlm(library).forward(case.x_TK, alone, one)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(library: NativeLibrary, bad: float) -> None:
    case = Case([5], [4], dtypes=(BF16, F32))
    case.x_TK[2, 7] = bad
    y_TN = case.y_TW.clone()
    rows = forward_rows(MODULE, case.segments, case.table)
    assert rows is not None
    NativeSmlm(library).forward(case.x_TK, y_TN, rows)
    finite = y_TN.isfinite().all(dim=1)
    assert finite.tolist() == [i != 2 for i in range(case.rows)]
    assert not y_TN[2].isfinite().any()


def test_long_segments_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the sum of both halves is the whole."""
    case = Case([3, 40, 2], [4, 8, 4])
    process_kernels("cpu")  # checked on first use: under the bounds below the check would fail, for the whole process
    monkeypatch.setattr(native_smlm, "LONG_FORWARD", 4 * 8)
    monkeypatch.setattr(native_smlm, "LONG_BACKWARD", 4 * 8)
    rows = forward_rows(MODULE, case.segments, case.table)
    assert rows is not None and rows.long == case.segments[1:2] and len(rows.scales) == 2
    y_TN, dx_TK = case.y_TW.clone(), case.dx_TK.clone()
    exact_TN, exact_dx_TK, exact_grads = case.y_TW.double(), case.dx_TK.double(), case.doubled(case.grads)
    table, x_TK = case.doubled(case.table), case.x_TK.double()
    smlm.smlm_forward(case.x_TK, y_TN, MODULE, case.segments, case.table)
    smlm.smlm_backward(case.x_TK, case.y_TW, dx_TK, MODULE, case.segments, case.table, case.grads)
    reference.smlm_forward(x_TK, exact_TN, MODULE, case.segments, table)
    reference.smlm_backward(x_TK, case.y_TW.double(), exact_dx_TK, MODULE, case.segments, table, exact_grads)
    assert_near(y_TN, exact_TN, F32)
    assert_near(dx_TK, exact_dx_TK, F32)
    for slot, modules in exact_grads.items():
        assert_near(case.grads[slot][MODULE].a_RK, modules[MODULE].a_RK, F32)
        assert_near(case.grads[slot][MODULE].b_RN, modules[MODULE].b_RN, F32)


def test_what_c_cannot_take_runs_on_the_reference() -> None:
    """float64 rows, float32 rows on bfloat16 weights, weights with gaps, columns with gaps: same result."""
    exact = Case([5], [4])
    expected_TN = exact.y_TW.double()
    reference.smlm_forward(exact.x_TK.double(), expected_TN, MODULE, exact.segments, exact.doubled(exact.table))
    doubles = Case([5], [4])
    y_TN = doubles.y_TW.double()
    smlm.smlm_forward(doubles.x_TK.double(), y_TN, MODULE, doubles.segments, doubles.doubled(doubles.table))
    assert torch.equal(y_TN, expected_TN)
    a_RK, b_RN, scale = exact.table[0][MODULE]
    gaps = {0: {MODULE: Factors(torch.stack([a_RK, a_RK], 2)[..., 0], b_RN, scale)}}
    assert forward_rows(MODULE, exact.segments, gaps) is None
    y_TN = exact.y_TW.clone()
    smlm.smlm_forward(exact.x_TK, y_TN, MODULE, exact.segments, gaps)
    assert_near(y_TN, expected_TN, F32)
    columns = torch.stack([exact.x_TK, exact.x_TK], 2)[..., 0]
    assert not usable_matrix(columns, F32)
    y_TN = exact.y_TW.clone()
    smlm.smlm_forward(columns, y_TN, MODULE, exact.segments, exact.table)
    assert_near(y_TN, expected_TN, F32)


def test_a_plan_is_kept_from_step_to_step() -> None:
    case = Case([3, 2], [4, 2])
    plans = SmlmPlans()
    first = plans.of(case.segments)
    y_TN, again_TN, plain_TN = (case.y_TW.clone() for _ in range(3))
    smlm.smlm_forward(case.x_TK, y_TN, MODULE, case.segments, case.table, first)
    same = plans.of(tuple(Segment(*s) for s in case.segments))
    assert same is first
    smlm.smlm_forward(case.x_TK, again_TN, MODULE, case.segments, case.table, same)
    smlm.smlm_forward(case.x_TK, plain_TN, MODULE, case.segments, case.table)
    assert torch.equal(y_TN, plain_TN) and torch.equal(again_TN, plain_TN)
    for i in range(SmlmPlans.KEPT):
        plans.of((Segment(0, 0, i + 1),))
    assert plans.of(case.segments) is not first, "the oldest goes"


def test_a_step_with_other_segments_has_a_plan_of_its_own() -> None:
    """The replay tape runs copies of a step on windows of its rows; pointers of the whole step would write beyond."""
    case = Case([3, 2], [4, 2])
    step = StepContext(num_rows=case.rows, segments=case.segments, factors=case.table, smlm_plans=SmlmPlans())
    assert step.smlm_plan is step.smlm_plan
    window = replace(step, num_rows=2, segments=(Segment(0, 0, 2),))
    assert window.smlm_plan is not step.smlm_plan
    x_2K, y_2N = case.x_TK[:2], case.y_TW[:2].clone()
    smlm.smlm_forward(case.x_TK, case.y_TW.clone(), MODULE, case.segments, case.table, step.smlm_plan)
    smlm.smlm_forward(x_2K, y_2N, MODULE, window.segments, case.table, window.smlm_plan)
    assert step.smlm_plan is not None
    rows = step.smlm_plan.rows.get(MODULE)
    if rows is not None:  # the C kernel is active
        with pytest.raises(AssertionError, match="segments up to row 5"):
            smlm.smlm_forward(x_2K, y_2N, MODULE, window.segments, case.table, step.smlm_plan)
        with pytest.raises(AssertionError, match="of a module"):
            NativeSmlm.forward(object.__new__(NativeSmlm), case.x_TK[:, 1:], case.y_TW, rows)
