"""How requests live in the engine: batching, preemption, aborts, options, failures. Oracle: the same request alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parity.helpers import (
    BASE_NAME,
    FP32_TOLERANCE,
    Answer,
    EngineFactory,
    LogitRecorder,
    ask,
    new_engine,
    prompt_of,
    reference_logits,
    run,
)
from tests.tiny import EOS, tiny_model, tiny_tokenizer

from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.config import MIB, SamplingParams
from loquetier.engine.engine import Engine
from loquetier.errors import (
    AdapterNotFoundError,
    ConfigError,
    ContextLengthError,
    EngineError,
    LoquetierError,
    OutOfKVMemoryError,
)

__all__ = ["new_engine"]

VOCAB = 260
"""Only tokens that the tokenizer knows: 4 special ones and the bytes."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab=VOCAB)


@pytest.fixture(scope="module")
def wide() -> Any:
    """64 KiB of K and V per page of 16 tokens, so that the least budget of 1 MiB is 16 pages."""
    return tiny_model("llama", layers=4, head_dim=64, vocab=VOCAB)


def prompt(length: int, seed: int) -> list[int]:
    return prompt_of(length, seed, VOCAB)


def load_random(engine: Engine, name: str, *, std: float = 0.1, seed: int = 1, **spec: Any) -> None:
    """Serve an adapter with normal random factors."""
    lora = LoraSpec(**({"r": 4} | spec))
    modules = resolve_modules(lora, engine.base.targets)
    g = torch.Generator().manual_seed(seed)
    factors = {
        m.target.path: (
            std * torch.randn(m.rank, m.target.in_features, generator=g),
            std * torch.randn(m.target.out_features, m.rank, generator=g),
        )
        for m in modules
    }
    engine.adapters.load(name, lora, modules, factors)


def pages_taken(engine: Engine) -> int:
    return engine.allocator.num_pages - engine.scheduler.pages.num_available


# --- batching ---


def test_greedy_tokens_are_hugging_faces(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model, max_prefill_rows=11, page_size=4)
    prompts = [prompt(n, n) for n in (1, 5, 30, 44)]
    answers = [ask(engine, p, max_tokens=20) for p in prompts]
    run(engine)
    for p, answer in zip(prompts, answers, strict=True):
        mask = torch.ones(1, len(p))
        out = model.generate(
            torch.tensor([p]), attention_mask=mask, do_sample=False, max_new_tokens=20, eos_token_id=None
        )
        assert answer.tokens() == out[0, len(p) :].tolist()
        assert answer.reason() == "length"


def test_a_newcomer_joins_a_running_batch(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model)
    early = ask(engine, prompt(10, 0), max_tokens=30)
    for _ in range(5):
        engine.step()
    late = ask(engine, prompt(10, 1), max_tokens=5)
    report = engine.step()
    assert (report.prefill_rows, report.decode_rows) == (10, 1)
    assert len(early.tokens()) == 6 and len(late.tokens()) == 1
    run(engine)
    assert len(early.tokens()) == 30 and len(late.tokens()) == 5
    assert engine.totals.decode_rows == 29 + 4


def test_lower_priority_numbers_are_admitted_first(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model, max_sequences=1)
    order: list[str] = []
    for name, priority in (("later", 1), ("sooner", 0)):
        params = SamplingParams(temperature=0.0, max_tokens=2)
        engine.add_request(prompt(4, 1), BASE_NAME, params, lambda event, name=name: order.append(name), priority)
    run(engine)
    assert order == ["sooner", "sooner", "later", "later"]


