"""Planning a step before the last one's tokens are known changes nothing that anybody can see but when they see it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.test_generation import VOCAB, load_random, pages_taken, prompt
from tests.parity.helpers import FP32_TOLERANCE, Answer, EngineFactory, ask, new_engine, run
from tests.parity.training_helpers import random_examples
from tests.tiny import tiny_model, tiny_tokenizer

from loquetier.adapters.spec import LoraSpec
from loquetier.config import MIB, EngineConfig, Hardware, SamplingParams, TrainingConfig, resolve
from loquetier.engine import engine as engine_module
from loquetier.engine.engine import Engine
from loquetier.engine.rows import StepPlan
from loquetier.errors import ConfigError, EngineError

__all__ = ["new_engine"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab=VOCAB)


def both(new_engine: EngineFactory, model: Any, **settings: Any) -> tuple[Engine, Engine]:
    """The same engine without and with async scheduling."""
    engines = []
    for is_async in (False, True):
        engine = new_engine(model, async_scheduling=is_async, **settings)
        load_random(engine, "a", seed=1)
        load_random(engine, "b", seed=2, r=8)
        engines.append(engine)
    return engines[0], engines[1]


def same(one: Answer, other: Answer, index: int = 0) -> None:
    assert other.tokens(index) == one.tokens(index)
    assert (other.text(index), other.reason(index)) == (one.text(index), one.reason(index))
    pairs = [(e.logprob, f.logprob) for e, f in zip(one.of(index), other.of(index), strict=True)]
    for e, f in pairs:
        assert (e is None) == (f is None)
        # Other rows share a step than without: the same sums in other orders.
        assert e is None or f == pytest.approx(e, abs=FP32_TOLERANCE)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 3, "top_p": 0.8, "logprobs": 2},
    {"temperature": 0.7, "seed": 4, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    {"min_tokens": 5, "stop_token_ids": tuple(range(4, 60))},
    {"temperature": 1.5, "seed": 5, "n": 3},
    {"max_tokens": 1},
    {"prompt_logprobs": 1, "logit_bias": {17: 3.0}},
)


def test_tokens_texts_and_logprobs_are_the_same(model: Any, new_engine: EngineFactory) -> None:
    engines = both(new_engine, model, tokenizer=tiny_tokenizer(), page_size=4, max_prefill_rows=9)
    answers = []
    for engine in engines:
        names = (engine.base.name, "a", "b")
        answers.append(
            [ask(engine, prompt(3 + 5 * i, i), names[i % 3], max_tokens=o.pop("max_tokens", 12), **o)
             for i, o in enumerate(dict(o) for o in OPTIONS)]
        )  # fmt: skip
        run(engine)
    for one, other in zip(*answers, strict=True):
        for index in range(1 + max(e.index for e in one.events)):
            same(one, other, index)


def test_a_step_is_planned_before_the_last_ones_tokens_are_told(model: Any, new_engine: EngineFactory) -> None:
    """The test of the tests: without this the option would do nothing and everything here would pass."""
    _, engine = both(new_engine, model)
    answer = ask(engine, prompt(5, 0), max_tokens=3)
    engine.step()
    assert not answer.events and engine.has_work
    engine.step()
    assert len(answer.events) == 1
    engine.step()
    assert len(answer.events) == 2
    engine.step()  # nothing to plan: the third row was the last that may run
    assert answer.reason() == "length" and not engine.has_work


def test_a_step_costs_what_the_device_took_for_it_alone(
    model: Any, new_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is queued while the one before is computed: from its beginning that one's time would count twice."""
    _, engine = both(new_engine, model)
    told: list[tuple[float, float]] = []
    clock = iter(range(10**6))
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(
        engine.scheduler.cost, "observe", lambda features, seconds: told.append((seconds, engine._completed_at))
    )
    ask(engine, prompt(5, 0), max_tokens=6)
    run(engine)
    ends = [end for _, end in told[1:]] + [engine._completed_at]
    taken = [seconds for seconds, _ in told]
    assert len(told) >= 6 and taken[1:] == [b - a for a, b in pairwise(ends)]


