"""The dropout mask: a pure function of where a value lies, fair, and independent along every coordinate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loquetier.kernels.dropout import DropoutRows, dropout_backward, dropout_forward, dropped_TK, row_keys
from loquetier.kernels.reference import Factors, Segment, smlm_backward, smlm_forward


def keys(seed: int = 0, draw: int = 1, item: int = 0, num_rows: int = 200, first_row: int = 0) -> Tensor:
    return torch.from_numpy(row_keys(seed, draw, item, num_rows, first_row))


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.05, 0.3, 0.5, 0.9, 1 - 1e-12])
def test_the_rate_is_met(rate: float) -> None:
    mask_TK = dropped_TK(keys(num_rows=400), 3, 501, rate)
    n = mask_TK.numel()
    # Five standard deviations of a binomial count: one seed in a million would fail by chance, and the seed is fixed.
    bound = 5 * (rate * (1 - rate) / n) ** 0.5 + 1e-9
    assert float(mask_TK.double().mean()) == pytest.approx(rate, abs=bound)
    if 0.01 < rate < 0.99:
        for means, count in ((mask_TK.double().mean(0), 400), (mask_TK.double().mean(1), 501)):
            assert float((means - rate).abs().max()) < 6 * (rate * (1 - rate) / count) ** 0.5


def test_every_coordinate_changes_the_mask_and_none_correlates() -> None:
    base = dropped_TK(keys(), 3, 64, 0.5)
    others = {
        "seed": dropped_TK(keys(seed=1), 3, 64, 0.5),
        "large seed": dropped_TK(keys(seed=2**63 - 1), 3, 64, 0.5),
        "draw": dropped_TK(keys(draw=2), 3, 64, 0.5),
        "item": dropped_TK(keys(item=1), 3, 64, 0.5),
        "module": dropped_TK(keys(), 4, 64, 0.5),
        "row": dropped_TK(keys(first_row=1), 3, 64, 0.5),
        "swapped draw and item": dropped_TK(keys(draw=0, item=1), 3, 64, 0.5),
    }
    for name, mask in others.items():
        # 12800 fair coins agree half of the time; five standard deviations are 0.022.
        assert float((mask == base).double().mean()) == pytest.approx(0.5, abs=0.022), name
    assert float((base[:, ::2] == base[:, 1::2]).double().mean()) == pytest.approx(0.5, abs=0.032)  # halves of a hash


def test_rows_and_columns_do_not_depend_on_what_surrounds_them() -> None:
    whole = dropped_TK(keys(num_rows=30), 7, 33, 0.4)
    parts = [dropped_TK(keys(num_rows=n, first_row=at), 7, 33, 0.4) for at, n in ((0, 11), (11, 1), (12, 18))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(dropped_TK(keys(num_rows=30), 7, 20, 0.4), whole[:, :20])
    rows = np.asarray([2, 5, 29])
    assert torch.equal(DropoutRows({0: 0.4}, keys(num_rows=30)).at(rows).keys_T, keys(num_rows=30)[rows])


def test_the_hash_is_splitmix64() -> None:
    """Against a plain integer implementation: the mask must never change between versions, machines or devices."""
    word = (1 << 64) - 1

    def mix(z: int) -> int:
        z &= word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = 0
    for part in (5, 3, 2):
        key = mix((key ^ part) + golden)
    for row in range(4):
        row_key = mix(key + (row + 1) * golden)
        assert int(row_keys(5, 3, 2, 4)[row]) & word == row_key
        hashes = [mix((row_key ^ mix(9 + golden)) + (pair + 1) * golden) for pair in range(3)]
        halves = [half for h in hashes for half in (h & 0xFFFFFFFF, h >> 32)]
        signed = [half - 2**32 if half >= 2**31 else half for half in halves]
        expected = [half < round(0.3 * 2**32) - 2**31 for half in signed]
        assert dropped_TK(torch.from_numpy(row_keys(5, 3, 2, 4)), 9, 5, 0.3)[row].tolist() == expected[:5]


def factors(seed: int, scale: float) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(3, 10, generator=generator), torch.randn(3, 6, generator=generator), scale)


def test_forward_and_backward_are_autograds() -> None:
    """Two segments that drop at different rates, one that does not, and other rows on a slot that does."""
    table = {slot: {0: factors(slot, 0.5 + slot)} for slot in range(3)}
    segments = (Segment(0, 0, 5), Segment(1, 5, 9), Segment(2, 9, 12), Segment(0, 12, 15))
    dropout = DropoutRows({0: 0.3, 2: 0.6}, keys(num_rows=12))
    x_MK, dy_TN = torch.randn(15, 10), torch.randn(12, 6)
    y_MN = torch.zeros(15, 6)
    dropout_forward(x_MK, y_MN, 0, segments, table, dropout)
    leaf = x_MK.clone().requires_grad_()
    weights = {s: (table[s][0].a_RK.clone().requires_grad_(), table[s][0].b_RN.clone().requires_grad_()) for s in table}
    parts = []
    for slot, start, stop in segments:
        rate = dropout.rates.get(slot, 0.0) if stop <= 12 else 0.0
        keep = torch.ones(stop - start, 10)
        if rate:
            keep = (~dropped_TK(dropout.keys_T[start:stop], 0, 10, rate)).float() / (1 - rate)
        a, b = weights[slot]
        parts.append(table[slot][0].scale * (leaf[start:stop] * keep) @ a.T @ b)
    expected = torch.cat(parts)
    torch.testing.assert_close(y_MN, expected.detach(), rtol=1e-5, atol=1e-5)  # float32, another order of factors
    (expected[:12] * dy_TN).sum().backward()
    grads = {s: {0: Factors(torch.zeros(3, 10), torch.zeros(3, 6), 1.0)} for s in table}
    dx_TK = torch.zeros(12, 10)
    dropout_backward(x_MK[:12], dy_TN, dx_TK, 0, segments[:3], table, grads, dropout)
    assert leaf.grad is not None
    torch.testing.assert_close(dx_TK, leaf.grad[:12], rtol=1e-5, atol=1e-5)
    for slot, (a, b) in weights.items():
        torch.testing.assert_close(grads[slot][0].a_RK, a.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads[slot][0].b_RN, b.grad, rtol=1e-5, atol=1e-5)


def test_expectation_is_the_result_without_dropout() -> None:
    table = {0: {0: factors(1, 1.0)}}
    segment = (Segment(0, 0, 1),)
    x, plain = torch.randn(1, 10), torch.zeros(1, 6)
    smlm_forward(x, plain, 0, segment, table)
    n = 4000
    many = torch.zeros(n, 6)
    dropout = DropoutRows({0: 0.4}, keys(num_rows=n))
    dropout_forward(x.expand(n, 10), many, 0, (Segment(0, 0, n),), table, dropout)
    error = (many.mean(0) - plain[0]).abs() / (many.std(0) / n**0.5)
    assert float(error.max()) < 5  # standard errors of the mean


def test_segments_without_a_rate_are_bit_identical_to_the_plain_kernels() -> None:
    table = {0: {0: factors(1, 1.0)}}
    segments, dropout = (Segment(0, 0, 4),), DropoutRows({7: 0.5}, keys(num_rows=4))
    x, dy = torch.randn(4, 10), torch.randn(4, 6)
    results = []
    for dropping in (False, True):
        y, dx = torch.zeros(4, 6), torch.zeros(4, 10)
        grads = {0: {0: Factors(torch.zeros(3, 10), torch.zeros(3, 6), 1.0)}}
        if dropping:
            dropout_forward(x, y, 0, segments, table, dropout)
            dropout_backward(x, dy, dx, 0, segments, table, grads, dropout)
        else:
            smlm_forward(x, y, 0, segments, table)
            smlm_backward(x, dy, dx, 0, segments, table, grads)
        results.append((y, dx, grads[0][0].a_RK, grads[0][0].b_RN))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bfloat16_rows_drop_the_same_values() -> None:
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(40, 10, generator=generator), torch.randn(40, 6, generator=generator)
    dropout, segments = DropoutRows({0: 0.1}, keys(num_rows=40)), (Segment(0, 0, 40),)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        f = factors(1, 1.0)
        table = {0: {0: Factors(f.a_RK.to(dtype), f.b_RN.to(dtype), 1.0)}}
        grads = {0: {0: Factors(torch.zeros(3, 10), torch.zeros(3, 6), 1.0)}}
        y, dx = torch.zeros(40, 6, dtype=dtype), torch.zeros(40, 10, dtype=dtype)
        dropout_forward(x.to(dtype), y, 0, segments, table, dropout)
        dropout_backward(x.to(dtype), dy.to(dtype), dx, 0, segments, table, grads, dropout)
        results.append((y.float(), dx.float(), grads[0][0].a_RK, grads[0][0].b_RN))
    for exact, rounded in zip(*results, strict=True):
        # bfloat16 rounds at 2**-9, a few times on the way; another mask would differ by the values themselves.
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03 * float(exact.abs().max()))
    dropped = dropped_TK(dropout.keys_T, 0, 10, 0.1)
    assert bool(dropped.any()) and not results[1][1][dropped].any()
