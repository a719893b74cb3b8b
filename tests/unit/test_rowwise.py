"""Row-limited modules: the original's values bit for bit, gradients of the train rows, nothing kept of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from loquetier.base.context import Binding, StepContext
from loquetier.base.rowwise import make_row_limited

ROWS, TRAIN = 7, 3


def bound(num_train: int = TRAIN) -> Binding:
    binding = Binding()
    binding.step = StepContext(num_rows=ROWS, num_train=num_train)
    return binding


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


CASES = {
    "norm [1, M, D]": (nn.RMSNorm(5).requires_grad_(False), [(1, ROWS, 5)], 1),
    "q norm [1, M, H, D]": (nn.RMSNorm(5).requires_grad_(False), [(1, ROWS, 4, 5)], 1),
    "q norm [1, H, M, D]": (nn.RMSNorm(5).requires_grad_(False), [(1, 4, ROWS, 5)], 2),
    "gate": (gated, [(1, ROWS, 5), (1, ROWS, 5)], 1),
}


@pytest.mark.parametrize("num_train", [TRAIN, ROWS])
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_what_is_kept(case: str, num_train: int) -> None:
    fn, shapes, axis = CASES[case]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = make_row_limited(fn, bound(num_train))(*inputs)
    assert torch.equal(out, fn(*inputs))
    per_row = sum(x[0].numel() for x in inputs) // ROWS
    assert sum(t.untyped_storage().nbytes() for t in kept) == num_train * per_row * 4
    grad = torch.randn(out.shape)
    grad.narrow(axis, num_train, ROWS - num_train).zero_()
    mine = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(fn(*inputs), inputs, grad)
    for got, expected in zip(mine, theirs, strict=True):
        # The same arithmetic per row, vectorised over fewer rows.
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        assert torch.count_nonzero(got.narrow(axis, num_train, ROWS - num_train)) == 0


def test_as_many_heads_as_rows_is_still_exact() -> None:
    """The shape does not tell the axis then: plain autograd takes over."""
    norm = nn.RMSNorm(5).requires_grad_(False)
    x = torch.randn(1, ROWS, ROWS, 5, requires_grad=True)
    grad = torch.randn(x.shape)
    out = make_row_limited(norm, bound())(x)
    assert torch.equal(out, norm(x))
    (mine,), (theirs,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(norm(x), x, grad)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("binding", [Binding(), bound(0)], ids=["outside a step", "no train rows"])
def test_without_train_rows_it_is_the_original(binding: Binding) -> None:
    calls: list[Tensor] = []

    def fn(x: Tensor) -> Tensor:
        calls.append(x)
        return x * 2

    x = torch.randn(1, ROWS, 5, requires_grad=True)
    assert torch.equal(make_row_limited(fn, binding)(x), 2 * x) and calls[0] is x


def test_inference_mode_records_nothing() -> None:
    with torch.no_grad():
        out = make_row_limited(lambda x: x * 2, bound())(torch.randn(1, ROWS, 5, requires_grad=True))
    assert out.grad_fn is None
