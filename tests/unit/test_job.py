"""A job's states, schedule and sums, without a model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from loquetier.adapters.arena import num_elements
from loquetier.adapters.spec import LinearTarget, LoraSpec, ModulePlan
from loquetier.config import TrainingConfig
from loquetier.errors import JobStateError, TrainingDivergedError
from loquetier.training.data import Example, batches
from loquetier.training.ending import divergence
from loquetier.training.job import EvalResult, EvalTask, FinetuneJob, JobStatus, LossSum
from loquetier.training.optimizer import AdapterOptimizer

MODULES = (ModulePlan(LinearTarget("model.layers.0.q_proj", 0, 4, 3, 0), 2, 1.0),)
SLOT = 9


def example(length: int, labels: int) -> Example:
    """`length` tokens, the last `labels` of them learnt."""
    return Example(tuple(range(length)), tuple(i >= length - labels for i in range(length)))


EXAMPLES = tuple(example(4 + i, 1 + i % 3) for i in range(5))


def make_job(config: TrainingConfig, evals: tuple[Example, ...] = ()) -> FinetuneJob:
    optimizer = AdapterOptimizer(torch.ones(num_elements(MODULES)), MODULES, config)
    return FinetuneJob(1, "job", LoraSpec(), config, EXAMPLES, evals, SLOT, optimizer)


def run_step(job: FinetuneJob, nll: float = 2.0) -> list[int]:
    """One optimizer step whose rows all lose `nll`; returns the examples' numbers."""
    items = list(job.ready_items())
    job.take({item.item_id for item in items})
    for item in items:
        job.record(nll * job.example(item.item_id).num_labels, 0.0, job.example(item.item_id).num_labels)
    job.finish_items(len(items))
    job.optimizer_step()
    return [item.item_id % len(EXAMPLES) for item in items]


# --- states ---

ENDS = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.DETACHED}
STOPPED = {JobStatus.FAILED, JobStatus.CANCELLED}
LEGAL = {
    *((JobStatus.VALIDATING_FILES, to) for to in STOPPED | {JobStatus.QUEUED, JobStatus.PAUSED}),
    *((JobStatus.QUEUED, to) for to in STOPPED | {JobStatus.RUNNING, JobStatus.PAUSED}),
    *((JobStatus.RUNNING, to) for to in ENDS | {JobStatus.PAUSED}),
    *((JobStatus.PAUSED, to) for to in set(JobStatus) - {JobStatus.PAUSED}),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(JobStatus, JobStatus)))
def test_transitions(before: JobStatus, after: JobStatus) -> None:
    job = make_job(TrainingConfig())
    job.status = before
    if (before, after) in LEGAL:
        job.move(after)
        assert job.status is after
    else:
        with pytest.raises(JobStateError, match=f"is {before.value} and cannot become {after.value}"):
            job.move(after)
        assert job.status is before


def test_final_states() -> None:
    assert {status for status in JobStatus if status.is_final} == ENDS


# --- items ---


def test_items_follow_the_data_order_and_wait_for_the_backward() -> None:
    job = make_job(TrainingConfig(batch_size=2, num_epochs=2, seed=3))
    expected = list(batches(5, 2, seed=3, shuffle=True, epochs=2))
    assert job.total_steps == len(expected) == 6
    for numbers in expected:
        items = list(job.ready_items())
        assert [i.item_id % 5 for i in items] == numbers
        assert [(i.num_rows, i.slot, i.job_id) for i in items] == [(EXAMPLES[n].num_rows, SLOT, 1) for n in numbers]
        assert job.row_weight == 1 / sum(EXAMPLES[n].num_labels for n in numbers)
        assert job.ready_items() == items  # asking again changes nothing
        job.take({items[0].item_id})
        assert job.ready_items() == items[1:]
        job.take({i.item_id for i in items})
        assert job.has_open_rows and job.ready_items() == [] and not job.is_step_ready
        for item in items:
            job.record(1.0, 1.0, job.example(item.item_id).num_labels)
        job.finish_items(len(items))
        assert job.is_step_ready and not job.has_open_rows
        job.optimizer_step()
        assert not job.is_step_ready
    assert job.ready_items() == []


def test_an_example_that_comes_twice_in_a_step_has_two_ids() -> None:
    job = make_job(TrainingConfig(batch_size=4, gradient_accumulation_steps=4, max_steps=1))
    items = job.ready_items()
    assert len({i.item_id for i in items}) == len(items)


def test_a_paused_job_offers_nothing_and_goes_on_where_it_was() -> None:
    job = make_job(TrainingConfig(batch_size=2))
    items = list(job.ready_items())
    job.move(JobStatus.PAUSED)
    assert job.ready_items() == []
    job.move(JobStatus.RUNNING)
    assert job.ready_items() == items


def test_a_job_waits_for_its_evaluation() -> None:
    job = make_job(TrainingConfig(batch_size=2))
    job.evaluation = EvalTask(2, SLOT, EXAMPLES)
    assert job.ready_items() == []


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (TrainingConfig(batch_size=2, num_epochs=3), 9),
        (TrainingConfig(batch_size=2, gradient_accumulation_steps=2, num_epochs=3), 6),
        (TrainingConfig(batch_size=8), 1),
        (TrainingConfig(batch_size=2, num_epochs=3, max_steps=4), 4),
        (TrainingConfig(batch_size=2, num_epochs=1, max_steps=40), 40),
    ],
)
def test_total_steps(config: TrainingConfig, steps: int) -> None:
    assert make_job(config).total_steps == steps


# --- records ---


