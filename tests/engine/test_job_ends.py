"""Skipped steps, early stopping and publish="best" in a running engine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.parity.training_helpers import Engine, checked, make_engine, random_examples, run, start, watch

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.errors import ConfigError, OutOfAdapterMemoryError, TrainingDivergedError
from loquetier.training.job import EvalResult, FinetuneJob, JobStatus, LossSum, StepRecord

SPEC = LoraSpec(r=4, alpha=32)
DATA, EVALS = random_examples(6, 6, 20, 1), random_examples(4, 6, 20, 2)
CONFIG = TrainingConfig(learning_rate=1e-2, batch_size=3, max_steps=8)


def poison(job: FinetuneJob, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the losses of these steps (1-based) NaN, as a bad forward would."""

    def record(nll: float, correct: float, n: int) -> None:
        FinetuneJob.record(job, math.nan if job.num_steps + 1 in steps else nll, correct, n)

    monkeypatch.setattr(job, "record", record)


def test_row_41_skipped_steps_change_nothing_and_the_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(make_engine()) as engine:
        job, other = start(engine, "job", SPEC, CONFIG, DATA), start(engine, "other", SPEC, CONFIG, DATA)
        poison(job, monkeypatch, {3, 4, 7})
        versions: dict[int, int] = {}
        weights: dict[int, torch.Tensor] = {}

        def script(_: int) -> None:
            if job.num_steps and job.num_steps not in versions and not job.status.is_final:
                versions[job.num_steps] = engine.registry.resolve("job").number
                weights[job.num_steps] = job.optimizer.master.clone()

        run(engine, script)
        assert job.status is other.status is JobStatus.SUCCEEDED
        assert [r.step for r in job.history if r.skipped] == [3, 4, 7] and not any(r.skipped for r in other.history)
        assert torch.equal(weights[2], weights[3]) and torch.equal(weights[2], weights[4])
        assert torch.equal(weights[6], weights[7]) and not torch.equal(weights[4], weights[5])
        # Nothing new is served after a skipped step.
        assert versions == {1: 1, 2: 2, 3: 2, 4: 2, 5: 3, 6: 4, 7: 4}
        assert engine.registry.resolve("job").number == 5


def test_row_41_three_skipped_in_a_row_fail_the_job_the_last_good_version_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with checked(make_engine()) as engine:
        heard: list[tuple[JobStatus, bool | None]] = []

        def listen(job: FinetuneJob, record: StepRecord | None) -> None:
            heard.append((job.status, record and record.skipped))

        job = engine.jobs.start("job", SPEC, CONFIG, DATA, (), listen)
        other = start(engine, "other", SPEC, CONFIG, DATA)
        poison(job, monkeypatch, {3, 5, 6, 7})
        run(engine)
        assert job.status is JobStatus.FAILED and other.status is JobStatus.SUCCEEDED
        assert isinstance(job.error, TrainingDivergedError) and "step 7; the weights of step 4" in str(job.error)
        running = JobStatus.RUNNING
        assert heard[:3] == [(JobStatus.QUEUED, None), (running, None), (running, False)]
        assert heard[3:5] == [(running, False), (running, True)]
        assert heard[-2:] == [(running, True), (JobStatus.FAILED, None)] and len(heard) == 10
        assert engine.registry.resolve("job").number == 3


