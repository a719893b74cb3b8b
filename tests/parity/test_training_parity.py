"""Training among traffic equals a plain PEFT + torch loop: gradients, losses and final weights, float32.

What differs is only rounding: GEMMs over many rows instead of one example at a time, one GEMM for q|k|v, another
order of sums. Measured 4e-7 relative on losses and 8e-6 absolute on weights after 50 steps; Adam divides by the
gradient's own size, so it magnifies rounding where gradients are tiny. The bounds leave a factor 10 and more, and are
far below what a wrong row, mask, scale or learning rate would give (1e-2 and up).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.parity.training_helpers import (
    MIB,
    Engine,
    Traffic,
    Watch,
    absolute_difference,
    ask,
    checked,
    load_random_adapter,
    make_engine,
    peft_gradients,
    peft_model,
    peft_parameters,
    peft_train,
    random_examples,
    random_factors,
    relative_difference,
    run,
    slot_factors,
    start,
    watch,
)
from tests.tiny import FAMILIES

from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.config import TrainingConfig
from loquetier.training.data import Example
from loquetier.training.job import FinetuneJob, JobStatus

LOSS_RTOL = 1e-5
WEIGHT_ATOL = 1e-4
GRADIENT_RTOL = 1e-5
"""Of the factor's largest element; measured 1.2e-6 (float32 rounds at 6e-8, and sums run over some hundred terms)."""
LAYERS = {"layers": 3}

ALL = LoraSpec(r=8, alpha=16)
SOME = LoraSpec(r=4, alpha=4, target_modules=("q_proj", "v_proj", "down_proj"), use_rslora=True)
FAST = TrainingConfig(learning_rate=1e-3, batch_size=4, max_steps=50, seed=1)
DECAYING = TrainingConfig(
    learning_rate=3e-3,
    batch_size=1,
    gradient_accumulation_steps=3,
    max_steps=50,
    seed=2,
    weight_decay=0.1,
    lr_scheduler_type="cosine",
    warmup_ratio=0.1,
)
LONG, SHORT = random_examples(13, 8, 40, 3), random_examples(7, 4, 20, 4)


def busy_engine(**config: object) -> Engine:
    """Three layers, another adapter served beside the base, and backward cut into single layers under traffic."""
    engine = make_engine(model=LAYERS, backward_units_while_serving=1, adapter_memory=16 * MIB, **config)
    load_random_adapter(engine, "other", LoraSpec(r=3, target_modules=("o_proj", "gate_proj")), 1)
    return engine


def expect_equal(engine: Engine, job: FinetuneJob, seen: Watch, examples: Sequence[Example]) -> None:
    """The job's losses, learning rates and published weights are those of the PEFT loop."""
    assert job.status is JobStatus.SUCCEEDED
    twin = peft_model("llama", job.spec, seen.initial, **LAYERS)
    expected = peft_train(twin, examples, job.config, job.total_steps)
    torch.testing.assert_close([r.loss for r in job.history], expected, rtol=LOSS_RTOL, atol=0.0)
    _, _, weights = engine.adapters.factors(job.name)
    assert absolute_difference(weights, peft_parameters(twin)) < WEIGHT_ATOL
    # Relative to each factor's largest weight (about 0.05 to 0.3 here) the same bound is 1e-3 at worst.
    assert relative_difference(weights, peft_parameters(twin)) < 1e-3
    # The bound means something only if the weights moved much farther than it.
    assert absolute_difference(weights, seen.initial) > 50 * WEIGHT_ATOL


def test_two_jobs_among_traffic_equal_peft_over_50_steps() -> None:
    with checked(busy_engine()) as engine:
        a, b = start(engine, "a", ALL, FAST, LONG), start(engine, "b", SOME, DECAYING, SHORT)
        seen_a, seen_b = watch(engine, a), watch(engine, b)
        traffic = Traffic(engine, seed=0)
        run(engine, traffic)
        traffic.check()
        assert {"tiny", "other", "a", "b"} <= {answer.model for answer in traffic.answers}
        assert engine.totals.mixed_steps > 20
        expect_equal(engine, a, seen_a, LONG)
        expect_equal(engine, b, seen_b, SHORT)


