"""SMLM's Triton kernels against the reference: odd shapes, mixed ranks, both types, both ways."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.triton.device import DEVICE, FLOAT32
from torch import Tensor

from loquetier.kernels import reference
from loquetier.kernels.dropout import DropoutRows, dropped_TK, row_keys
from loquetier.kernels.reference import Factors, FactorTable, Segment
from loquetier.kernels.smlm import SmlmPlan, SmlmPlans
from loquetier.kernels.triton_smlm import TritonSmlm

MODULE = 2
"""The module under test; the tables hold module 4 too, which must never be read or written."""
TOLERANCE = {torch.float32: FLOAT32, torch.bfloat16: 1e-2}
"""Of the largest value: float32 sums of some hundred products in another order; bfloat16 rounds S and y."""
TYPES = list(TOLERANCE)


@dataclass
class Case:
    """One call's inputs, all float32."""

    x_TK: Tensor
    y_TN: Tensor
    segments: tuple[Segment, ...]
    table: FactorTable


def make(
    lengths: list[int],
    ranks: list[int | None],
    *,
    k: int = 37,
    n: int = 29,
    gap: int = 0,
    slots: list[int] | None = None,
) -> Case:
    """Segment i has ``lengths[i]`` rows on ``slots[i]`` (or i) after `gap` base rows; rank None: no weights here."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE)

    segments, at = [], 0
    for i, length in enumerate(lengths):
        at += gap
        segments.append(Segment(slots[i] if slots else i, at, at + length))
        at += length
    table: dict[int, dict[int, Factors]] = {}
    for slot, rank in enumerate(ranks):
        table[slot] = {4: Factors(random(2, k), random(2, n), 100.0)}
        if rank is not None:
            table[slot][MODULE] = Factors(random(rank, k), random(rank, n), 0.5 + slot)
    rows = at + 3  # base rows at the end too
    return Case(random(rows, k), random(rows, n), tuple(segments), table)


CASES = {
    "mixed ranks": make([3, 1, 6, 2, 5, 4], [4, 5, 8, 16, 32, 64]),
    "missing module": make([3, 4, 2], [4, None, 2]),
    "nobody has the module": make([3, 2], [None, None]),
    "empty segments, base rows": make([0, 3, 0, 2, 0], [4, 2, 1, 3, 8], gap=2),
    "slot in three segments": make([2, 3, 1, 4], [4, 20], slots=[0, 1, 0, 0], gap=1),
    "long segments": make([70, 33], [8, 5]),
    "rows in parts": make([300], [4], k=20, n=18),
    "one column in, one out": make([4, 5], [2, 9], k=1, n=1),
    "more ranks than a block": make([4, 40], [100, 3], k=20, n=18),
    "wide enough to be split": make([2, 3], [4, 8], k=530, n=150),
}


def cast(case: Case, dtype: torch.dtype) -> Case:
    table = {
        slot: {m: Factors(f.a_RK.to(dtype), f.b_RN.to(dtype), f.scale) for m, f in modules.items()}
        for slot, modules in case.table.items()
    }
    return Case(case.x_TK.to(dtype), case.y_TN.to(dtype), case.segments, table)


def upstream(case: Case) -> Tensor:
    return torch.randn(case.y_TN.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)


def gradients_of(case: Case) -> FactorTable:
    """Buffers that start at 1: what is there already stays."""

    def ones(f: Factors) -> Factors:
        return Factors(torch.ones(f.a_RK.shape, device=DEVICE), torch.ones(f.b_RN.shape, device=DEVICE), f.scale)

    return {slot: {m: ones(f) for m, f in modules.items()} for slot, modules in case.table.items()}


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    largest = float(theirs.double().abs().max())
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=TOLERANCE[dtype] * largest)


def same_gradients(ours: FactorTable, theirs: FactorTable, dtype: torch.dtype) -> None:
    for slot, modules in theirs.items():
        for module, f in modules.items():
            own = ours[slot][module]
            close(own.a_RK, f.a_RK, dtype)
            close(own.b_RN, f.b_RN, dtype)
            if module != MODULE:
                assert torch.equal(own.a_RK, torch.ones_like(own.a_RK))


def plan_of(planned: bool) -> SmlmPlan | None:
    return SmlmPlan() if planned else None


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward(case: Case, dtype: torch.dtype, planned: bool) -> None:
    case = cast(case, dtype)
    ours_TN, theirs_TN = case.y_TN.clone(), case.y_TN.clone()
    reference.smlm_forward(case.x_TK, theirs_TN, MODULE, case.segments, case.table)
    TritonSmlm().forward(case.x_TK, ours_TN, MODULE, case.segments, case.table, plan_of(planned))
    close(ours_TN, theirs_TN, dtype)
    untouched = torch.ones(len(ours_TN), dtype=torch.bool, device=DEVICE)
    for s in case.segments:
        untouched[s.start : s.stop] = MODULE not in case.table[s.slot]
    assert torch.equal(ours_TN[untouched], case.y_TN[untouched])


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_backward(case: Case, dtype: torch.dtype, planned: bool) -> None:
    case = cast(case, dtype)
    dy_TN = upstream(case).to(dtype)
    ours, theirs, ours_TK, theirs_TK = gradients_of(case), gradients_of(case), case.x_TK.clone(), case.x_TK.clone()
    reference.smlm_backward(case.x_TK, dy_TN, theirs_TK, MODULE, case.segments, case.table, theirs)
    TritonSmlm().backward(case.x_TK, dy_TN, ours_TK, MODULE, case.segments, case.table, ours, plan_of(planned))
    close(ours_TK, theirs_TK, dtype)
    same_gradients(ours, theirs, dtype)


@pytest.mark.parametrize("planned", [False, True])
def test_dropout_has_the_masks_of_the_reference(planned: bool) -> None:
    """Slot 0 drops half of its two train segments, slot 1 a tenth; slot 0's last segment is not in training."""
    case = make([5, 7, 6, 4], [4, 20], slots=[0, 1, 0, 0], gap=1)
    num_train = case.segments[2].stop
    dropout = DropoutRows({0: 0.5, 1: 0.1}, torch.from_numpy(row_keys(1, 2, 3, num_train)).to(DEVICE))
    kept_TK = torch.ones(case.x_TK.shape, dtype=torch.bool, device=DEVICE)
    scaled = {slot: dict(modules) for slot, modules in case.table.items()}
    for s in case.segments[:3]:
        dropped = dropped_TK(dropout.keys_T, MODULE, case.x_TK.shape[1], dropout.rates[s.slot])
        kept_TK[s.start : s.stop] = ~dropped[s.start : s.stop]
    for slot, rate in dropout.rates.items():
        own = case.table[slot][MODULE]
        scaled[slot][MODULE] = own._replace(scale=own.scale / (1 - rate))
    plan, train = plan_of(planned), case.segments[:3]
    ours_TN, theirs_TN = case.y_TN.clone(), case.y_TN.clone()
    reference.smlm_forward(case.x_TK * kept_TK, theirs_TN, MODULE, train, scaled)
    reference.smlm_forward(case.x_TK, theirs_TN, MODULE, case.segments[3:], case.table)
    TritonSmlm().forward(case.x_TK, ours_TN, MODULE, case.segments, case.table, plan, dropout)
    close(ours_TN, theirs_TN, torch.float32)
    dy_TN = upstream(case)
    ours, theirs, ours_TK, delta_TK = gradients_of(case), gradients_of(case), case.x_TK.clone(), case.x_TK * 0
    reference.smlm_backward(case.x_TK * kept_TK, dy_TN, delta_TK, MODULE, train, scaled, theirs)
    TritonSmlm().backward(case.x_TK, dy_TN, ours_TK, MODULE, train, case.table, ours, plan, dropout)
    close(ours_TK, case.x_TK + delta_TK * kept_TK, torch.float32)
    same_gradients(ours, theirs, torch.float32)


