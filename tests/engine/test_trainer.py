"""Jobs inside the engine: what is published is what is served, evaluations, life and death of a job."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.parity.training_helpers import (
    BASE_NAME,
    MIB,
    Answer,
    Engine,
    Traffic,
    ask,
    checked,
    load_random_adapter,
    make_engine,
    peft_model,
    peft_nll,
    random_examples,
    run,
    start,
    watch,
)
from tests.tiny import tiny_model

from loquetier.adapters.arena import num_elements
from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.config import TrainingConfig
from loquetier.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    ConfigError,
    DataError,
    EngineError,
    JobStateError,
    LoquetierError,
    OutOfAdapterMemoryError,
)
from loquetier.training.data import Example
from loquetier.training.job import EvalResult, FinetuneJob, JobStatus, StepRecord

SPEC = LoraSpec(r=4, alpha=32)
DATA, EVALS = random_examples(6, 6, 20, 1), random_examples(4, 6, 20, 2)
CONFIG = TrainingConfig(learning_rate=1e-2, batch_size=3, max_steps=4)
PROMPT = list(range(30, 45))


def served_twin(engine: Engine, model: str) -> Any:
    """HF + PEFT with the weights that the engine exports for `model`."""
    version, _, factors = engine.adapters.factors(model)
    return peft_model("llama", version.spec, factors)


def greedy(twin: Any, prompt: list[int], count: int) -> list[int]:
    """Argmax decoding without a cache: the simplest oracle."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(twin(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def top_logprobs(twin: Any, prompt: list[int], k: int) -> dict[int, float]:
    with torch.no_grad():
        logprobs = twin(input_ids=torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    values, ids = logprobs.topk(k)
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


# --- publishing ---


def test_every_step_serves_its_weights_at_once() -> None:
    with checked(make_engine()) as engine:
        job = start(engine, "job", SPEC, CONFIG, DATA)
        seen = watch(engine, job)
        found = []
        for number in range(1, 5):
            while job.num_steps < number:
                engine.step()
            version = engine.registry.resolve("job")
            assert version.number == number
            assert seen.weights is not None and torch.equal(engine.arena.flat(version.slot), seen.weights)
            twin = served_twin(engine, f"job@{number}")
            answer = ask(engine, "job", PROMPT, 1, logprobs=5)
            while not answer.is_finished:
                engine.step()
            got, expected = answer.events[0].top_logprobs, top_logprobs(twin, PROMPT, 5)
            assert got is not None
            # float32 logits of size ten, computed by other GEMM shapes; a step changes them by 1e-2 and more.
            assert got == {token: pytest.approx(logprob, abs=1e-4) for token, logprob in expected.items()}
            found.append(got)
        assert all(a != b for a, b in pairwise(found))
        run(engine)
        assert job.status is JobStatus.SUCCEEDED and engine.jobs.publisher.count == 4


def test_requests_finish_on_the_version_they_began_with() -> None:
    """Token for token what HF + PEFT gives with that version's weights, though the name moves on every step."""
    with checked(make_engine(backward_units_while_serving=1)) as engine:
        job = start(engine, "job", SPEC, TrainingConfig(learning_rate=1e-2, batch_size=2, max_steps=8), DATA)
        answers: list[tuple[Answer, list[int]]] = []
        asked: set[int] = set()

        def script(_: int) -> None:
            number = job.num_steps
            if number and number not in asked and engine.registry.resolve("job").number == number:
                asked.add(number)
                expected = greedy(served_twin(engine, "job"), PROMPT, 12)
                answers.append((ask(engine, "job", PROMPT, 12), expected))

        run(engine, script)
        assert asked == set(range(1, 9))
        for answer, expected in answers:
            assert answer.tokens == expected
        assert len({tuple(expected) for _, expected in answers}) > 3  # the versions do answer differently
        assert [v.number for v in engine.registry.versions] == [8]  # old ones are gone with their last request


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [({"publish": "end"}, [4]), ({"publish": "every_n_steps", "publish_every": 3}, [3, 4])],
    ids=str,
)
def test_publish_schedule(settings: dict[str, Any], numbers: list[int]) -> None:
    config = TrainingConfig(learning_rate=1e-2, batch_size=3, max_steps=4, **settings)
    with checked(make_engine()) as engine:
        published: list[int] = []

        def listen(job: FinetuneJob, record: StepRecord | None) -> None:
            if record is not None and engine.jobs.publisher.count > len(published):
                published.append(record.step)

        engine.jobs.start("job", SPEC, config, DATA, (), listen)
        run(engine)
        assert published == numbers
        assert engine.registry.resolve("job").number == len(numbers)