def test_jobs_that_join_leave_and_pause_do_not_disturb_each_other() -> None:
    config = TrainingConfig(learning_rate=2e-3, batch_size=2, max_steps=16, seed=5, lr_scheduler_type="linear")
    late = TrainingConfig(learning_rate=1e-3, batch_size=3, max_steps=10, seed=6, warmup_ratio=0.3)
    with checked(busy_engine()) as engine:
        stays = start(engine, "stays", ALL, config, SHORT)
        leaves = start(engine, "leaves", SOME, FAST, LONG)
        seen = {stays: watch(engine, stays)}
        joined: list[FinetuneJob] = []
        traffic = Traffic(engine, seed=1)

        def script(step: int) -> None:
            traffic(step)
            if stays.num_steps == 3 and not joined:
                joined.append(start(engine, "joins", SOME, late, LONG))
                seen[joined[0]] = watch(engine, joined[0])
                engine.jobs.set_status(stays, JobStatus.PAUSED)
            if joined and joined[0].num_steps == 2 and leaves.status is JobStatus.RUNNING:
                engine.jobs.set_status(leaves, JobStatus.CANCELLED)
            if stays.status is JobStatus.PAUSED and joined[0].num_steps == 5:
                assert stays.num_steps <= 4  # the step that was under way was finished, no more
                engine.jobs.set_status(stays, JobStatus.RUNNING)

        run(engine, script)
        traffic.check()
        assert leaves.status is JobStatus.CANCELLED and 0 < leaves.num_steps < 50
        expect_equal(engine, stays, seen[stays], SHORT)
        expect_equal(engine, joined[0], seen[joined[0]], LONG)


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(lr_scheduler_type="linear", warmup_ratio=0.25, weight_decay=0.05, max_steps=12),
        TrainingConfig(lr_scheduler_type="constant", warmup_ratio=0.15, max_grad_norm=0.0, num_epochs=4),
        TrainingConfig(max_grad_norm=0.05, shuffle=False, adam_beta2=0.95, num_epochs=3, max_steps=None),
    ],
    ids=["linear+warmup+decay", "constant+warmup+no-clip", "clip+file-order"],
)
def test_schedule_decay_clipping_and_order(config: TrainingConfig) -> None:
    from dataclasses import replace

    config = replace(config, learning_rate=4e-3, batch_size=3)
    with checked(busy_engine()) as engine:
        job = start(engine, "job", SOME, config, SHORT)
        seen = watch(engine, job)
        run(engine, Traffic(engine, seed=2))
        assert job.total_steps == (12 if config.max_steps else config.num_epochs * 3)
        expect_equal(engine, job, seen, SHORT)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_plus_is_pefts(weight_decay: float) -> None:
    config = TrainingConfig(
        learning_rate=1e-3,
        batch_size=3,
        max_steps=20,
        loraplus_lr_ratio=8.0,
        weight_decay=weight_decay,
        lr_scheduler_type="linear",
        warmup_ratio=0.1,
    )
    with checked(busy_engine()) as engine:
        job = start(engine, "job", SOME, config, SHORT)
        seen = watch(engine, job)
        run(engine, Traffic(engine, seed=3))
        expect_equal(engine, job, seen, SHORT)


# --- gradients of one step ---


def one_step_gradients(
    family: str, spec: LoraSpec, examples: Sequence[Example], *, inference: int, model: dict[str, object] | None = None
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], Watch]:
    """Gradients of one optimizer step that continues from random weights, with `inference` requests in its forward."""
    engine = make_engine(family, model=model)
    modules = resolve_modules(spec, engine.base.targets)
    engine.adapters.load("from", spec, modules, random_factors(engine, spec, 11))
    for number in range(inference):
        ask(engine, "from" if number % 2 else "tiny", range(10 + number, 22 + 2 * number), 8)
    if inference:
        engine.step()  # some prefill now, so that the training step has decode rows and new prefill rows
        for number in range(inference):
            ask(engine, "tiny" if number % 2 else "from", range(40, 45 + number), 8)
    config = TrainingConfig(batch_size=len(examples), max_steps=1)
    job = start(engine, "job", spec, config, examples, start_from="from")
    slot = job.slot
    seen = watch(engine, job)
    while not seen.gradients:
        report = engine.step()
        assert not report.train_rows or (report.prefill_rows > 0) == (report.decode_rows > 0) == bool(inference)
    (gradient,) = seen.gradients
    factors = slot_factors_of(engine, modules, gradient, slot)
    run(engine)
    engine.check_integrity()
    return factors, seen