def test_a_launch_is_the_same_to_the_bit_every_time_and_alone() -> None:
    """No atomics; and a segment's rows and gradients do not depend on who else is in the batch."""
    case = make([9, 7, 12], [8, 8, 8], k=260)
    runs = []
    for segments in (case.segments, case.segments, case.segments[1:2]):
        y_TN, grads = case.y_TN.clone(), gradients_of(case)
        TritonSmlm().forward(case.x_TK, y_TN, MODULE, segments, case.table)
        TritonSmlm().backward(case.x_TK, y_TN, case.x_TK.clone(), MODULE, segments, case.table, grads)
        runs.append((y_TN[9:16], grads[1][MODULE].a_RK))
    for own in runs[1:]:
        assert torch.equal(own[0], runs[0][0]) and torch.equal(own[1], runs[0][1])


def test_rows_may_be_column_slices() -> None:
    """As for q|k|v: the columns beside y keep their bits."""
    case = CASES["mixed ranks"]
    wide_TW = torch.randn(len(case.x_TK), 40, device=DEVICE)
    before = wide_TW.clone()
    expected_TN = wide_TW[:, 5:34].clone()
    x_TK = torch.randn(37, len(case.x_TK), device=DEVICE).T  # elements of a row far apart
    reference.smlm_forward(x_TK, expected_TN, MODULE, case.segments, case.table)
    TritonSmlm().forward(x_TK, wide_TW[:, 5:34], MODULE, case.segments, case.table)
    close(wide_TW[:, 5:34], expected_TN, torch.float32)
    assert torch.equal(wide_TW[:, :5], before[:, :5]) and torch.equal(wide_TW[:, 34:], before[:, 34:])