def test_a_job_replaces_a_served_adapter_with_its_first_publish() -> None:
    with checked(make_engine()) as engine:
        load_random_adapter(engine, "job", SPEC, 1)
        old = engine.registry.resolve("job")
        start(engine, "job", SPEC, CONFIG, DATA)
        engine.step()
        assert engine.registry.resolve("job") is not old and engine.registry.resolve("job").number == 2
        run(engine)


# --- listeners ---


def test_listener_hears_every_step_and_change_in_order() -> None:
    with checked(make_engine()) as engine:
        heard: list[tuple[JobStatus, int | None]] = []
        job = engine.jobs.start(
            "job", SPEC, CONFIG, DATA, (), lambda job, record: heard.append((job.status, record and record.step))
        )
        engine.step()
        engine.jobs.set_status(job, JobStatus.PAUSED)
        assert not engine.has_work
        engine.jobs.set_status(job, JobStatus.RUNNING)
        run(engine)
    running, paused, done = JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.SUCCEEDED
    assert heard == [
        (JobStatus.QUEUED, None),
        (running, None),
        (running, 1),
        (paused, None),
        (running, None),
        (running, 2),
        (running, 3),
        (running, 4),
        (done, None),
    ]


# --- evaluation ---


def expected_result(twin: Any, examples: tuple[Example, ...]) -> EvalResult:
    """Hugging Face's forward, one example at a time."""
    nll, correct, labels = 0.0, 0, 0
    with torch.no_grad():
        for example in examples:
            nll += float(peft_nll(twin, example))
            best = twin(input_ids=torch.tensor([example.tokens[:-1]])).logits[0].argmax(-1)
            correct += int((best[torch.from_numpy(example.label_rows)].numpy() == example.label_targets).sum())
            labels += example.num_labels
    return EvalResult(nll / labels, correct / labels, labels)


def expect_close(result: object, expected: EvalResult) -> None:
    assert isinstance(result, EvalResult)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)  # float32 logits, other GEMM shapes
    assert (result.accuracy, result.num_tokens) == (pytest.approx(expected.accuracy), expected.num_tokens)


@pytest.mark.parametrize("busy", [False, True])
def test_evaluate_is_hugging_faces_loss(busy: bool) -> None:
    """Alone, and spread over several steps among training and requests."""
    with checked(make_engine(max_train_rows=40)) as engine:
        factors = load_random_adapter(engine, "other", SPEC, 1)
        results: dict[str, EvalResult | LoquetierError] = {}
        if busy:
            start(engine, "job", SPEC, CONFIG, DATA)
        for model in ("other", BASE_NAME):
            engine.jobs.evaluate(model, EVALS, lambda result, model=model: results.__setitem__(model, result))  # type: ignore[misc]
        run(engine, Traffic(engine, 1, every=1) if busy else None)
        assert engine.totals.eval_rows == 2 * sum(e.num_rows for e in EVALS)
        expect_close(results["other"], expected_result(peft_model("llama", SPEC, factors), EVALS))
        expect_close(results[BASE_NAME], expected_result(tiny_model("llama"), EVALS))