def slot_factors_of(
    engine: Engine, modules: tuple[object, ...], flat: torch.Tensor, slot: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`flat` in the layout of a slot that is gone already: any live slot of the same modules has the same."""
    live = engine.registry.resolve("from").slot
    assert engine.arena.modules(live) == modules, slot
    return slot_factors(engine, live, flat)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_and_without_inference_rows_equal_peft(family: str) -> None:
    # With "all-linear" PEFT would also adapt the experts and the router, which are no nn.Linear.
    targets = ("q_proj", "k_proj", "v_proj", "o_proj") if family == "qwen3_moe" else "all-linear"
    spec, examples = LoraSpec(r=4, target_modules=targets), random_examples(3, 6, 30, 7)
    alone, seen = one_step_gradients(family, spec, examples, inference=0)
    mixed, _ = one_step_gradients(family, spec, examples, inference=4)
    expected = peft_gradients(peft_model(family, spec, seen.initial), examples)
    assert relative_difference(alone, expected) < GRADIENT_RTOL
    # Not bit-equal: the GEMM library picks its blocking, and so its order of sums, by the number of rows.
    assert relative_difference(mixed, alone) < GRADIENT_RTOL


@pytest.mark.parametrize("inference", [0, 3])
def test_layers_to_transform(inference: int) -> None:
    spec = LoraSpec(r=4, target_modules=("q_proj", "down_proj"), layers_to_transform=(2, 3))
    examples = random_examples(2, 6, 20, 8)
    ours, seen = one_step_gradients("llama", spec, examples, inference=inference, model={"layers": 5})
    expected = peft_gradients(peft_model("llama", spec, seen.initial, layers=5), examples)
    assert relative_difference(ours, expected) < GRADIENT_RTOL


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize(
    ("targets", "inference"), [(("lm_head",), 0), (("lm_head", "v_proj"), 3), (("lm_head",), 3)], ids=str
)
def test_adapter_on_lm_head(family: str, targets: tuple[str, ...], inference: int) -> None:
    spec = LoraSpec(r=4, target_modules=targets)
    examples = random_examples(2, 6, 20, 9)
    ours, seen = one_step_gradients(family, spec, examples, inference=inference)
    expected = peft_gradients(peft_model(family, spec, seen.initial), examples)
    assert relative_difference(ours, expected) < GRADIENT_RTOL


def test_ranks_and_alphas_by_pattern() -> None:
    spec = LoraSpec(r=4, alpha=8, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 3})
    examples = random_examples(2, 6, 20, 9)
    ours, seen = one_step_gradients("llama", spec, examples, inference=2)
    expected = peft_gradients(peft_model("llama", spec, seen.initial), examples)
    assert relative_difference(ours, expected) < GRADIENT_RTOL


# --- backward in pieces ---


def sliced_run(units: int) -> tuple[list[float], torch.Tensor, int]:
    """Six optimizer steps, each one tape, while one long answer is generated all the time."""
    engine = make_engine(model=LAYERS, backward_units_while_serving=units)
    ask(engine, "tiny", range(20, 30), 60)
    engine.step()
    config = TrainingConfig(learning_rate=1e-3, batch_size=3, max_steps=6, publish="end")
    job = start(engine, "job", ALL, config, LONG)
    seen = watch(engine, job)
    steps_with_backward = 0
    while not job.status.is_final:
        report = engine.step()
        steps_with_backward += report.backward_units > 0
        assert report.decode_rows == 1  # all steps of both runs have one decode row
    run(engine)
    engine.check_integrity()
    assert seen.weights is not None
    return [r.loss for r in job.history], seen.weights, steps_with_backward


def test_backward_in_pieces_is_bit_identical() -> None:
    at_once, in_pieces = sliced_run(units=8), sliced_run(units=1)
    assert (at_once[2], in_pieces[2]) == (6, 18)  # 3 layers: one unit each
    assert at_once[0] == in_pieces[0]
    assert torch.equal(at_once[1], in_pieces[1])