def stop_text(engine: Engine) -> str:
    answer = ask(engine, prompt(9, 1), max_tokens=10)
    run(engine)
    return answer.text()[3:5]


def test_the_row_behind_a_stop_is_dropped_and_its_pages_are_free(model: Any, new_engine: EngineFactory) -> None:
    one, other = both(new_engine, model, tokenizer=tiny_tokenizer(), page_size=2)
    stop = stop_text(one)
    plans: list[StepPlan] = []
    schedule = other.scheduler.schedule

    def watched(*args: Any, **kwargs: Any) -> StepPlan:
        plans.append(schedule(*args, **kwargs))
        return plans[-1]

    other.scheduler.schedule = watched  # type: ignore[method-assign]
    answers = []
    for engine in (one, other):
        answers.append(ask(engine, prompt(9, 1), max_tokens=40, stop=(stop,)))
        run(engine)
        assert pages_taken(engine) == 0
    same(*answers)
    assert answers[1].reason() == "stop" and answers[1].of()[-1].stop_reason == stop
    told = len(answers[1].tokens())
    assert sum(len(p.decode) for p in plans) == told, "one row more than the tokens after the first"


def test_aborted_while_a_token_is_on_its_way(model: Any, new_engine: EngineFactory) -> None:
    _, engine = both(new_engine, model, page_size=2)
    kept, left = ask(engine, prompt(7, 1), "a", max_tokens=9), ask(engine, prompt(8, 2), "b", max_tokens=9)
    for _ in range(3):
        engine.step()
    told = len(left.events)
    engine.abort_request(left.request_id)
    engine.check_integrity()
    engine.adapters.unload("b")
    run(engine)
    assert [e.finish_reason for e in left.events[told:]] == ["abort"], "nothing comes after it"
    alone = new_engine(model)
    load_random(alone, "a", seed=1)
    expected = ask(alone, prompt(7, 1), "a", max_tokens=9)
    run(alone)
    assert kept.tokens() == expected.tokens()


def test_preempted_while_a_token_is_on_its_way(new_engine: EngineFactory) -> None:
    wide = tiny_model("llama", layers=4, head_dim=64, vocab=VOCAB)  # 16 pages in the least budget
    engines = both(new_engine, wide, kv_memory=MIB, page_size=16)
    answers = []
    for engine in engines:
        answers.append([ask(engine, prompt(40 + i, i), "ab"[i % 2], max_tokens=60) for i in range(4)])
        preempted = 0
        schedule = engine.scheduler.schedule

        def watched(*args: Any, _schedule: Any = schedule, **kwargs: Any) -> StepPlan:
            nonlocal preempted
            plan: StepPlan = _schedule(*args, **kwargs)
            preempted += sum(seq.num_pending for seq in plan.preempted)
            return plan

        engine.scheduler.schedule = watched  # type: ignore[method-assign]
        run(engine)
    assert preempted, "the last engine preempted sequences with a token on its way"
    for one, other in zip(*answers, strict=True):
        same(one, other)


class Every:
    """A grammar: token ids go up by one, cyclically. What may come depends on what came last."""

    def __init__(self) -> None:
        self.last = 50

    def allowed_V(self) -> np.ndarray:
        allowed = np.zeros(VOCAB, dtype=bool)
        allowed[50 + (self.last - 49) % 100] = True
        return allowed

    def observe(self, token_id: int) -> None:
        self.last = token_id


def test_a_grammar_waits_for_its_token_and_its_neighbours_do_not(model: Any, new_engine: EngineFactory) -> None:
    _, engine = both(new_engine, model)
    free = ask(engine, prompt(5, 2), max_tokens=12)
    bound = Answer()
    engine.add_request(
        prompt(6, 1), "a", SamplingParams(temperature=0, max_tokens=6), bound.events.append, constrain=Every
    )
    steps = run(engine)
    assert bound.tokens() == [51, 52, 53, 54, 55, 56]
    assert len(free.tokens()) == 12 and steps == 13, "the grammar's rows run every other step beside it"