def run_with_losses(
    engine: Engine, config: TrainingConfig, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> tuple[FinetuneJob, list[int], dict[int, torch.Tensor]]:
    """A job whose evaluations, one per step, have these losses; the version served after each, and the weights."""
    given = iter(losses)
    versions: list[int] = []
    weights: dict[int, torch.Tensor] = {}
    result = LossSum.result

    def fake(sums: LossSum) -> EvalResult:
        real = result(sums)
        return replace(real, loss=next(given)) if real.num_tokens == sum(e.num_labels for e in EVALS) else real

    assert all(
        sum(e.num_labels for e in (DATA[i], DATA[j])) != sum(e.num_labels for e in EVALS)
        for i in range(6)
        for j in range(6)
    )
    monkeypatch.setattr(LossSum, "result", fake)

    def listen(job: FinetuneJob, record: StepRecord | None) -> None:
        if record is not None and record.evaluation is None:
            weights[record.step] = job.optimizer.master.clone()
        elif record is not None:
            names = engine.registry.names
            versions.append(engine.registry.resolve("job").number if "job" in names else 0)

    job = engine.jobs.start("job", SPEC, config, DATA, EVALS, listen)
    run(engine)
    return job, versions, weights


EVERY = replace(CONFIG, batch_size=2, eval_every=1)


def test_early_stopping_succeeds_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(make_engine()) as engine:
        config = replace(EVERY, early_stopping_patience=2)
        job, _, _ = run_with_losses(engine, config, [3.0, 2.0, 2.5, 1.5, 1.6, 1.5, 0.1], monkeypatch)
        assert job.status is JobStatus.SUCCEEDED and job.num_steps == 6 and job.error is None
        assert job.reason == "early stopping: 2 evaluations without improvement over loss 1.5 of step 4"


@pytest.mark.parametrize("publish", ["end", "every_n_steps"])
def test_what_early_stopping_ends_is_served(publish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that turned out to be the last one is published, whatever the schedule says."""
    with checked(make_engine()) as engine:
        every = {"publish_every": 4} if publish == "every_n_steps" else {}
        config = replace(EVERY, early_stopping_patience=1, publish=publish, **every)
        job, versions, weights = run_with_losses(engine, config, [3.0, 3.0], monkeypatch)
        assert job.status is JobStatus.SUCCEEDED and job.num_steps == 2 and versions == [0, 0]
        assert torch.equal(engine.arena.flat(engine.registry.resolve("job").slot), weights[2])


def test_best_serves_the_weights_of_the_lowest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(make_engine()) as engine:
        config = replace(EVERY, publish="best", max_steps=6)
        losses = [3.0, 3.5, math.nan, 2.0, 2.0, 2.1]
        job, versions, weights = run_with_losses(engine, config, losses, monkeypatch)
        assert job.status is JobStatus.SUCCEEDED and job.reason is None and job.num_steps == 6
        assert versions == [1, 1, 1, 2, 2, 2]
        served = engine.arena.flat(engine.registry.resolve("job").slot)
        assert torch.equal(served, weights[4]) and not torch.equal(served, weights[6])


def test_best_with_real_losses_serves_the_lowest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate so high that evaluations go up and down: what is served evaluates to the lowest of them."""
    with checked(make_engine()) as engine:
        config = replace(EVERY, learning_rate=0.1, publish="best")
        job = start(engine, "job", SPEC, config, DATA, eval_examples=EVALS)
        run(engine)
        losses = [r.evaluation.loss for r in job.history if r.evaluation]
        assert len(losses) == 8 and losses.index(min(losses)) < 7
        results: list[Any] = []
        engine.jobs.evaluate("job", EVALS, results.append)
        run(engine)
        assert results[0].loss == pytest.approx(min(losses), rel=1e-5)  # other rows in the step: rounding


def test_best_without_a_finite_loss_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(make_engine()) as engine:
        config = replace(EVERY, publish="best", max_steps=3)
        job, versions, _ = run_with_losses(engine, config, [math.nan] * 3, monkeypatch)
        assert job.status is JobStatus.FAILED and "publish='best' has nothing to publish" in str(job.error)
        assert versions == [0, 0, 0] and engine.registry.names == []


def test_best_without_room_to_publish_fails_the_job_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(make_engine()) as engine:
        other = start(engine, "other", SPEC, CONFIG, DATA)
        job = start(engine, "job", SPEC, replace(EVERY, publish="best"), DATA, eval_examples=EVALS)
        watch(engine, job)
        publish = type(engine.jobs.publisher).publish

        def full(publisher: Any, which: FinetuneJob) -> None:
            if which is job:
                raise OutOfAdapterMemoryError("full")
            publish(publisher, which)

        monkeypatch.setattr(type(engine.jobs.publisher), "publish", full)
        run(engine)
        assert job.status is JobStatus.FAILED and isinstance(job.error, OutOfAdapterMemoryError)
        assert other.status is JobStatus.SUCCEEDED


def test_evaluation_data_is_asked_for_before_anything_changes() -> None:
    with checked(make_engine()) as engine:
        for config in (replace(EVERY, publish="best"), replace(EVERY, early_stopping_patience=1)):
            with pytest.raises(ConfigError, match="needs evaluation data"):
                start(engine, "job", SPEC, config, DATA)
        assert not engine.arena.slots
