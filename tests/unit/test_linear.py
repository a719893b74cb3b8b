"""The base's linears with adapters: against dense float64 arithmetic, for every mix of kinds, adapters and groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from loquetier.base.context import Binding, StepContext
from loquetier.base.linear import LinearGroup, VirtualLinear
from loquetier.errors import UnsupportedModelError
from loquetier.kernels.reference import Factors, FactorTable, Segment

K, ROWS = 6, 11
OUT = (5, 3, 4)
SCALES = {0: 2.0, 1: 0.5, 2: 1.5}
SLOTS = {0: {0: 2, 2: 3}, 1: {1: 1}, 2: {0: 4, 1: 2, 2: 1}}
"""slot -> module -> rank. Module 3 is outside the group."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_group(num_members: int, bias: bool) -> tuple[list[VirtualLinear], list[nn.Linear], Binding]:
    torch.manual_seed(1)
    linears = [nn.Linear(K, out, bias=bias).requires_grad_(False) for out in OUT[:num_members]]
    originals = [nn.Linear(K, m.out_features, bias=bias).double() for m in linears]
    for original, linear in zip(originals, linears, strict=True):
        original.load_state_dict(linear.state_dict())
    binding = Binding()
    group = LinearGroup(linears, list(range(num_members)), binding)
    return [VirtualLinear(m, group, i) for i, m in enumerate(linears)], originals, binding


def tables() -> tuple[FactorTable, FactorTable]:
    g = generator()
    factors = {
        slot: {
            m: Factors(torch.randn(r, K, generator=g), torch.randn(r, OUT[m], generator=g), SCALES[slot])
            for m, r in modules.items()
        }
        for slot, modules in SLOTS.items()
    }
    grads = {
        slot: {m: Factors(torch.zeros_like(f.a_RK), torch.zeros_like(f.b_RN), f.scale) for m, f in modules.items()}
        for slot, modules in factors.items()
    }
    return factors, grads


def dense(
    x_MK: Tensor, originals: list[nn.Linear], segments: tuple[Segment, ...], factors: FactorTable
) -> list[Tensor]:
    """What the members must give, in float64."""
    outputs = []
    for m, original in enumerate(originals):
        y_MN = original(x_MK)
        for slot, start, stop in segments:
            if m in factors[slot]:
                f = factors[slot][m]
                delta = f.scale * (x_MK[start:stop] @ f.a_RK.T) @ f.b_RN
                y_MN = torch.cat([y_MN[:start], y_MN[start:stop] + delta, y_MN[stop:]])
        outputs.append(y_MN)
    return outputs


SEGMENTS = {
    "one adapter": (Segment(0, 0, 4), Segment(0, 4, 11)),
    "mixed, with base rows": (Segment(0, 0, 2), Segment(2, 2, 4), Segment(1, 5, 8), Segment(0, 9, 11)),
    "only base rows in training": (Segment(2, 4, 9),),
    "base only": (),
}


