"""SMLM reference kernels against a masked dense computation and autograd, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loquetier.kernels.reference import Factors, Segment, expand, shrink, smlm_backward, smlm_forward, wgrad

MODULE = 3
"""The module under test; the tables also hold module 4, which must never be read or written."""
F64 = 1e-12
"""Relative error of float64 sums of at most a few hundred products: 2**-53 times their number."""


@dataclass
class Case:
    """One call's inputs. Slots without MODULE stand for adapters that do not adapt it."""

    x_TK: Tensor
    y_TN: Tensor
    segments: list[Segment]
    table: dict[int, dict[int, Factors]]


def make_case(
    lengths: list[int],
    ranks: list[int | None],
    *,
    k: int = 7,
    n: int = 5,
    gaps: list[int] | None = None,
    repeat: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """Segment i: `lengths[i]` rows on slot i (or i // 2) after `gaps[i]` base rows; rank None: not adapted."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    segments, at = [], 0
    for i, length in enumerate(lengths):
        at += gaps[i] if gaps else 0
        segments.append(Segment(i // 2 if repeat else i, at, at + length))
        at += length
    num_rows = at + 2  # base rows at the end too
    table: dict[int, dict[int, Factors]] = {}
    for slot, rank in enumerate(ranks):
        table[slot] = {4: Factors(rand(2, k), rand(2, n), 100.0)}
        if rank is not None:
            table[slot][MODULE] = Factors(rand(rank, k), rand(rank, n), 0.5 + slot)
    return Case(rand(num_rows, k), rand(num_rows, n), segments, table)


def dense(case: Case, x_TK: Tensor, factors: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """y + sum over slots of mask * scale * x A^T B^T over ALL rows: nothing is sliced, so no border can be wrong."""
    y_TN = case.y_TN.clone()
    for slot, (a_RK, b_RN) in factors.items():
        mask_T1 = torch.zeros(len(x_TK), 1, dtype=x_TK.dtype)
        for s in case.segments:
            if s.slot == slot:
                mask_T1[s.start : s.stop] = 1
        scale = case.table[slot][MODULE].scale
        y_TN = y_TN + mask_T1 * scale * ((x_TK @ a_RK.T) @ b_RN)
    return y_TN


def adapted(case: Case) -> dict[int, tuple[Tensor, Tensor]]:
    return {slot: (m[MODULE].a_RK.clone(), m[MODULE].b_RN.clone()) for slot, m in case.table.items() if MODULE in m}


CASES = {
    "one": make_case([5], [4]),
    "mixed ranks": make_case([3, 1, 6, 2], [1, 8, 64, 5]),
    "missing module": make_case([3, 4, 2], [4, None, 2]),
    "empty segments": make_case([0, 3, 0, 2, 0], [4, 2, 1, 3, 8]),
    "base rows between": make_case([2, 3, 1], [4, 2, 3], gaps=[3, 1, 2]),
    "slot in two segments": make_case([2, 3, 1, 4], [4, 2], gaps=[0, 1, 0, 2], repeat=True),
    "odd shapes": make_case([1, 17, 3], [3, 31, 7], k=1, n=33),
    "one output": make_case([4, 5], [2, 9], k=129, n=1),
    "rank above both dims": make_case([4, 5], [40, 3], k=6, n=2),
    "no adapter at all": make_case([3, 3], [None, None]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_equals_masked_dense(case: Case) -> None:
    y_TN = case.y_TN.clone()
    smlm_forward(case.x_TK, y_TN, MODULE, case.segments, case.table)
    torch.testing.assert_close(y_TN, dense(case, case.x_TK, adapted(case)), rtol=F64, atol=F64 * 100)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rows_without_an_adapter_keep_their_bits(case: Case) -> None:
    y_TN = case.y_TN.clone()
    smlm_forward(case.x_TK, y_TN, MODULE, case.segments, case.table)
    touched = torch.zeros(len(y_TN), dtype=torch.bool)
    for s in case.segments:
        touched[s.start : s.stop] = MODULE in case.table[s.slot]
    assert torch.equal(y_TN[~touched], case.y_TN[~touched])
    assert (~touched).any()
    assert all((y_TN[i] != case.y_TN[i]).any() for i in touched.nonzero().flatten().tolist())


def gradients(case: Case) -> tuple[Tensor, dict[int, dict[int, Factors]], Tensor]:
    """dx, gradient buffers after one backward with upstream gradient dy, and dy. Buffers start at 1: it accumulates."""
    dy_TN = torch.randn(case.y_TN.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = {
        slot: {m: Factors(torch.ones_like(f.a_RK), torch.ones_like(f.b_RN), f.scale) for m, f in modules.items()}
        for slot, modules in case.table.items()
    }
    dx_TK = torch.ones_like(case.x_TK)
    smlm_backward(case.x_TK, dy_TN, dx_TK, MODULE, case.segments, case.table, grads)
    return dx_TK, grads, dy_TN


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_backward_equals_autograd(case: Case) -> None:
    dx_TK, grads, dy_TN = gradients(case)
    x_TK = case.x_TK.clone().requires_grad_()
    leaves = {s: (a.requires_grad_(), b.requires_grad_()) for s, (a, b) in adapted(case).items()}
    y_TN = dense(case, x_TK, leaves)
    if not leaves:
        assert torch.equal(dx_TK, torch.ones_like(dx_TK))
        return
    y_TN.backward(dy_TN)
    assert x_TK.grad is not None
    torch.testing.assert_close(dx_TK, 1 + x_TK.grad, rtol=F64, atol=F64 * 1000)
    for slot, (a, b) in leaves.items():
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(grads[slot][MODULE].a_RK, 1 + a.grad, rtol=F64, atol=F64 * 1000)
        torch.testing.assert_close(grads[slot][MODULE].b_RN, 1 + b.grad, rtol=F64, atol=F64 * 1000)
        assert torch.equal(grads[slot][4].a_RK, torch.ones_like(grads[slot][4].a_RK))


def test_an_adapter_gets_no_gradient_from_anothers_rows() -> None:
    case = make_case([3, 4], [4, 4])
    grads = {
        slot: {MODULE: Factors(torch.zeros(4, 7).double(), torch.zeros(4, 5).double(), 1.0)} for slot in case.table
    }
    dx_TK, dy_TN = torch.zeros_like(case.x_TK), torch.ones_like(case.y_TN)
    smlm_backward(case.x_TK, dy_TN, dx_TK, MODULE, case.segments[:1], case.table, grads)
    assert grads[0][MODULE].a_RK.any() and grads[0][MODULE].b_RN.any()
    assert not grads[1][MODULE].a_RK.any() and not grads[1][MODULE].b_RN.any()
    assert dx_TK[:3].any() and not dx_TK[3:].any()


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 3), st.none() | st.integers(1, 70)), min_size=1, max_size=6
    ),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_layout_equals_masked_dense(parts: list[tuple[int, int, int | None]], k: int, n: int, seed: int) -> None:
    case = make_case([p[0] for p in parts], [p[2] for p in parts], gaps=[p[1] for p in parts], k=k, n=n, seed=seed)
    y_TN = case.y_TN.clone()
    smlm_forward(case.x_TK, y_TN, MODULE, case.segments, case.table)
    torch.testing.assert_close(y_TN, dense(case, case.x_TK, adapted(case)), rtol=1e-11, atol=1e-10)


def test_output_may_be_a_column_slice_of_a_wider_one() -> None:
    """As for q|k|v: the columns beside it keep their bits."""
    case = CASES["base rows between"]
    wide_TW = torch.randn(len(case.x_TK), 11, dtype=torch.float64)
    before = wide_TW.clone()
    case = Case(case.x_TK, wide_TW[:, 4:9].clone(), case.segments, case.table)
    smlm_forward(case.x_TK, wide_TW[:, 4:9], MODULE, case.segments, case.table)
    expected_TN = dense(case, case.x_TK, adapted(case))
    torch.testing.assert_close(wide_TW[:, 4:9], expected_TN, rtol=F64, atol=F64 * 100)
    assert torch.equal(wide_TW[:, :4], before[:, :4]) and torch.equal(wide_TW[:, 9:], before[:, 9:])


def test_bfloat16_is_as_exact_as_its_rounding() -> None:
    case = make_case([9, 17, 3], [4, 16, 64], k=96, n=48, dtype=torch.bfloat16)
    y_TN = case.y_TN.clone()
    smlm_forward(case.x_TK, y_TN, MODULE, case.segments, case.table)
    exact_table = {
        slot: {m: Factors(f.a_RK.double(), f.b_RN.double(), f.scale) for m, f in modules.items()}
        for slot, modules in case.table.items()
    }
    exact = Case(case.x_TK.double(), case.y_TN.double(), case.segments, exact_table)
    expected_TN = dense(exact, exact.x_TK, adapted(exact))
    # bfloat16 has 8 bits of mantissa: S and y are each rounded by up to 2**-9 relative to the largest terms of their
    # sums, hence 2 % of the row's norm is generous, and a wrong scale, row or order is 100 %.
    error_T = (y_TN.double() - expected_TN).norm(dim=1) / expected_TN.norm(dim=1)
    assert error_T.max() < 0.02


def test_bfloat16_gradients_accumulate_in_float32() -> None:
    """1000 segments of one row, each of which is below half a bfloat16 ulp of the sum by the end."""
    x_TK = torch.ones(1, 2, dtype=torch.bfloat16)
    grad_RK = torch.zeros(3, 2)
    for _ in range(1000):
        wgrad(torch.ones(1, 3, dtype=torch.bfloat16), x_TK, grad_RK, 0.5)
    assert torch.equal(grad_RK, torch.full((3, 2), 500.0))


def test_the_scale_is_applied_once_in_expand() -> None:
    x_TD, a_RD, b_RN = torch.ones(2, 3), torch.ones(1, 3), torch.ones(1, 4)
    y_TN = torch.zeros(2, 4)
    expand(shrink(x_TD, a_RD), b_RN, y_TN, 7.0)
    assert torch.equal(y_TN, torch.full((2, 4), 21.0))
