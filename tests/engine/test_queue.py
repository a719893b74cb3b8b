"""More jobs than memory: they wait in order, begin when there is room, and end as if each had been alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.parity.training_helpers import (
    Engine,
    Traffic,
    checked,
    ignore,
    load_random_adapter,
    make_engine,
    random_examples,
    run,
    start,
)

from loquetier.adapters.arena import slot_elements
from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.config import MIB, TrainingConfig
from loquetier.errors import (
    ConfigError,
    EngineStoppedError,
    JobStateError,
    OutOfAdapterMemoryError,
    OutOfTrainMemoryError,
)
from loquetier.training.job import FinetuneJob, JobStatus, StepRecord

SPEC = LoraSpec(r=60)
"""Between a fifth and a quarter of a MiB on the tiny base."""
BIG = LoraSpec(r=90)
"""Three of them fill a MiB: one to train in, one to publish to, and no room for a second job."""
DATA = random_examples(6, 6, 20, 1)
CONFIG = TrainingConfig(learning_rate=1e-2, batch_size=3, max_steps=2, publish="end")
QUEUED, RUNNING, PAUSED = JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED


def slot_bytes(engine: Engine, spec: LoraSpec = SPEC) -> int:
    return 4 * slot_elements(resolve_modules(spec, engine.base.targets))


def engine_for(num_slots: int, **config: Any) -> Engine:
    return make_engine(adapter_memory=max(MIB, num_slots * slot_bytes(make_engine())), **config)


def statuses(jobs: list[FinetuneJob]) -> list[str]:
    return [job.status.value for job in jobs]


def final_weights(engine: Engine, jobs: list[FinetuneJob], traffic: Traffic | None = None) -> dict[str, torch.Tensor]:
    """Run all jobs to their ends; each is unloaded as soon as it has ended. Checks the books at every step."""
    weights: dict[str, torch.Tensor] = {}
    beginnings: list[int] = []

    def script(step: int) -> None:
        for job in jobs:
            if job.status is JobStatus.SUCCEEDED and job.name in engine.registry.names and job.name not in weights:
                weights[job.name] = engine.arena.flat(engine.registry.resolve(job.name).slot).clone()
                engine.adapters.unload(job.name)
            if job.has_memory and job.job_id not in beginnings:
                beginnings.append(job.job_id)
        waiting = [job for job in jobs if job.status is QUEUED]
        assert [job.position for job in waiting] == list(range(1, len(waiting) + 1))
        assert all(job.reason for job in waiting)
        if step % 4 == 0:
            engine.check_integrity()
        if traffic is not None:
            traffic(step)

    run(engine, script)
    script(0)
    assert beginnings == sorted(beginnings), "one overtook another"
    return weights


def test_twelve_jobs_with_room_for_two_end_as_alone() -> None:
    specs = [replace(SPEC, r=r) for r in (60, 50, 64)]
    settings = {"max_train_rows": 64, "backward_units_while_serving": 2}
    configs = [replace(CONFIG, seed=seed, max_steps=1 + seed % 3) for seed in range(13)]
    solo = {}
    for i, config in enumerate(configs):
        with checked(engine_for(6)) as alone:
            job = start(alone, f"job-{i}", specs[i % 3], config, DATA)
            solo |= final_weights(alone, [job])
    with checked(engine_for(5, **settings)) as engine:
        jobs = [start(engine, f"job-{i}", specs[i % 3], config, DATA) for i, config in enumerate(configs)]
        assert statuses(jobs[:2]) == ["running"] * 2 and set(statuses(jobs[3:])) == {"queued"}
        together = final_weights(engine, jobs, Traffic(engine, 5, every=4))
    assert set(statuses(jobs)) == {"succeeded"} and together.keys() == solo.keys()
    for name, weights in solo.items():
        # Rows of several jobs and of requests share GEMMs, whose sums then round otherwise: float32 after 3 steps.
        torch.testing.assert_close(together[name], weights, rtol=1e-3, atol=1e-5)


def test_queued_jobs_are_bit_equal_to_solo_runs_when_they_do_not_share_steps() -> None:
    """Room for one at a time: each queued job computes what it computes alone, to the bit."""
    solo = {}
    configs = [replace(CONFIG, seed=seed) for seed in range(12)]
    for i, config in enumerate(configs):
        with checked(engine_for(4)) as alone:
            solo |= final_weights(alone, [start(alone, f"job-{i}", BIG, config, DATA)])
    with checked(make_engine(adapter_memory=MIB)) as engine:
        jobs = [start(engine, f"job-{i}", BIG, config, DATA) for i, config in enumerate(configs)]
        assert statuses(jobs) == ["running"] + ["queued"] * 11
        together = final_weights(engine, jobs)
        assert together.keys() == solo.keys()
        assert all(torch.equal(together[name], weights) for name, weights in solo.items())


def test_the_first_waits_for_room_and_no_smaller_one_overtakes() -> None:
    with checked(engine_for(5)) as engine:
        first = start(engine, "first", SPEC, CONFIG, DATA)
        big = start(engine, "big", replace(SPEC, r=120), CONFIG, DATA)
        small = start(engine, "small", LoraSpec(r=2), CONFIG, DATA)
        assert statuses([first, big, small]) == ["running", "queued", "queued"]
        assert (big.position, small.position) == (1, 2)
        assert "waits for adapter memory" in str(big.reason) and small.reason == "waits for its turn"
        engine.step()
        assert statuses([big, small]) == ["queued", "queued"]
        weights = final_weights(engine, [first, big, small])
        assert len(weights) == 3 and big.position is None and big.reason is None


def test_a_listener_hears_what_a_job_waits_for() -> None:
    with checked(engine_for(5)) as engine:
        start(engine, "first", SPEC, CONFIG, DATA)
        heard: list[tuple[str, str | None]] = []
        big = engine.jobs.start(
            "big", replace(SPEC, r=120), CONFIG, DATA, (), lambda job, _: heard.append((job.status.value, job.reason))
        )
        assert heard[-1] == ("queued", big.reason) and "waits for adapter memory" in str(big.reason)
        run(engine)
        queued = [reason for status, reason in heard if status == "queued"]
        assert len(queued) == len(set(queued)), "told once for each reason"
        assert [status for status, _ in dict.fromkeys(heard)][-2:] == ["running", "succeeded"]


def test_memory_that_comes_back_while_idle_starts_the_next() -> None:
    with checked(engine_for(4)) as engine:
        for name in ("a", "b", "c"):
            load_random_adapter(engine, name, SPEC, 1)
        job = start(engine, "job", SPEC, CONFIG, DATA)
        assert job.status is QUEUED and not engine.has_work
        engine.adapters.unload("a")
        assert engine.has_work  # to look
        run(engine)
        assert job.status is JobStatus.SUCCEEDED or job.status is QUEUED
        if job.status is QUEUED:
            engine.adapters.unload("b")
            run(engine)
        assert job.status is JobStatus.SUCCEEDED


def test_what_could_never_fit_is_refused_with_the_numbers() -> None:
    with checked(engine_for(4)) as engine:
        start(engine, "other", SPEC, CONFIG, DATA)
        with pytest.raises(OutOfAdapterMemoryError, match=r"needs [\d.]+ MiB.*arena has.*Lower r.*adapter_memory"):
            start(engine, "job", replace(SPEC, r=240), CONFIG, DATA)
        assert engine.jobs.find("job") is None
        run(engine)
    long = random_examples(1, 240, 240, 1)
    with checked(make_engine(model={"layers": 20}, train_memory=MIB, tape="graph")) as engine:
        with pytest.raises(
            OutOfTrainMemoryError, match=r"needs [\d.]+ MiB.*train_memory=1048576.*Lower max_train_rows, max_seq_len"
        ):
            start(engine, "job", LoraSpec(r=2), CONFIG, long)
        assert not engine.has_work
        check = engine.jobs.admission.check_settings  # what is known before the data is
        check("job", LoraSpec(r=1), CONFIG, saves=True)
        with pytest.raises(
            OutOfTrainMemoryError, match=r"needs [\d.]+ MiB.*train_memory=1048576.*longest example has 1\)"
        ):
            check("job", LoraSpec(r=8), CONFIG, saves=True)


def test_what_it_continues_from_counts_for_what_could_never_fit() -> None:
    with checked(make_engine(adapter_memory=MIB)) as engine:  # two slots of BIG and the source are more than a MiB
        load_random_adapter(engine, "source", BIG, 1)
        with pytest.raises(OutOfAdapterMemoryError, match=r"(?<![\d.])(?!0\.0 )[\d.]+ MiB to continue from"):
            start(engine, "job", BIG, CONFIG, DATA, start_from="source")
        engine.adapters.unload("source")
        job = start(engine, "job", BIG, CONFIG, DATA)  # afresh it fits
        run(engine)
        assert job.status is JobStatus.SUCCEEDED


@pytest.mark.parametrize(("num_slots", "second"), [(4, QUEUED), (5, RUNNING)])
def test_jobs_that_publish_often_share_the_room_to_replace_a_version(num_slots: int, second: JobStatus) -> None:
    often = replace(CONFIG, publish="every_step", max_steps=4)
    with checked(engine_for(num_slots)) as engine:
        jobs = [start(engine, name, SPEC, often, DATA) for name in ("first", "second")]
        assert [job.status for job in jobs] == [RUNNING, second]
        run(engine)
        if second is QUEUED:
            engine.adapters.unload("first")
            run(engine)
        assert all(list(job.versions) == [1, 2, 3, 4] for job in jobs)  # none was left out for want of room


def test_training_memory_is_shared_by_all_jobs() -> None:
    alone = make_engine()
    one = start(alone, "job", SPEC, CONFIG, DATA).estimate
    run(alone)
    assert one is not None
    budget = one.training + one.state // 2
    assert budget > MIB
    with checked(make_engine(train_memory=budget, adapter_memory=8 * MIB)) as engine:
        jobs = [start(engine, f"job-{i}", SPEC, CONFIG, DATA) for i in range(3)]
        assert statuses(jobs)[0] == "running" and statuses(jobs)[-1] == "queued"
        assert "train_memory" in str(next(job for job in jobs if job.status is QUEUED).reason)
        run(engine)
        assert set(statuses(jobs)) == {"succeeded"}


def test_paused_and_resumed_in_the_queue_keeps_its_place() -> None:
    with checked(engine_for(4)) as engine:
        jobs = [start(engine, f"job-{i}", SPEC, CONFIG, DATA) for i in range(4)]
        waiting = [job for job in jobs if job.status is QUEUED]
        first = waiting[0]
        engine.jobs.set_status(first, PAUSED)
        assert first.position is None and waiting[1].position == 1
        with pytest.raises(JobStateError, match="queued and cannot become running"):
            engine.jobs.set_status(waiting[1], RUNNING)
        engine.jobs.set_status(first, RUNNING)
        assert first.status is QUEUED and first.position == 1 and waiting[1].position == 2
        engine.jobs.set_status(first, PAUSED)
        for job in waiting[1:]:
            engine.jobs.set_status(job, JobStatus.CANCELLED)
        run(engine)
        assert first.status is PAUSED and first.num_steps == 0
        engine.adapters.unload("job-0")
        engine.jobs.set_status(first, RUNNING)
        run(engine)
        assert first.status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("status", [JobStatus.VALIDATING_FILES, QUEUED, RUNNING, PAUSED])
def test_cancelled_in_every_state(status: JobStatus) -> None:
    with checked(engine_for(4)) as engine:
        load_random_adapter(engine, "source", SPEC, 1)
        heard: list[JobStatus] = []

        def listen(job: FinetuneJob, record: StepRecord | None) -> None:
            if record is None:
                heard.append(job.status)

        if status is JobStatus.VALIDATING_FILES:
            job = engine.jobs.reserve("job", SPEC, CONFIG, listen)
        else:
            if status is not RUNNING:
                blocker = start(engine, "blocker", BIG, replace(CONFIG, max_steps=50), DATA)
                assert blocker.status is RUNNING
            job = engine.jobs.start("job", SPEC, CONFIG, DATA, (), listen, "source")
        if status is PAUSED:
            engine.jobs.set_status(job, PAUSED)
        assert job.status is status
        with pytest.raises(ConfigError, match="already training 'job'"):
            start(engine, "job", SPEC, CONFIG, DATA)
        engine.jobs.set_status(job, JobStatus.CANCELLED)
        assert heard[-1] is job.status is JobStatus.CANCELLED and job.position is None
        assert engine.jobs.find("job") is None and not job.has_memory
        engine.check_integrity()
        for other in list(engine.trainer.jobs.values()):
            engine.jobs.set_status(other, JobStatus.CANCELLED)
        engine.jobs.supply(job, DATA, (), listen)  # too late: nothing happens
        assert job.status is JobStatus.CANCELLED
        run(engine)


def test_data_that_arrives_while_paused() -> None:
    with checked(engine_for(4)) as engine:
        job = engine.jobs.reserve("job", SPEC, CONFIG, ignore)
        assert job.status is JobStatus.VALIDATING_FILES and not engine.has_work and job.total_steps == 0
        engine.jobs.set_status(job, PAUSED)
        engine.jobs.set_status(job, RUNNING)
        assert job.status is JobStatus.VALIDATING_FILES
        engine.jobs.set_status(job, PAUSED)
        engine.jobs.supply(job, DATA, (), ignore)
        assert job.status is PAUSED and job.total_steps == 2
        engine.jobs.set_status(job, RUNNING)
        assert job.status is QUEUED
        run(engine)
        assert job.status is JobStatus.SUCCEEDED


def test_a_waiting_job_keeps_the_version_it_continues_from() -> None:
    with checked(engine_for(4)) as engine:
        load_random_adapter(engine, "source", SPEC, 1)
        weights = engine.arena.flat(engine.registry.resolve("source").slot).clone()
        blocker = start(engine, "blocker", SPEC, CONFIG, DATA)
        job = start(engine, "job", SPEC, CONFIG, DATA, start_from="source")
        assert statuses([blocker, job]) == ["running", "queued"]
        engine.adapters.unload("source")
        engine.check_integrity()
        engine.jobs.set_status(blocker, JobStatus.CANCELLED)
        engine.jobs.admit()
        assert job.status is RUNNING
        assert torch.equal(engine.arena.flat(job.slot), weights)
        run(engine)


def test_loading_and_unloading_while_jobs_wait_never_blocks_them() -> None:
    """Seeded churn of adapters beside six jobs: whatever is loaded goes again, so every job must end."""
    rng = random.Random(3)
    with checked(engine_for(5)) as engine:
        jobs = [start(engine, f"job-{i}", replace(SPEC, r=rng.choice([20, 60])), CONFIG, DATA) for i in range(6)]
        loaded: list[str] = []

        def churn(step: int) -> None:
            for job in jobs:
                if job.status.is_final and job.name in engine.registry.names:
                    engine.adapters.unload(job.name)
            if loaded and rng.random() < 0.5:
                engine.adapters.unload(loaded.pop())
            elif step < 200 and len(loaded) < 2:
                name = f"adapter-{step}"
                try:
                    load_random_adapter(engine, name, replace(SPEC, r=rng.choice([10, 60])), step)
                    loaded.append(name)
                except OutOfAdapterMemoryError:
                    pass
            engine.check_integrity()

        for step in range(400):
            churn(step)
            engine.step()
            if all(job.status.is_final for job in jobs):
                break
        assert set(statuses(jobs)) == {"succeeded"}
        run(engine)


def test_nothing_is_looked_at_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(engine_for(4)) as engine:
        running = start(engine, "running", replace(SPEC, r=100), replace(CONFIG, max_steps=5), DATA)
        waiting = start(engine, "waiting", SPEC, CONFIG, DATA)
        assert statuses([running, waiting]) == ["running", "queued"]
        looks = []
        look = type(engine.admission)._shortage
        monkeypatch.setattr(type(engine.admission), "_shortage", lambda *a: looks.append(1) or look(*a))
        while running.num_steps < 4:
            engine.step()
        assert not looks
        engine.jobs.set_status(running, JobStatus.CANCELLED)
        run(engine)
        assert looks and waiting.status is JobStatus.SUCCEEDED


def test_closing_ends_every_job_that_waits() -> None:
    engine = engine_for(4)
    jobs = [start(engine, f"job-{i}", SPEC, CONFIG, DATA) for i in range(4)]
    jobs.append(engine.jobs.reserve("late", SPEC, CONFIG, ignore))
    engine.close(EngineStoppedError("closed"))
    assert set(statuses(jobs)) == {"failed"} and all(isinstance(job.error, EngineStoppedError) for job in jobs)
    assert not engine.jobs._waiting and not engine.has_work