def curve(engine: Engine, traffic: bool) -> tuple[list[float], list[Answer]]:
    records: list[float] = []
    config = TrainingConfig(batch_size=2, gradient_accumulation_steps=2, max_steps=4, learning_rate=1e-2, eval_every=2)
    rows = random_examples(8, 9, 17, seed=3)
    engine.jobs.start(
        "job", LoraSpec(r=4), config, rows, rows[:2],
        lambda job, record: records.append(record.loss) if record is not None else None,
    )  # fmt: skip
    answers = [ask(engine, prompt(6 + i, i), "ab"[i % 2], max_tokens=20) for i in range(3)] if traffic else []
    run(engine)
    return records, answers


@pytest.mark.parametrize("tape", ["graph", "replay"])
def test_training_curves_are_the_same(new_engine: EngineFactory, tape: str) -> None:
    engines = both(new_engine, tiny_model("llama"), tape=tape, train_window=8, backward_units_while_serving=1)
    (one, served), (other, served_async) = (curve(engine, traffic=True) for engine in engines)
    # An optimizer step's rows meet other neighbours than without; each is the same sum in another order.
    assert other == pytest.approx(one, abs=FP32_TOLERANCE) and len(other) >= 4
    for a, b in zip(served, served_async, strict=True):
        same(a, b)
    for engine in engines:
        assert "job" in engine.registry.names


def test_a_broken_step_ends_its_rows_after_their_tokens_of_the_step_before(
    model: Any, new_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = both(new_engine, model)
    answer = ask(engine, prompt(5, 0), max_tokens=9)
    for _ in range(3):
        engine.step()
    told = len(answer.events)
    hidden = engine.base.hidden

    def broken(*args: Any) -> torch.Tensor:
        monkeypatch.setattr(engine.base, "hidden", hidden)
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.base, "hidden", broken)
    engine.step()
    assert [e.finish_reason for e in answer.events[told:]] == [None, "error"]
    assert isinstance(answer.error(), EngineError) and not engine.has_work
    later = ask(engine, prompt(5, 0), max_tokens=4)
    run(engine)
    assert len(later.tokens()) == 4


@pytest.mark.parametrize("is_lost", [True, False])
def test_nobody_finds_the_pages_of_a_step_that_failed_after_its_client_had_left(
    model: Any, new_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    _, engine = both(new_engine, model, page_size=4)
    expected = ask(engine, prompt(21, 0), max_tokens=3)
    run(engine)
    if not is_lost:
        engine.cache.keys[0].fill_(float("nan"))  # it is read: the second prompt's beginning is found
    left = ask(engine, prompt(21, 0), max_tokens=3)
    engine.step()
    engine.abort_request(left.request_id)
    assert engine.scheduler.pages.num_kept >= 5, "found until the host knows that the step failed"

    def lost(*args: Any) -> None:
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        if is_lost:
            patch.setattr(type(engine.serving), "deliver", lost)
        engine.step()
    assert engine.scheduler.pages.num_kept == 0
    engine.check_integrity()
    later = ask(engine, prompt(21, 0), max_tokens=3)
    run(engine)
    assert later.tokens() == expected.tokens()


def test_on_for_a_gpu_and_off_for_a_cpu() -> None:
    gpu = Hardware(has_cuda=True, cpu_bf16_fast=False, free_memory=64 * MIB)
    cpu = Hardware(has_cuda=False, cpu_bf16_fast=False, free_memory=64 * MIB)
    assert resolve(EngineConfig(), gpu).async_scheduling is True
    assert resolve(EngineConfig(), cpu).async_scheduling is False
    assert resolve(EngineConfig(async_scheduling=False), gpu).async_scheduling is False
    assert resolve(EngineConfig(async_scheduling=True), cpu).async_scheduling is True
    with pytest.raises(ConfigError, match="async_scheduling='yes'"):
        EngineConfig(async_scheduling="yes")  # type: ignore[arg-type]