def test_plans_share_one_table_which_grows_and_forgets() -> None:
    """100 slots one after the other, two at a time in the arena: rows of the table are used again."""
    g = torch.Generator().manual_seed(0)
    plans, table = SmlmPlans(), {}
    x_TK = torch.randn(4, 8, generator=g).to(DEVICE)
    for slot in range(100):
        table[slot] = {slot % 3: Factors(*torch.randn(2, 2, 8, generator=g).to(DEVICE), 1.0)}
        table.pop(slot - 2, None)
        segments = tuple(Segment(s, i, i + 1) for i, s in enumerate(table))
        module = slot % 3  # the newest slot's, and not the other's
        ours_TN, theirs_TN = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
        reference.smlm_forward(x_TK, theirs_TN, module, segments, table)
        TritonSmlm().forward(x_TK, ours_TN, module, segments, table, plans.of(segments))
        close(ours_TN, theirs_TN, torch.float32)
    held = {s: {0: Factors(*torch.ones(2, 1, 8, device=DEVICE), float(s))} for s in range(200, 300)}
    segments = tuple(Segment(s, 0, 1) for s in (200, 299))
    y_TN = torch.zeros(4, 8, device=DEVICE)
    first = plans.of(tuple(Segment(s, 0, 1) for s in held))  # all at once: the table grows
    TritonSmlm().forward(x_TK, torch.zeros(4, 8, device=DEVICE), 0, tuple(Segment(s, 0, 1) for s in held), held, first)
    TritonSmlm().forward(x_TK, y_TN, 0, segments[1:], held, plans.of(segments[1:]))
    close(y_TN[0], 299 * x_TK[0].sum().expand(8), torch.float32)
    assert first.slot_table(x_TK.device).generation > 0


def test_a_fixed_plan_runs_whatever_it_was_filled_with() -> None:
    """For CUDA graphs: same tensors, other segments; what does not fit says so."""
    case = make([1, 3, 2], [4, 16, 40])
    plans, device = SmlmPlans(), case.x_TK.device
    plan = plans.fixed(5, case.table, [0, 1], device)
    assert plan.fixed is not None
    address = plan.fixed.tiles.data_ptr()
    for segments in (case.segments[:2], case.segments[:1], ()):
        assert plans.fill(plan, segments, case.table, device)
        ours_TN, theirs_TN = case.y_TN.clone(), case.y_TN.clone()
        reference.smlm_forward(case.x_TK, theirs_TN, MODULE, segments, case.table)
        TritonSmlm().forward(case.x_TK, ours_TN, MODULE, (), case.table, plan)
        close(ours_TN, theirs_TN, torch.float32)
        assert plan.fixed.tiles.data_ptr() == address
    assert not plans.fill(plan, case.segments, case.table, device), "rank 40 in a layout of rank 16"
    assert not plans.fill(plan, case.segments[:1] * 6, case.table, device), "six tiles in five"


def test_gradients_that_moved_are_found() -> None:
    case = CASES["mixed ranks"]
    plan = SmlmPlan()
    results = []
    for _ in range(2):
        grads = gradients_of(case)
        results.append(grads)
        TritonSmlm().backward(case.x_TK, case.y_TN, case.x_TK.clone(), MODULE, case.segments, case.table, grads, plan)
    same_gradients(results[0], results[1], torch.float32)