def test_loss_is_the_mean_over_labelled_tokens_not_over_examples() -> None:
    job = make_job(TrainingConfig(batch_size=2, shuffle=False))
    items = job.ready_items()
    job.take({i.item_id for i in items})
    job.record(3.0, 1.0, 1)
    job.record(8.0, 0.0, 2)
    job.finish_items(2)
    record = job.optimizer_step()
    assert record.loss == pytest.approx(11 / 3) and record.accuracy == pytest.approx(1 / 3)
    assert record.num_tokens == EXAMPLES[0].num_rows + EXAMPLES[1].num_rows
    assert record.step == job.num_steps == 1 and record.seconds >= 0 and record.evaluation is None


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    job = make_job(TrainingConfig(batch_size=2, num_epochs=9))
    run_step(job)
    before = job.optimizer.master.clone()
    moments = {name: tensor.clone() for name, tensor in job.optimizer.state().items()}
    for step in (2, 3, 4):
        assert divergence(job) is None
        job.optimizer.grad.fill_(1.0)
        run_step(job, nll=math.inf)
        record = job.history[-1]
        assert (record.step, record.skipped, record.loss) == (step, True, math.inf)
        assert record.reason == f"loss inf and gradient norm nan at step {step}"
        assert torch.equal(job.optimizer.master, before) and torch.count_nonzero(job.optimizer.grad) == 0
        assert all(torch.equal(tensor, moments[name]) for name, tensor in job.optimizer.state().items())
    error = divergence(job)
    assert isinstance(error, TrainingDivergedError)
    for part in ("'job': 3 optimizer steps", "loss inf", "step 4", "step 1 are kept", "learning_rate (0.0002)"):
        assert part in str(error)


def test_a_good_step_between_forgives_and_skipped_ones_keep_the_data_order() -> None:
    job, quiet = (make_job(TrainingConfig(batch_size=2, num_epochs=9)) for _ in range(2))
    for bad in (True, True, False, True, True, False):
        assert run_step(job, nll=math.nan if bad else 2.0) == run_step(quiet)
        assert divergence(job) is None
    assert [r.skipped for r in job.history] == [True, True, False] * 2
    assert job.num_steps == quiet.num_steps == 6 and not any(r.skipped for r in quiet.history)
    assert [r.learning_rate for r in job.history] == [r.learning_rate for r in quiet.history]


def test_a_job_that_ends_without_one_update_has_diverged() -> None:
    job = make_job(TrainingConfig(batch_size=2, max_steps=2))
    run_step(job, nll=math.nan)
    assert divergence(job) is None and not job.is_published_now
    run_step(job, nll=math.nan)
    assert "2 optimizer steps" in str(divergence(job)) and "step 0 are kept" in str(divergence(job))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    job = make_job(TrainingConfig(batch_size=2))
    before = job.optimizer.master.clone()
    job.optimizer.grad[1] = math.nan
    run_step(job)
    assert job.history[0].skipped and "gradient norm nan at step 1" in str(job.history[0].reason)
    assert torch.equal(job.optimizer.master, before) and job.optimizer.state() == {}


def test_loss_sum() -> None:
    sums = LossSum()
    assert sums.result() == EvalResult(0.0, 0.0, 0)
    sums.add(2.0, 1.0, 2)
    sums.add(1.0, 1.0, 1)
    assert sums.result() == EvalResult(1.0, 2 / 3, 3)
    assert sums.result().perplexity == pytest.approx(math.e)
    assert math.isfinite(EvalResult(1e6, 0.0, 1).perplexity)


# --- publishing and evaluating ---


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ({"publish": "every_step"}, [1, 2, 3, 4, 5]),
        ({"publish": "every_n_steps", "publish_every": 2}, [2, 4, 5]),
        ({"publish": "end"}, [5]),
    ],
)
def test_publish_schedule(settings: dict[str, object], published: list[int]) -> None:
    job = make_job(TrainingConfig(batch_size=2, max_steps=5, **settings))  # type: ignore[arg-type]
    found = []
    for step in range(1, 6):
        run_step(job)
        found += [step] * job.is_published_now
    assert found == published


@pytest.mark.parametrize(("every", "due"), [(0, [5]), (2, [2, 4, 5]), (5, [5]), (9, [5])])
def test_evaluation_schedule(every: int, due: list[int]) -> None:
    job = make_job(TrainingConfig(batch_size=2, max_steps=5, eval_every=every), EXAMPLES[:1])
    without = make_job(TrainingConfig(batch_size=2, max_steps=5, eval_every=every))
    found = []
    for step in range(1, 6):
        run_step(job)
        run_step(without)
        found += [step] * job.is_eval_due
        assert not without.is_eval_due
    assert found == due


def test_evaluation_task() -> None:
    task = EvalTask(4, SLOT, EXAMPLES[:3])
    assert [(i.item_id, i.job_id, i.num_rows) for i in task.ready_items()] == [(0, 4, 3), (1, 4, 4), (2, 4, 5)]
    task.take(2)
    assert [i.item_id for i in task.ready_items()] == [2]
    for _ in range(3):
        assert not task.is_done
        task.record(1.0, 0.0, 1)
    assert task.is_done and task.sums.result() == EvalResult(1.0, 0.0, 3)


def test_evaluation_joins_the_record_of_its_step() -> None:
    job = make_job(TrainingConfig(batch_size=2))
    run_step(job)
    job.attach_evaluation(EvalResult(1.0, 0.5, 7))
    assert job.history[0].evaluation == EvalResult(1.0, 0.5, 7) and job.num_steps == 1
