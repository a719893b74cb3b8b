"""The prefix cache in the engine: the same answers with and without it, and never another version's K and V."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parity.helpers import (
    BASE_NAME,
    FP32_TOLERANCE,
    EngineFactory,
    LogitRecorder,
    ask,
    new_engine,
    prompt_of,
    reference_logits,
    run,
)
from tests.tiny import tiny_model

from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.config import MIB, SamplingParams
from loquetier.engine.engine import Engine
from loquetier.engine.prefix import CacheSpace
from loquetier.engine.request import TokenEvent

__all__ = ["new_engine"]

LENGTH = 50
"""Tokens of the prompts: three full pages of 16 and two more tokens."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def load(engine: Engine, name: str, seed: int, *, replace: bool = False) -> None:
    """Serve an adapter with random factors, as a new version where it is there."""
    lora = LoraSpec(r=4)
    modules = resolve_modules(lora, engine.base.targets)
    g = torch.Generator().manual_seed(seed)
    factors = {
        m.target.path: (
            0.3 * torch.randn(m.rank, m.target.in_features, generator=g),
            0.3 * torch.randn(m.target.out_features, m.rank, generator=g),
        )
        for m in modules
    }
    engine.adapters.load(name, lora, modules, factors, replace=replace)


def answer(engine: Engine, prompt: list[int], name: str = BASE_NAME, **params: Any) -> tuple[list[int], list[float]]:
    """Tokens and logprobs of a request alone in the engine."""
    got = ask(engine, prompt, name, **({"logprobs": 0} | params))
    run(engine)
    return got.tokens(), [e.logprob for e in got.events if e.logprob is not None]


def hits(engine: Engine) -> int:
    return engine.scheduler.pages.num_hit


@pytest.mark.parametrize("name", [BASE_NAME, "lora"])
def test_answers_are_those_without_a_cache(name: str, model: Any, new_engine: EngineFactory) -> None:
    """Prompts that begin alike, turns of a conversation, samples of one prompt: K and V computed in another step."""
    cached, plain = new_engine(model), new_engine(model, prefix_cache=False)
    common = prompt_of(LENGTH, 1)
    for engine in (cached, plain):
        load(engine, "lora", 1)
    prompts = [[*common, *prompt_of(7, i)] for i in range(3)]
    prompts.append(prompts[0] + answer(plain, prompts[0], name, max_tokens=20)[0] + prompt_of(3, 9))
    for p in prompts:
        tokens, logprobs = answer(cached, p, name, max_tokens=20)
        expected, wanted = answer(plain, p, name, max_tokens=20)
        assert tokens == expected
        # The K and V that are found were rounded in a step with other rows: see FP32_TOLERANCE.
        assert max(abs(a - b) for a, b in zip(logprobs, wanted, strict=True)) < FP32_TOLERANCE
    # Of the last prompt all but one full page is found: its 57 tokens before the answer, and 20 of the answer.
    assert hits(cached) == 2 * 48 + 64 and hits(plain) == 0
    samples = ask(cached, prompts[0], name, n=4, seed=3, temperature=1.0, max_tokens=9)
    alone = ask(plain, prompts[0], name, n=4, seed=3, temperature=1.0, max_tokens=9)
    run(cached), run(plain)
    assert [samples.tokens(i) for i in range(4)] == [alone.tokens(i) for i in range(4)]


def test_samples_prefill_once(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model)
    got = ask(engine, prompt_of(LENGTH, 1), n=4, temperature=1.0, max_tokens=5)
    run(engine)
    assert engine.totals.prefill_rows == LENGTH + 3 * (LENGTH - 48)
    assert all(len(got.tokens(i)) == 5 for i in range(4))
    assert [e.cached_tokens for e in got.of(0)] == [0] * 5
    assert [e.cached_tokens for e in got.of(3)] == [48, 0, 0, 0, 0]


def test_hits_run_in_the_same_step_as_everything_else(model: Any, new_engine: EngineFactory) -> None:
    """Every row that is computed behind found pages, beside rows of other adapters, is Hugging Face's."""
    engine = new_engine(model, page_size=4)
    common = prompt_of(21, 2)
    ask(engine, common)
    run(engine)
    load(engine, "lora", 4)
    recorder = LogitRecorder(engine)
    ask(engine, prompt_of(30, 3), "lora", max_tokens=12)
    engine.step()
    got = [ask(engine, [*common, *prompt_of(5, i)], max_tokens=6) for i in range(3)]
    run(engine)
    assert hits(engine) == 3 * 20
    rows, sequences = recorder._rows, recorder._sequences
    for seq_id in sorted(rows)[1:]:
        expected = reference_logits(model, sequences[seq_id].tokens[:-1])
        assert min(rows[seq_id]) == 20, "the first row behind the found pages"
        for position, logits in rows[seq_id].items():
            assert (logits - expected[position]).abs().max() < FP32_TOLERANCE
    assert all(len(g.tokens()) == 6 for g in got)


