"""The tape on a plain stack of layers: backward layer by layer is backward at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loquetier.training.tape import GraphTape

HIDDEN, LAYERS, TRAIN = 6, 4, 5


class SideEffectLinear(torch.autograd.Function):
    """``x @ w`` whose backward adds w's gradient to a buffer, as adapters get theirs; a row that is not trained
    must arrive there with a gradient of exactly zero."""

    @staticmethod
    def forward(ctx: Any, x_1MD: Tensor, weight_DD: Tensor, buffer_DD: Tensor) -> Tensor:
        ctx.save_for_backward(x_1MD)
        ctx.weight_DD, ctx.buffer_DD = weight_DD, buffer_DD
        return x_1MD @ weight_DD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x_1MD,) = ctx.saved_tensors
        assert torch.count_nonzero(grad_outputs[0][:, TRAIN:]) == 0
        ctx.buffer_DD.add_(x_1MD[0].T @ grad_outputs[0][0])
        return grad_outputs[0] @ ctx.weight_DD.T, None, None


class Stack:
    """Residual layers whose input a tape may cut. Row-wise, as all of a decoder but its attention is."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weights = [torch.randn(HIDDEN, HIDDEN, generator=generator) for _ in range(LAYERS)]
        self.buffers = [torch.zeros(HIDDEN, HIDDEN) for _ in range(LAYERS)]

    def __call__(self, hidden_1MD: Tensor, tape: GraphTape) -> Tensor:
        for number in range(LAYERS):
            hidden_1MD = tape.cut(number, hidden_1MD)
            delta: Tensor = SideEffectLinear.apply(hidden_1MD, self.weights[number], self.buffers[number])  # type: ignore[no-untyped-call]
            hidden_1MD = hidden_1MD + torch.tanh(delta)
        return hidden_1MD[0]

    def plain(self, hidden_1MD: Tensor, weights: list[Tensor]) -> Tensor:
        for weight_DD in weights:
            hidden_1MD = hidden_1MD + torch.tanh(hidden_1MD @ weight_DD)
        return hidden_1MD[0]


def rows(count: int) -> Tensor:
    return torch.randn(1, count, HIDDEN, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("first_layer", [0, 2])
@pytest.mark.parametrize("others", [0, 3])
def test_units_together_are_the_whole_backward(others: int, first_layer: int) -> None:
    stack, hidden_1MD, grad_TD = Stack(), rows(TRAIN + others), rows(TRAIN)[0]
    tape = GraphTape((), TRAIN, first_layer)
    out_MD = stack(hidden_1MD, tape)
    assert torch.equal(out_MD, stack.plain(hidden_1MD, stack.weights))  # cutting changes no value
    final_TD = tape.close(out_MD)
    assert torch.equal(final_TD, out_MD[:TRAIN]) and not final_TD.requires_grad
    tape.start(grad_TD)
    leaves = [w.clone().requires_grad_() for w in stack.weights]
    expected = torch.autograd.grad(stack.plain(hidden_1MD[:, :TRAIN], leaves), leaves, grad_TD)
    for left in range(LAYERS - first_layer, 0, -1):
        assert tape.units_left == left
        layer = first_layer + left - 1
        assert torch.count_nonzero(stack.buffers[layer]) == 0  # nothing before its turn
        tape.run_unit()
        # The same float32 products over the same rows; zero rows beside them may change the order of sums.
        torch.testing.assert_close(stack.buffers[layer], expected[layer], rtol=1e-5, atol=1e-5)
    assert tape.units_left == 0
    assert all(torch.count_nonzero(b) == 0 for b in stack.buffers[:first_layer])


def test_no_layer_is_trained() -> None:
    """An adapter on lm_head alone: the loss does all of the backward, the tape has no unit."""
    stack, tape = Stack(), GraphTape((), TRAIN, LAYERS)
    out_MD = stack(rows(TRAIN), tape)
    assert not out_MD.requires_grad
    tape.close(out_MD)
    tape.start(rows(TRAIN)[0])
    assert tape.units_left == 0


def test_a_unit_frees_its_layers_graph() -> None:
    """Memory falls with every unit: the leaf of a finished unit is gone."""
    import weakref

    stack, tape = Stack(), GraphTape((), TRAIN)
    tape.close(stack(rows(TRAIN), tape))
    tape.start(rows(TRAIN)[0])
    leaves = [weakref.ref(unit.leaf) for unit in tape._units]
    for left in range(LAYERS - 1, -1, -1):
        tape.run_unit()
        assert [ref() is not None for ref in leaves] == [True] * left + [False] * (LAYERS - left)
