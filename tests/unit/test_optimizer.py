"""AdamW, clipping and schedules of one job against torch's and transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from loquetier.adapters.arena import num_elements
from loquetier.adapters.spec import LinearTarget, ModulePlan
from loquetier.config import TrainingConfig
from loquetier.training.optimizer import AdapterOptimizer, learning_rate

MODULES = (
    ModulePlan(LinearTarget("model.layers.0.q_proj", 0, 6, 5, 0), 2, 1.0),
    ModulePlan(LinearTarget("model.layers.0.v_proj", 2, 6, 3, 0), 4, 0.5),
)
SIZE = num_elements(MODULES)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.13, 1.0])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 7, 40])
def test_schedules_are_transformers(kind: str, warmup_ratio: float, total: int) -> None:
    config = TrainingConfig(learning_rate=3e-3, lr_scheduler_type=kind, warmup_ratio=warmup_ratio)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    name = "constant_with_warmup" if kind == "constant" else kind
    schedule = transformers.get_scheduler(name, optimizer, math.ceil(warmup_ratio * total), total)
    for step in range(total):
        # Both are a few float64 operations on the same numbers.
        assert learning_rate(config, step, total) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3, 1e6])
def test_steps_are_torch_adamw_with_clip_grad_norm(max_grad_norm: float) -> None:
    config = TrainingConfig(weight_decay=0.1, max_grad_norm=max_grad_norm, adam_beta1=0.8, adam_epsilon=1e-6)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(SIZE, generator=generator)
    twin = weights.clone().requires_grad_()
    reference = torch.optim.AdamW([twin], betas=(0.8, 0.999), eps=1e-6, weight_decay=0.1)
    ours = AdapterOptimizer(weights, MODULES, config)
    for step in range(20):
        grad = torch.randn(SIZE, generator=generator)
        rate = 1e-2 / (1 + step)
        ours.grad.copy_(grad)
        norm = ours.step(rate)
        twin.grad = grad.clone()
        expected = torch.nn.utils.clip_grad_norm_([twin], max_grad_norm or math.inf)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert norm == pytest.approx(float(expected), rel=1e-6)
        assert torch.count_nonzero(ours.grad) == 0
    # The fused kernel orders its float32 operations differently: a few ulp a step.
    torch.testing.assert_close(weights, twin.detach(), rtol=1e-6, atol=1e-6)


def test_gradient_views_are_the_flat_gradient() -> None:
    ours = AdapterOptimizer(torch.zeros(SIZE), MODULES, TrainingConfig())
    views = ours.grad_views
    assert {i: (tuple(f.a_RK.shape), tuple(f.b_RN.shape)) for i, f in views.items()} == {
        0: ((2, 6), (2, 5)),
        2: ((4, 6), (4, 3)),
    }
    for number, index in enumerate((0, 2)):
        views[index].a_RK.fill_(1 + number)
        views[index].b_RN.fill_(3 + number)
    assert ours.grad.tolist() == [1.0] * 12 + [2.0] * 24 + [3.0] * 10 + [4.0] * 12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_dropped_whole(bad: float) -> None:
    weights = torch.ones(SIZE)
    ours = AdapterOptimizer(weights, MODULES, TrainingConfig())
    ours.grad.fill_(0.1)
    ours.step(1e-2)
    before = weights.clone()
    moments = {name: tensor.clone() for name, tensor in ours.state().items()}
    ours.grad[3] = bad
    assert not math.isfinite(ours.step(1e-2))
    assert torch.equal(weights, before) and torch.count_nonzero(ours.grad) == 0
    assert all(torch.equal(tensor, moments[name]) for name, tensor in ours.state().items())


def test_bf16_weights_have_an_fp32_master() -> None:
    working = torch.ones(SIZE, dtype=torch.bfloat16)
    ours = AdapterOptimizer(working, MODULES, TrainingConfig(max_grad_norm=0.0))
    for _ in range(3):
        ours.grad.fill_(1.0)
        ours.step(1e-4)  # far below bf16's step of 2**-8 at 1.0: without a master nothing would ever change
    assert ours.master.dtype == torch.float32
    assert torch.equal(working, torch.ones_like(working))
    torch.testing.assert_close(ours.master, torch.full((SIZE,), 1 - 3e-4), rtol=0, atol=1e-6)
    for _ in range(60):
        ours.grad.fill_(1.0)
        ours.step(1e-4)
    assert torch.equal(working, ours.master.bfloat16()) and float(working[0]) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(SIZE, generator=generator) for _ in range(8)]
    unbroken = AdapterOptimizer(torch.ones(SIZE, dtype=dtype), MODULES, TrainingConfig())
    assert unbroken.state() == {}
    for grad in gradients[:4]:
        unbroken.grad.copy_(grad)
        unbroken.step(1e-2)
    working = torch.zeros(SIZE, dtype=dtype)
    resumed = AdapterOptimizer(working, MODULES, TrainingConfig())
    resumed.load_state(unbroken.master.clone(), {name: t.clone() for name, t in unbroken.state().items()})
    for grad in gradients[4:]:
        for optimizer in (unbroken, resumed):
            optimizer.grad.copy_(grad)
            optimizer.step(1e-2)
    assert torch.equal(resumed.master, unbroken.master)
    assert torch.equal(working, resumed.master.to(dtype))


def test_lora_plus_ratio_of_one_is_plain_adamw_and_b_alone_learns_faster() -> None:
    results = []
    for ratio in (None, 1.0, 4.0):
        generator = torch.Generator().manual_seed(2)
        weights = torch.ones(SIZE)
        ours = AdapterOptimizer(weights, MODULES, TrainingConfig(loraplus_lr_ratio=ratio))
        for _ in range(5):
            ours.grad.copy_(torch.randn(SIZE, generator=generator))
            ours.step(1e-3)
        results.append((weights - 1.0, ours.state()))
    (plain, state), (one, state_one), (four, _) = results
    # Two parameters end at other vector borders of the fused kernel, whose scalar tail may round differently.
    torch.testing.assert_close(plain, one, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(state, state_one, rtol=1e-6, atol=1e-9)
    a = 36  # A of both modules: 2 * 6 + 4 * 6
    torch.testing.assert_close(plain[:a], four[:a], rtol=1e-6, atol=1e-9)
    # Adam's step is proportional to the rate; float32 subtraction from 1.0 rounds at 6e-8.
    torch.testing.assert_close(four[a:], 4 * plain[a:], rtol=0, atol=5e-7)


@pytest.mark.parametrize("ratio", [None, 8.0])
def test_lora_plus_state_continues_bit_for_bit(ratio: float | None) -> None:
    config = TrainingConfig(loraplus_lr_ratio=ratio, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    one = AdapterOptimizer(torch.ones(SIZE), MODULES, config)
    for _ in range(3):
        one.grad.copy_(torch.randn(SIZE, generator=generator))
        one.step(1e-2)
    two = AdapterOptimizer(torch.zeros(SIZE), MODULES, config)
    two.load_state(one.master.clone(), one.state())
    for _ in range(3):
        grad = torch.randn(SIZE, generator=generator)
        for optimizer in (one, two):
            optimizer.grad.copy_(grad)
            optimizer.step(1e-2)
    assert torch.equal(one.master, two.master)