def test_a_new_version_under_the_same_name_finds_nothing(model: Any, new_engine: EngineFactory) -> None:
    """Publish, replace in place, roll back, unload and load again: the answer is that of a cold engine."""
    prompt = prompt_of(LENGTH, 5)
    engine = new_engine(model, keep_versions=2)
    load(engine, "fox", 1)
    first = answer(engine, prompt, "fox")
    cold = {}
    for seed in (1, 2, 3):
        other = new_engine(model, prefix_cache=False)
        load(other, "fox", seed)
        cold[seed] = answer(other, prompt, "fox")
    assert cold[1][0] == first[0] and len({tuple(tokens) for tokens, _ in cold.values()}) == 3
    load(engine, "fox", 2, replace=True)
    assert answer(engine, prompt, "fox") == cold[2] and hits(engine) == 0
    engine.registry.rollback("fox", 1)
    tokens, _ = answer(engine, prompt, "fox")
    assert tokens == cold[1][0] and hits(engine) == 48, "the same weights again: what they computed is right again"
    engine.adapters.unload("fox")
    load(engine, "fox", 3)
    assert answer(engine, prompt, "fox") == cold[3] and hits(engine) == 48
    assert answer(engine, prompt)[0] != first[0] and hits(engine) == 48


def test_owners_and_salts_are_apart(model: Any, new_engine: EngineFactory) -> None:
    engine, prompt = new_engine(model), prompt_of(LENGTH, 6)
    computed: list[int] = []
    for space in (CacheSpace("a"), CacheSpace("b"), CacheSpace("a", "s"), None, CacheSpace("a")):
        before, events = engine.totals.prefill_rows, list[TokenEvent]()
        params = SamplingParams(temperature=0, max_tokens=2)
        engine.add_request(prompt, BASE_NAME, params, events.append, space=space)
        run(engine)
        computed.append(engine.totals.prefill_rows - before)
        assert [e.cached_tokens for e in events] == [LENGTH - computed[-1], 0]
    assert computed == [50, 50, 50, 50, 2], "rows, and with them the time to the first token, tell nothing of others"


def test_prompt_logprobs_are_computed_for_every_row(model: Any, new_engine: EngineFactory) -> None:
    engine, prompt = new_engine(model), prompt_of(LENGTH, 7)
    wanted = ask(engine, prompt, prompt_logprobs=2)
    run(engine)
    again = ask(engine, prompt, prompt_logprobs=2)
    run(engine)
    assert engine.totals.prefill_rows == 2 * LENGTH
    assert again.events[0].prompt_logprobs == wanted.events[0].prompt_logprobs
    assert len(again.events[0].prompt_logprobs or ()) == LENGTH
    answer(engine, prompt)
    assert hits(engine) == 48


def test_a_sliding_window_shares_nothing(new_engine: EngineFactory) -> None:
    engine = new_engine(tiny_model("mistral"))
    assert engine.base.sliding_window == 8
    for _ in range(2):
        answer(engine, prompt_of(LENGTH, 8))
    assert engine.totals.prefill_rows == 2 * LENGTH and engine.scheduler.pages.num_kept == 0
    wide = new_engine(tiny_model("mistral", sliding_window=256))  # the whole context: nothing is ever hidden
    for _ in range(2):
        answer(wide, prompt_of(LENGTH, 8))
    assert hits(wide) == 48


def test_pages_of_an_answer_that_was_not_finite_are_dropped(model: Any, new_engine: EngineFactory) -> None:
    engine, prompt = new_engine(model), prompt_of(LENGTH, 9)
    expected = answer(engine, prompt)
    engine.cache.keys[0].fill_(float("nan"))
    broken = ask(engine, prompt)
    run(engine)
    assert broken.error() is not None and engine.scheduler.pages.num_kept == 0
    assert answer(engine, prompt) == expected


def test_preemption_and_aborts_in_a_small_cache(new_engine: EngineFactory) -> None:
    """`run` checks the books after every step."""
    wide = tiny_model("llama", layers=4, head_dim=64)
    engine = new_engine(wide, kv_memory=MIB, max_prefill_rows=40)
    plain = new_engine(wide, kv_memory=8 * MIB, prefix_cache=False)
    assert engine.allocator.num_pages == 16
    common = prompt_of(34, 1)
    prompts = [[*common, *prompt_of(6, i)] for i in range(5)]
    expected = [answer(plain, p, max_tokens=60)[0] for p in prompts]
    answers = [ask(engine, p, max_tokens=60) for p in prompts]
    dropped = ask(engine, prompts[0], n=3, max_tokens=60)
    for _ in range(4):
        engine.step()
        engine.check_integrity()
    engine.abort_request(dropped.request_id)
    preempted = [c.seq for c in engine.serving.choices.values()]
    run(engine)
    assert sum(seq.num_preemptions for seq in preempted) > 0, "pages were meant to be short"
    assert [a.tokens() for a in answers] == expected