def test_evaluate_runs_on_the_version_of_its_start() -> None:
    with checked(make_engine(max_train_rows=25)) as engine:
        job = start(engine, "job", SPEC, CONFIG, DATA)
        while job.num_steps < 1:
            engine.step()
        twin = served_twin(engine, "job")
        results: list[EvalResult | LoquetierError] = []
        engine.jobs.evaluate("job", EVALS, results.append)
        run(engine)
        assert job.num_steps == 4
        expect_close(results[0], expected_result(twin, EVALS))


@pytest.mark.parametrize("traffic", [False, True])
def test_eval_every(traffic: bool) -> None:
    """Results belong to the weights of their step, are made before the next step, and change nothing."""
    from dataclasses import replace

    losses = []
    for every in (0, 3):
        with checked(make_engine(max_train_rows=30)) as engine:
            config = replace(CONFIG, max_steps=5, eval_every=every)
            twins: dict[int, Any] = {}

            def listen(job: FinetuneJob, record: StepRecord | None, twins: dict[int, Any] = twins) -> None:
                if record is not None and record.step not in twins:
                    twins[record.step] = served_twin(engine, job.name)

            job = engine.jobs.start("job", SPEC, config, DATA, EVALS, listen)
            run(engine, Traffic(engine, 1) if traffic else None)
            assert job.status is JobStatus.SUCCEEDED
            losses.append([r.loss for r in job.history])
            for record in job.history:
                if record.step == 5 or (every and record.step == 3):  # without eval_every once, at the end
                    expect_close(record.evaluation, expected_result(twins[record.step], EVALS))
                else:
                    assert record.evaluation is None
    # The rows of an evaluation move other work into other steps: equal but for rounding.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- life and death ---


@pytest.mark.parametrize("status", [JobStatus.PAUSED, JobStatus.CANCELLED])
def test_a_job_stopped_between_forward_and_backward(status: JobStatus) -> None:
    """A paused job's open backward is finished; a cancelled job's is dropped with its slot, and publishes nothing."""
    with checked(make_engine(model={"layers": 4}, backward_units_while_serving=1)) as engine:
        job = start(engine, "job", SPEC, CONFIG, DATA)
        ask(engine, BASE_NAME, PROMPT, 30)
        engine.step()
        assert engine.trainer.tape is not None and job.has_open_rows
        engine.jobs.set_status(job, status)
        engine.check_integrity()
        assert (engine.trainer.tape is None) == (status is JobStatus.CANCELLED)
        while engine.trainer.tape is not None:
            assert job.slot in engine.arena.slots
            engine.step()
            engine.check_integrity()
        if status is JobStatus.CANCELLED:
            assert job.num_steps == 0 and not engine.arena.slots and engine.registry.names == []
        else:
            assert job.num_steps == 1
            run(engine)
            assert job.num_steps == 1 and not engine.has_work
            engine.jobs.set_status(job, JobStatus.RUNNING)
        run(engine)
        assert job.status is (JobStatus.CANCELLED if status is JobStatus.CANCELLED else JobStatus.SUCCEEDED)


@pytest.mark.parametrize("eval_every", [0, 1])
def test_a_job_paused_during_its_last_step_succeeds(eval_every: int) -> None:
    """There is nothing left to wait for: the step that was under way was the last one."""
    from dataclasses import replace

    with checked(make_engine(backward_units_while_serving=1)) as engine:
        config = replace(CONFIG, max_steps=1, eval_every=eval_every)
        job = start(engine, "job", SPEC, config, DATA, eval_examples=EVALS)
        other = start(engine, "other", SPEC, CONFIG, DATA)
        answer = ask(engine, BASE_NAME, PROMPT, 30)
        engine.step()
        assert job.has_open_rows
        engine.jobs.set_status(job, JobStatus.PAUSED)
        run(engine)
        assert job.status is other.status is JobStatus.SUCCEEDED and job.num_steps == 1
        assert job.history[0].evaluation is not None
        assert len(answer.tokens) == 30


def test_final_states_are_final() -> None:
    with checked(make_engine()) as engine:
        job = start(engine, "job", SPEC, CONFIG, DATA)
        run(engine)
        for status in (JobStatus.PAUSED, JobStatus.RUNNING, JobStatus.CANCELLED):
            with pytest.raises(JobStateError):
                engine.jobs.set_status(job, status)
        assert job.status is JobStatus.SUCCEEDED