def test_preempted_requests_answer_as_if_alone(wide: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(wide, kv_memory=MIB, max_prefill_rows=40)
    assert engine.allocator.num_pages == 16
    alone = new_engine(wide, kv_memory=8 * MIB)
    for e in (engine, alone):
        load_random(e, "lora")
    recorder = LogitRecorder(engine)
    wanted = [(prompt(17 + 3 * i, i), BASE_NAME if i % 2 else "lora") for i in range(5)]
    expected = []
    for p, name in wanted:
        answer = ask(alone, p, name, max_tokens=45, logprobs=0)
        run(alone)
        expected.append(answer)
    answers = [ask(engine, p, name, max_tokens=45, logprobs=0) for p, name in wanted]
    run(engine)
    assert sum(len(plan.preempted) for plan in recorder.plans) > 0, "no preemption: the test is too small"
    for answer, other in zip(answers, expected, strict=True):
        assert answer.tokens() == other.tokens()
        ours, theirs = ([e.logprob for e in a.of()] for a in (answer, other))
        assert ours == pytest.approx(theirs, abs=FP32_TOLERANCE)


def test_a_preempted_request_with_every_option_is_as_alone(wide: Any, new_engine: EngineFactory) -> None:
    """Prompt logprobs come once, penalties count no token twice, the random stream goes on where it was."""
    options = {
        "max_tokens": 60, "temperature": 1.0, "seed": 5, "prompt_logprobs": 1, "repetition_penalty": 1.3,
        "frequency_penalty": 0.5, "top_p": 0.9,
    }  # fmt: skip
    small, alone = new_engine(wide, kv_memory=MIB), new_engine(wide, kv_memory=8 * MIB)
    expected = ask(alone, prompt(40, 0), **options)
    run(alone)
    recorder = LogitRecorder(small)
    for seed in range(1, 4):
        ask(small, prompt(40, seed), max_tokens=60)
    answer = ask(small, prompt(40, 0), **options)
    run(small)
    assert any(seq.prompt_len == 40 and seq.num_preemptions for seq, _ in recorder.results()[3:])
    assert answer.tokens() == expected.tokens()
    assert [e.prompt_logprobs is not None for e in answer.of()] == [True] + [False] * 59


# --- ends ---


def test_an_abort_frees_pages_at_once_and_leaves_others_alone(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model, page_size=4, max_prefill_rows=16)
    load_random(engine, "lora")
    alone = ask(engine, prompt(9, 1), max_tokens=12)
    run(engine)
    leaving = [ask(engine, prompt(40, 0), "lora", max_tokens=50), ask(engine, prompt(40, 2), n=2, max_tokens=50)]
    staying = ask(engine, prompt(9, 1), max_tokens=12)
    for steps in (4, 3):  # the first one is cut off in its prefill, the second one in its decode
        for _ in range(steps):
            engine.step()
        gone = leaving.pop()
        before = pages_taken(engine)
        engine.abort_request(gone.request_id)
        engine.check_integrity()
        assert gone.reason() == "abort" and gone.error() is None
        assert pages_taken(engine) < before
        events = len(gone.events)
        engine.abort_request(gone.request_id)  # a second time, as when a client and a timeout race
        assert len(gone.events) == events
    run(engine)
    assert staying.tokens() == alone.tokens()
    assert engine.registry.resolve("lora").users == 0


def test_an_abort_from_inside_a_sink_is_safe(model: Any, new_engine: EngineFactory) -> None:
    """As when a client's queue is found closed while its token is delivered."""
    engine = new_engine(model)
    other = Answer()
    params = SamplingParams(temperature=0.0, max_tokens=20)
    ids: list[int] = []
    first = ask(engine, prompt(5, 3), max_tokens=20)
    ids.append(engine.add_request(prompt(5, 1), BASE_NAME, params, lambda e: engine.abort_request(ids[1])).request_id)
    ids.append(engine.add_request(prompt(5, 2), BASE_NAME, params, other.events.append).request_id)
    run(engine)
    assert other.reason() == "abort" and len(other.events) == 1
    assert len(first.tokens()) == 20


def test_eos_and_stop_token_ids(model: Any, new_engine: EngineFactory) -> None:
    plain = new_engine(model)
    full = ask(plain, prompt(8, 0), max_tokens=30)
    run(plain)
    tokens = full.tokens()
    end = next(t for i, t in enumerate(tokens) if i >= 4 and t not in tokens[:i])
    cut = tokens.index(end) + 1
    engine = new_engine(model, eos_token_ids=frozenset({end}))
    by_eos = ask(engine, prompt(8, 0), max_tokens=30)
    ignored = ask(engine, prompt(8, 0), max_tokens=30, ignore_eos=True)
    later = ask(engine, prompt(8, 0), max_tokens=30, min_tokens=cut + 3)
    by_stop = ask(plain, prompt(8, 0), max_tokens=30, stop_token_ids=(end,))
    run(engine)
    run(plain)
    assert by_eos.tokens() == by_stop.tokens() == tokens[:cut]
    assert (by_eos.reason(), by_stop.reason(), by_stop.of()[-1].stop_reason) == ("stop", "stop", end)
    assert ignored.tokens() == tokens and ignored.reason() == "length"
    assert end not in later.tokens()[: cut + 3] and len(later.tokens()) >= cut + 3


def test_stop_strings_end_the_text_before_themselves(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model, tokenizer=tiny_tokenizer())
    letters = {4 + b: 50.0 for b in b"abcdefghij"}  # plain text, so that strings can be cut anywhere
    options = {"logit_bias": letters, "max_tokens": 40, "temperature": 1.0, "seed": 3}
    full = ask(engine, prompt(6, 0), **options)
    run(engine)
    text = full.text()
    assert len(text) == 40 and full.reason() == "length"
    stop = text[20:23]
    stopped = ask(engine, prompt(6, 0), stop=("zzz", stop), **options)
    never = ask(engine, prompt(6, 0), stop=(text[38:] + "z",), **options)
    run(engine)
    assert stopped.text() == text[: text.index(stop)]
    assert (stopped.reason(), stopped.of()[-1].stop_reason) == ("stop", stop)
    assert len(stopped.tokens()) == text.index(stop) + 3
    # The held-back beginning of a stop string that did not come is given at the end.
    assert never.text() == text and never.reason() == "length"


def test_text_is_the_tokenizers_decoding(model: Any, new_engine: EngineFactory) -> None:
    tokenizer = tiny_tokenizer()
    engine = new_engine(model, tokenizer=tokenizer)
    answer = ask(engine, prompt(6, 0), max_tokens=40, temperature=2.0, seed=1)
    run(engine)
    assert answer.text() == tokenizer.decode(answer.tokens(), skip_special_tokens=True)


def test_the_answer_ends_at_the_context(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model, max_context=32)
    answer = ask(engine, prompt(20, 0), max_tokens=None)
    exact = ask(engine, prompt(31, 0), max_tokens=1)
    run(engine)
    assert len(answer.tokens()) == 12 and answer.reason() == "length"
    assert len(exact.tokens()) == 1


# --- options ---


def test_n_choices_are_independent_and_greedy_ones_equal(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model)
    greedy = ask(engine, prompt(9, 0), n=3)
    drawn = ask(engine, prompt(9, 0), n=4, temperature=1.5, seed=7, max_tokens=12)
    fewer = ask(engine, prompt(9, 0), n=2, temperature=1.5, seed=7, max_tokens=12)
    run(engine)
    assert greedy.tokens(0) == greedy.tokens(1) == greedy.tokens(2)
    assert len({tuple(drawn.tokens(i)) for i in range(4)}) == 4
    assert [fewer.tokens(i) for i in range(2)] == [drawn.tokens(i) for i in range(2)]
    assert all(drawn.reason(i) == "length" for i in range(4))


def test_seeds_give_the_same_text_alone_and_in_a_crowd(model: Any, new_engine: EngineFactory) -> None:
    options = {"temperature": 1.2, "top_p": 0.95, "top_k": 50, "min_p": 0.001, "max_tokens": 24}
    texts = []
    for crowd in (0, 9):
        engine = new_engine(model, page_size=4, max_prefill_rows=16)
        load_random(engine, "lora")
        for seed in range(crowd):
            ask(engine, prompt(7 * seed + 1, seed), "lora" if seed % 2 else BASE_NAME, temperature=1.0, max_tokens=9)
        mine = [ask(engine, prompt(17, 50), name, seed=11, **options) for name in (BASE_NAME, "lora")]
        run(engine)
        texts.append([answer.tokens() for answer in mine])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_without_a_seed_two_answers_differ(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model)
    # Chance of equality: about (1/100) ** 30.
    one, other = (ask(engine, prompt(9, 0), temperature=2.0, max_tokens=30) for _ in range(2))
    run(engine)
    assert one.tokens() != other.tokens()


def test_logprobs_are_log_softmax_of_hugging_faces_logits(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model)
    asked = [
        (prompt(12, 0), ask(engine, prompt(12, 0), logprobs=5)),
        (prompt(7, 1), ask(engine, prompt(7, 1), logprobs=0, temperature=1.7, seed=2, top_p=0.9)),
    ]
    without = ask(engine, prompt(7, 2))
    run(engine)
    for p, answer in asked:
        tokens = answer.tokens()
        rows = torch.log_softmax(reference_logits(model, p + tokens[:-1])[len(p) - 1 :], dim=-1)
        for event, token, row in zip(answer.of(), tokens, rows, strict=True):
            assert event.logprob == pytest.approx(row[token].item(), abs=FP32_TOLERANCE)
            for other, value in (event.top_logprobs or {}).items():
                assert value == pytest.approx(row[other].item(), abs=FP32_TOLERANCE)
    assert all(len(e.top_logprobs or {}) == 5 for e in asked[0][1].of())
    best = torch.log_softmax(reference_logits(model, prompt(12, 0))[-1], dim=-1).topk(5).indices.tolist()
    assert list(asked[0][1].of()[0].top_logprobs or {}) == best
    assert all(e.logprob is None and e.top_logprobs is None for e in without.of())


@pytest.mark.parametrize("rows", [7, 16, 512], ids=["chunks of 7", "chunks of 16", "one chunk"])
def test_prompt_logprobs_over_chunk_borders(model: Any, rows: int, new_engine: EngineFactory) -> None:
    engine = new_engine(model, max_prefill_rows=rows, page_size=4)
    # 150 rows: more than the 128 whose logits are alive at a time; 8 = 7 + 1: the last row comes as a decode row.
    asked = {n: ask(engine, prompt(n, n), prompt_logprobs=3, max_tokens=3) for n in (150, 1, 8, 2)}
    run(engine)
    for n, answer in asked.items():
        first, *rest = answer.of()
        assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == n
        assert first.prompt_logprobs[0] is None and all(e.prompt_logprobs is None for e in rest)
        table = torch.log_softmax(reference_logits(model, prompt(n, n)), dim=-1)
        for i, found in enumerate(first.prompt_logprobs[1:], 1):
            assert found is not None
            token = prompt(n, n)[i]
            assert next(iter(found)) == token
            assert set(found) == {token, *table[i - 1].topk(3).indices.tolist()}
            for other, value in found.items():
                assert value == pytest.approx(table[i - 1, other].item(), abs=FP32_TOLERANCE)


def test_logit_bias_can_force_and_forbid(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model)
    free = ask(engine, prompt(9, 0))
    forced = ask(engine, prompt(9, 0), logit_bias={77: 100.0})
    run(engine)
    assert forced.tokens() == [77] * 8
    forbidden = ask(engine, prompt(9, 0), logit_bias={free.tokens()[0]: -100.0})
    run(engine)
    assert free.tokens()[0] not in forbidden.tokens()


# --- one bad request is one failed request ---


def broken(engine: Engine) -> None:
    """Finite weights whose product is not: inf and NaN in K, V and every logit."""
    load_random(engine, "broken", std=1e30)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": 2}, {"n": 2, "temperature": 1.0}], ids=str)
def test_logits_that_are_not_finite_fail_their_request_alone(
    family: str, options: dict[str, Any], new_engine: EngineFactory
) -> None:
    """Also where scores are capped (gemma2) and where rows are routed to experts by what they hold (qwen3_moe)."""
    engine = new_engine(tiny_model(family, vocab=VOCAB), page_size=4, max_prefill_rows=16)
    broken(engine)
    load_random(engine, "lora")
    wanted = [(prompt(30, 1), BASE_NAME), (prompt(6, 2), "lora"), (prompt(6, 5), BASE_NAME)]
    expected = [ask(engine, p, name, max_tokens=16, prompt_logprobs=1) for p, name in wanted]
    run(engine)
    crowd = [ask(engine, p, name, max_tokens=16, prompt_logprobs=1) for p, name in wanted[:2]]
    failing = ask(engine, prompt(21, 3), "broken", **options)
    crowd.append(ask(engine, *wanted[2], max_tokens=16, prompt_logprobs=1))
    run(engine)
    for index in range(options.get("n", 1)):
        assert failing.reason(index) == "error" and isinstance(failing.error(index), EngineError)
        assert not [e for e in failing.of(index) if e.token_id is not None]
    assert [a.tokens() for a in crowd] == [a.tokens() for a in expected]
    assert engine.registry.resolve("broken").users == 0


@pytest.mark.parametrize("abort_after", [None, 1], ids=["failed", "aborted while prefilling"])
def test_pages_of_a_broken_request_do_not_poison_the_next_owner(
    model: Any, abort_after: int | None, new_engine: EngineFactory
) -> None:
    """NaN in the unused rest of a page would reach the answer: a masked key's weight is 0, and 0 * NaN is NaN."""
    engine = new_engine(model, page_size=16, max_prefill_rows=40)
    broken(engine)
    expected = ask(engine, prompt(5, 1), max_tokens=30)
    run(engine)
    for seed in range(4):
        failing = ask(engine, prompt(60, seed), "broken")
        if abort_after is not None:
            engine.step()
            engine.abort_request(failing.request_id)
        run(engine)
        assert failing.reason() == ("error" if abort_after is None else "abort")
    answers = [ask(engine, prompt(5, 1), max_tokens=30) for _ in range(12)]
    run(engine)
    for answer in answers:
        assert answer.tokens() == expected.tokens()


BAD_REQUESTS: dict[str, tuple[list[int], str, dict[str, Any], type[LoquetierError]]] = {
    "empty prompt": ([], BASE_NAME, {}, ConfigError),
    "negative id": ([5, -1], BASE_NAME, {}, ConfigError),
    "id of vocabulary size": ([5, VOCAB], BASE_NAME, {}, ConfigError),
    "prompt of context length": ([5] * 256, BASE_NAME, {"max_tokens": None}, ContextLengthError),
    "max_tokens beyond context": ([5] * 200, BASE_NAME, {"max_tokens": 57}, ContextLengthError),
    "min_tokens beyond context": ([5] * 200, BASE_NAME, {"max_tokens": None, "min_tokens": 57}, ContextLengthError),
    "unknown model": ([5], "nobody", {}, AdapterNotFoundError),
    "unknown version": ([5], "lora@7", {}, AdapterNotFoundError),
    "bias on no token": ([5], "lora", {"logit_bias": {VOCAB: 1.0}, "n": 3}, ConfigError),
    "stop token of no vocabulary": ([5], "lora", {"stop_token_ids": (VOCAB,)}, ConfigError),
    "stop string without tokenizer": ([5], "lora", {"stop": ("x",), "n": 2}, ConfigError),
}


@pytest.fixture(scope="module")
def busy(model: Any) -> Engine:
    """An engine in the middle of an answer; refused requests must not be seen by it."""
    from tests.parity.helpers import make_engine

    engine = make_engine(model)
    load_random(engine, "lora")
    ask(engine, prompt(20, 0), "lora", max_tokens=20)
    for _ in range(5):
        engine.step()
    return engine


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_refused_request_changes_nothing(case: str, busy: Engine) -> None:
    tokens, name, options, error = BAD_REQUESTS[case]

    def state() -> tuple[Any, ...]:
        users = [v.users for v in busy.registry.versions]
        return busy.scheduler.pages.num_available, users, list(busy.serving.requests), list(busy.serving.choices)

    before = state()
    with pytest.raises(error) as caught:
        ask(busy, tokens, name, **options)
    assert str(caught.value)
    assert state() == before
    busy.check_integrity()
    assert busy.step().decode_rows == 1


def test_a_request_that_can_never_fit_the_cache_is_refused(wide: Any, new_engine: EngineFactory) -> None:
    model = tiny_model("llama", layers=4, head_dim=64, vocab=VOCAB, context=1024)
    engine = new_engine(model, kv_memory=MIB)
    load_random(engine, "lora")
    with pytest.raises(OutOfKVMemoryError, match="kv_memory"):
        ask(engine, prompt(200, 0), "lora", max_tokens=200, n=2)
    assert engine.registry.resolve("lora").users == 0
    engine.check_integrity()
    ask(engine, prompt(200, 0), "lora", max_tokens=20, n=2)
    run(engine)


# --- versions ---


def test_a_request_finishes_on_the_version_it_began_with(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model)
    load_random(engine, "lora")
    alone = ask(engine, prompt(9, 0), "lora", max_tokens=20)
    run(engine)
    running = ask(engine, prompt(9, 0), "lora", max_tokens=20)
    for _ in range(5):
        engine.step()
    slots = engine.arena.slots
    engine.adapters.unload("lora")
    assert engine.arena.slots == slots, "its weights stay while it runs"
    with pytest.raises(AdapterNotFoundError):
        ask(engine, prompt(9, 0), "lora")
    load_random(engine, "lora", seed=2)
    other = ask(engine, prompt(9, 0), "lora", max_tokens=20)
    run(engine)
    assert running.tokens() == alone.tokens()
    assert other.tokens() != alone.tokens()
    assert len(engine.arena.slots) == 1


def test_end_tokens_of_the_model_are_not_in_the_text(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model, tokenizer=tiny_tokenizer(), eos_token_ids=frozenset({EOS}))
    answer = ask(engine, prompt(9, 0), logit_bias={EOS: 100.0}, skip_special_tokens=False)
    run(engine)
    assert (answer.tokens(), answer.text(), answer.reason()) == ([EOS], "", "stop")