@pytest.mark.parametrize("num_train", [0, 4, ROWS])
@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize(("num_members", "bias"), [(1, False), (3, True)])
def test_forward_and_backward(case: str, num_members: int, bias: bool, num_train: int) -> None:
    segments = tuple(s for s in SEGMENTS[case] if s.stop <= num_train or s.start >= num_train)
    virtual, originals, binding = make_group(num_members, bias)
    factors, grads = tables()
    binding.step = StepContext(num_rows=ROWS, num_train=num_train, segments=segments, factors=factors, grads=grads)
    x = torch.randn(1, ROWS, K, generator=generator(2), requires_grad=num_train > 0)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        outputs = [v(x) for v in virtual]
    exact = {
        slot: {
            m: Factors(f.a_RK.double().requires_grad_(), f.b_RN.double().requires_grad_(), f.scale)
            for m, f in table.items()
        }
        for slot, table in factors.items()
    }
    x64 = x.detach()[0].double().requires_grad_()
    expected = dense(x64, originals, segments, exact)
    for out, want in zip(outputs, expected, strict=True):
        # float32 against float64: sums of six products of numbers of order one.
        torch.testing.assert_close(out.detach()[0].double(), want.detach(), rtol=1e-5, atol=1e-5)
    if num_train == 0:
        assert not any(out.requires_grad for out in outputs)
        return
    dy = [torch.randn(out.shape, generator=generator(3)) for out in outputs]
    for d in dy:
        d[:, num_train:] = 0
    (dx,) = torch.autograd.grad(outputs, x, dy)
    sum((want * d[0].double()).sum() for want, d in zip(expected, dy, strict=True)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(dx[0].double(), x64.grad, rtol=1e-5, atol=1e-5)
    assert torch.count_nonzero(dx[:, num_train:]) == 0
    for slot, table in grads.items():
        for m, grad in table.items():
            for mine, leaf in ((grad.a_RK, exact[slot][m].a_RK), (grad.b_RN, exact[slot][m].b_RN)):
                want = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
                torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)
                trained = any(s.slot == slot and s.stop <= num_train for s in segments)
                assert trained or torch.count_nonzero(mine) == 0  # exactly zero, not nearly
    has_trained_adapter = any(m < num_members for s in segments if s.stop <= num_train for m in factors[s.slot])
    # The input of the train rows once per group, and only if a LoRA gradient needs it.
    assert sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values()) == (
        num_train * K * 4 if has_trained_adapter else 0
    )


def test_gradients_accumulate_over_steps() -> None:
    virtual, _, binding = make_group(1, bias=False)
    factors, grads = tables()
    binding.step = StepContext(num_rows=4, num_train=4, segments=(Segment(0, 0, 4),), factors=factors, grads=grads)
    x, dy = torch.randn(1, 4, K, requires_grad=True), torch.randn(1, 4, OUT[0])
    seen = []
    for _ in range(2):
        torch.autograd.grad(virtual[0](x), x, dy)
        seen.append(grads[0][0].b_RN.clone())
    torch.testing.assert_close(seen[1], 2 * seen[0], rtol=1e-6, atol=1e-6)


def test_siblings_share_one_gemm_and_hold_nothing_afterwards() -> None:
    virtual, originals, binding = make_group(3, bias=False)
    group = virtual[0]._group
    binding.step = StepContext(num_rows=4)
    x, other = torch.randn(1, 4, K), torch.randn(1, 4, K)
    calls: list[Tensor] = []
    apply = group.apply
    group.apply = lambda t: calls.append(t) or apply(t)  # type: ignore[method-assign, func-returns-value]
    first = [v(x) for v in virtual]
    assert len(calls) == 1 and group._input is None and group._output is None
    # An input that is another tensor is never answered from the one before.
    mixed = [virtual[0](x), virtual[1](other), virtual[2](other)]
    for got, source, index in ((first[2], x, 2), (mixed[0], x, 0), (mixed[1], other, 1), (mixed[2], other, 2)):
        torch.testing.assert_close(got.double(), originals[index](source.double()), rtol=1e-5, atol=1e-5)


def test_members_share_the_joined_weight() -> None:
    """Concatenating does not double the memory: the parameters are views of the group's weight."""
    virtual, _, _ = make_group(3, bias=False)
    storage = virtual[0]._group.weight_NK.untyped_storage().data_ptr()
    assert {v.weight.untyped_storage().data_ptr() for v in virtual} == {storage}


def test_rows_routed_around_an_adapter_are_refused() -> None:
    virtual, _, binding = make_group(1, bias=False)
    factors, grads = tables()
    binding.step = StepContext(num_rows=ROWS, segments=(Segment(0, 0, 4),), factors=factors, grads=grads)
    with pytest.raises(UnsupportedModelError, match="received 3 rows in a step of 11"):
        virtual[0](torch.randn(3, K))


def test_outside_a_step_it_is_the_base() -> None:
    virtual, originals, _ = make_group(1, bias=True)
    x = torch.randn(2, 3, K)
    torch.testing.assert_close(virtual[0](x).double(), originals[0](x.double()), rtol=1e-5, atol=1e-5)