def test_a_broken_step_fails_who_took_part_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with checked(make_engine()) as engine:
        waiting = start(engine, "waiting", SPEC, CONFIG, DATA)
        engine.jobs.set_status(waiting, JobStatus.PAUSED)
        job = start(engine, "job", SPEC, CONFIG, DATA)
        answer = ask(engine, BASE_NAME, PROMPT, 5)
        results: list[EvalResult | LoquetierError] = []
        engine.jobs.evaluate(BASE_NAME, EVALS, results.append)
        with monkeypatch.context() as patched:

            def fail(*_: object) -> torch.Tensor:
                raise torch.OutOfMemoryError("no memory left")

            patched.setattr(engine.base, "hidden", fail)
            engine.step()
        assert job.status is JobStatus.FAILED and isinstance(job.error, EngineError)
        assert "no memory left" in str(job.error)
        assert isinstance(answer.events[-1].error, EngineError) and isinstance(results[0], EngineError)
        engine.check_integrity()
        engine.jobs.set_status(waiting, JobStatus.RUNNING)
        again = ask(engine, BASE_NAME, PROMPT, 5)
        run(engine)
        assert waiting.status is JobStatus.SUCCEEDED
        assert again.tokens == greedy(tiny_model("llama"), PROMPT, 5)


@pytest.mark.parametrize("limits", [{"max_train_rows": 8}, {"max_train_rows": 8, "max_rows": 8}], ids=str)
def test_examples_longer_than_a_step_still_run(limits: dict[str, int]) -> None:
    losses = []
    for config in (limits, {}):
        with checked(make_engine(**config)) as engine:
            job = start(engine, "job", SPEC, CONFIG, DATA)
            run(engine, Traffic(engine, 1))
            losses.append([r.loss for r in job.history])
    # One example a step, or all in one: other GEMM shapes and another order of sums, then four Adam steps.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_start_from_a_served_version() -> None:
    with checked(make_engine()) as engine:
        load_random_adapter(engine, "from", SPEC, 1)
        source = engine.registry.resolve("from")
        before = engine.arena.flat(source.slot).clone()
        job = start(engine, "job", SPEC, CONFIG, DATA, start_from="from")
        assert torch.equal(engine.arena.flat(job.slot), before)
        run(engine)
        assert torch.equal(engine.arena.flat(source.slot), before)


# --- refused at the door ---


def test_equal_seeds_give_equal_initial_weights_and_b_is_zero() -> None:
    with checked(make_engine()) as engine:
        jobs = [
            start(engine, name, SPEC, TrainingConfig(seed=seed, max_steps=1), DATA)
            for name, seed in (("a", 1), ("b", 1), ("c", 2))
        ]
        flats = [engine.arena.flat(job.slot).clone() for job in jobs]
        assert torch.equal(flats[0], flats[1]) and not torch.equal(flats[0], flats[2])
        for factors in engine.arena.factors[jobs[0].slot].values():
            assert torch.count_nonzero(factors.b_RN) == 0
            bound = factors.a_RK.shape[1] ** -0.5
            assert 0.9 * bound < float(factors.a_RK.abs().max()) <= bound
        run(engine)


def test_no_memory_for_a_job() -> None:
    with checked(make_engine(adapter_memory=MIB)) as engine:
        modules = resolve_modules(LoraSpec(r=150), engine.base.targets)
        # One slot fits, a second one beside it (the first publish) does not.
        assert MIB // 2 < 4 * num_elements(modules) < MIB
        load_random_adapter(engine, "other", SPEC, 1)
        free = engine.arena.free_bytes
        with pytest.raises(OutOfAdapterMemoryError, match=r"needs [\d.]+ MiB.*free.*adapter_memory"):
            start(engine, "job", LoraSpec(r=150), CONFIG, DATA)
        assert engine.arena.free_bytes == free and not engine.trainer.jobs and not engine.has_work
        engine.check_integrity()
        job = start(engine, "job", SPEC, CONFIG, DATA)
        run(engine)
        assert job.status is JobStatus.SUCCEEDED


