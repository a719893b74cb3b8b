"""SMLM for long segments on AMX tiles against the reference in float64, on odd ranks and rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.native import native_library
from torch import Tensor

from loquetier.kernels import reference, smlm
from loquetier.kernels.native_smlm_long import NativeLongSmlm
from loquetier.kernels.reference import Factors, Segment

BF16 = torch.bfloat16
SMALL = 2e-2
"""Of the largest value of a result: weights, S and dS are rounded to bfloat16 (2**-9 each), and what is stored too."""


@pytest.fixture(scope="module")
def kernel() -> Iterator[NativeLongSmlm]:
    with native_library("avx512") as library:
        found = NativeLongSmlm(library)
        if not found.available:
            pytest.skip("no AMX")
        yield found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_near(name: str, ours: Tensor, theirs: Tensor) -> None:
    error = (ours.double() - theirs).abs().max() / theirs.abs().max()
    assert error <= SMALL, f"{name}: {error}"


def doubled(table: dict[int, dict[int, Factors]]) -> dict[int, dict[int, Factors]]:
    return {
        s: {m: Factors(f.a_RK.double(), f.b_RN.double(), f.scale) for m, f in of.items()} for s, of in table.items()
    }


RANKS = {0: 8, 1: 1, 2: 33}
SEGMENTS = (Segment(0, 0, 33), Segment(1, 34, 51), Segment(0, 51, 51), Segment(2, 51, 148), Segment(0, 150, 151))


@pytest.mark.parametrize(("k", "n"), [(32, 64), (96, 32)])
def test_both_directions(kernel: NativeLongSmlm, k: int, n: int) -> None:
    """Mixed ranks, an empty segment, a slot twice, rows of no segment, columns of a wider matrix."""
    table = {s: {0: Factors(random(r, k, seed=s), random(r, n, seed=s), 0.5 + s)} for s, r in RANKS.items()}
    wide = random(151, n + 32).to(BF16)
    x, y = random(151, k).to(BF16), wide[:, 32:]
    expected = y.double()
    reference.smlm_forward(x.double(), expected, 0, SEGMENTS, doubled(table))
    rest = wide[:, :32].clone()
    untouched = y[[33, 148, 149]].clone()
    assert kernel.forward(x, y, 0, SEGMENTS, table) == ()
    assert_near("y", y, expected)
    assert torch.equal(wide[:, :32], rest) and torch.equal(y[[33, 148, 149]], untouched)

    dy, dx = random(151, n, seed=5).to(BF16), random(151, k, seed=6).to(BF16)
    grads = {s: {0: Factors(torch.ones(r, k), torch.ones(r, n), 1.0)} for s, r in RANKS.items()}
    right, right_dx = doubled(grads), dx.double()
    reference.smlm_backward(x.double(), dy.double(), right_dx, 0, SEGMENTS, doubled(table), right)
    assert kernel.backward(x, dy, dx, 0, SEGMENTS, table, grads) == ()
    assert_near("dx", dx, right_dx)
    for slot in RANKS:
        assert_near(f"dA of {slot}", grads[slot][0].a_RK, right[slot][0].a_RK)
        assert_near(f"dB of {slot}", grads[slot][0].b_RN, right[slot][0].b_RN)


def test_what_it_cannot_take_is_left(kernel: NativeLongSmlm) -> None:
    """Odd widths, float32 rows, a module that a slot lacks."""
    for k, n, dtype in ((33, 64, BF16), (32, 40, BF16), (32, 32, torch.float32)):
        x, y = random(40, k).to(dtype), random(40, n).to(dtype)
        before, table = y.clone(), {0: {0: Factors(random(4, k), random(4, n), 1.0)}}
        segments = (Segment(0, 0, 40),)
        assert kernel.forward(x, y, 0, segments, table) == segments and torch.equal(y, before)
        assert kernel.forward(x, y, 1, segments, table) == segments


def test_neighbours_and_nan_stay_apart(kernel: NativeLongSmlm) -> None:
    """A row's bits alone, among others, and beside rows that are not finite."""
    table = {0: {0: Factors(random(8, 64), random(8, 96), 1.0)}}
    x, y = random(80, 64).to(BF16), random(80, 96).to(BF16)
    alone = y[:33].clone()
    kernel.forward(x[:33], alone, 0, (Segment(0, 0, 33),), table)
    x[40:] = torch.nan
    kernel.forward(x, y, 0, (Segment(0, 0, 80),), table)
    assert torch.equal(y[:33], alone) and y[40:].isnan().all()


def test_dispatch_reaches_it(kernel: NativeLongSmlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long bfloat16 segments run here, and the result is that of the reference."""
    if smlm._long() is None:
        pytest.skip("this process runs other kernels")
    table = {0: {0: Factors(random(8, 64), random(8, 96), 1.0)}}
    x, y = random(300, 64).to(BF16), random(300, 96).to(BF16)
    expected = y.double()
    reference.smlm_forward(x.double(), expected, 0, (Segment(0, 0, 300),), doubled(table))
    monkeypatch.setattr(reference, "smlm_forward", lambda *args: [_must_be_empty(args[3])])
    smlm.smlm_forward(x, y, 0, (Segment(0, 0, 300),), table)
    assert_near("y", y, expected)


def _must_be_empty(segments: object) -> None:
    assert not segments