def test_without_memory_to_publish_the_old_version_serves_and_the_last_weights_are_not_lost() -> None:
    spec = LoraSpec(r=60)
    with checked(make_engine(adapter_memory=MIB)) as engine:
        modules = resolve_modules(spec, engine.base.targets)
        assert MIB // 5 < 4 * num_elements(modules) < MIB // 4
        job = start(engine, "job", spec, TrainingConfig(learning_rate=1e-2, batch_size=3, max_steps=9), DATA)
        held: list[tuple[Answer, list[int]]] = []
        last: list[torch.Tensor] = []

        def script(_: int) -> None:
            if job.has_memory:
                last[:] = [job.optimizer.master]
            if len(held) < job.num_steps and job.status is JobStatus.RUNNING:
                held.append((ask(engine, "job", PROMPT, 40), greedy(served_twin(engine, "job"), PROMPT, 40)))

        run(engine, script)
        # Four slots fit: the job's own and three versions that requests hold on to. Later versions wait for room;
        # the last one takes over the job's own slot if it must.
        assert job.status is JobStatus.SUCCEEDED and job.num_steps == 9
        served = engine.registry.resolve("job")
        assert 3 < served.number < 10
        assert torch.equal(engine.arena.flat(served.slot), last[0])
        for answer, expected in held:
            assert answer.tokens == expected


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"name": BASE_NAME}, ConfigError, "base's name"),
        ({"name": "../x"}, ConfigError, "adapter name"),
        ({"name": "running"}, ConfigError, "already training 'running'"),
        ({"spec": LoraSpec(target_modules=("nothing",))}, AdapterMismatchError, "nothing"),
        ({"examples": ()}, DataError, "0 examples"),
        ({"examples": (DATA[0], Example((5, 300), (True, True)))}, DataError, "Example 2 has token id 300"),
        ({"evals": (Example((5, -1), (True, True)),)}, DataError, "Example 1 has token id -1"),
        ({"start_from": "nobody"}, AdapterNotFoundError, "nobody"),
        ({"start_from": "other"}, ConfigError, "start_from='other'"),
        ({"start_from": BASE_NAME}, ConfigError, "start_from"),
    ],
    ids=str,
)
def test_refused_jobs_change_nothing(arguments: dict[str, Any], error: type[Exception], reason: str) -> None:
    with checked(make_engine()) as engine:
        load_random_adapter(engine, "other", LoraSpec(r=2), 1)
        running = start(engine, "running", SPEC, CONFIG, DATA)
        free, slots = engine.arena.free_bytes, engine.arena.slots
        a: dict[str, Any] = {"name": "job", "spec": SPEC, "examples": DATA, "evals": (), "start_from": None} | arguments
        with pytest.raises(error, match=reason):
            engine.jobs.start(a["name"], a["spec"], CONFIG, a["examples"], a["evals"], lambda *_: None, a["start_from"])
        assert (engine.arena.free_bytes, engine.arena.slots) == (free, slots)
        assert list(engine.trainer.jobs.values()) == [running]
        engine.check_integrity()
        run(engine)


@pytest.mark.parametrize(
    ("model", "examples", "error"),
    [("nobody", EVALS, AdapterNotFoundError), (BASE_NAME, (), DataError), ("other@2", EVALS, AdapterNotFoundError)],
)
def test_refused_evaluations(model: str, examples: tuple[Example, ...], error: type[Exception]) -> None:
    with checked(make_engine()) as engine:
        load_random_adapter(engine, "other", SPEC, 1)
        done: Callable[[EvalResult | LoquetierError], None] = pytest.fail  # type: ignore[assignment]
        with pytest.raises(error):
            engine.jobs.evaluate(model, examples, done)
        assert not engine.has_work
