"""Sampling: each option against an oracle, and every option against every mixed batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loquetier.config import SamplingParams
from loquetier.engine import columns, drawing, sampler
from loquetier.engine.drawing import draw, kept_mass
from loquetier.engine.logprobs import MIN_LOGPROB, prompt_logprobs
from loquetier.engine.sampler import SampledTokens, SamplerState, new_state, sample
from loquetier.engine.uniforms import stream_seed, uniforms
from loquetier.errors import ConfigError, EngineError
from loquetier.kernels.softmax import probabilities

V = 97
EOS = (2, 5)


def logits(rows: int, vocab: int = V, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def state(
    params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = (), vocab: int = V
) -> SamplerState:
    built = new_state(params, 0, prompt, EOS, vocab)
    for token in output:
        built.count(torch.tensor([token]))
    return built


def row_of(result: SampledTokens, i: int) -> tuple[Any, ...]:
    return result.token_ids[i], result.logprobs[i], result.top[i], result.failed[i]


# --- every option in every mixed batch ------------------------------------------------------------------------------

# The edges of what SamplingParams admits are in on purpose: they are what crashes batches.
PARAMS = st.builds(
    SamplingParams,
    min_tokens=st.sampled_from([0, 3, 1000]),
    temperature=st.sampled_from([0.0, 1e-300, 1e-5, 0.01, 0.7, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([-1, 0, 1, 2, 40, V, 10**30]),
    top_p=st.sampled_from([1e-300, 0.1, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-300, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5, 5e-324, 1e-30, 1e30, 1e308]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.7, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -2.0, 0.3, 2.0]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, -1.5, 2.0, 100]), max_size=4),
    stop_token_ids=st.lists(st.integers(0, V - 1), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    seed=st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]),
    logprobs=st.sampled_from([None, 0, 1, 5, 20]),
)
TOKENS = st.lists(st.integers(0, V - 1), max_size=30)
KINDS = ("plain", "ties", "bfloat16", "masked", "huge", "nan", "plus_inf", "all_masked")
BAD_KINDS = ("nan", "plus_inf", "all_masked")
ROW = st.tuples(PARAMS, TOKENS, TOKENS, st.sampled_from(KINDS), st.integers(0, 2**32))


def logits_of(kind: str, seed: int) -> Tensor:
    row = logits(1, seed=seed)[0]
    if kind == "ties":
        return row.round()
    if kind == "bfloat16":
        return row.bfloat16().float()
    if kind == "masked":
        return row.masked_fill(torch.arange(V) % 3 == seed % 3, -torch.inf)
    if kind == "huge":
        return (row * 1e38).clamp(-3e38, 3e38)
    if kind == "nan":
        return row.index_fill(0, torch.tensor([seed % V]), torch.nan)
    if kind == "plus_inf":
        return row.index_fill(0, torch.tensor([seed % V]), torch.inf)
    return torch.full_like(row, -torch.inf) if kind == "all_masked" else row


@settings(max_examples=150, deadline=None)  # no deadline: the machine's load is not what is tested
@given(st.lists(ROW, min_size=2, max_size=9), st.randoms(use_true_random=False))
def test_a_row_is_bit_for_bit_the_same_alone_and_in_any_batch(rows: list[Any], random: Any) -> None:
    x = torch.stack([logits_of(kind, seed) for *_, kind, seed in rows])
    states = [state(p, prompt, output) for p, prompt, output, *_ in rows]
    counts = [len(output) for _, _, output, *_ in rows]
    before = x.clone()
    together = sample(x, states, counts)
    assert torch.equal(x.nan_to_num(nan=7e7), before.nan_to_num(nan=7e7)), "the caller's logits were changed"
    order = random.sample(range(len(rows)), len(rows))
    shuffled = sample(x[order], [states[i] for i in order], [counts[i] for i in order])
    for i, (p, _, _, kind, _) in enumerate(rows):
        alone = sample(x[i : i + 1], [states[i]], [counts[i]])
        assert row_of(together, i) == row_of(alone, 0)
        assert row_of(together, i) == row_of(shuffled, order.index(i))
        assert together.failed[i] == (kind in BAD_KINDS)
        check_reported(together, i, p)


def check_reported(result: SampledTokens, i: int, params: SamplingParams) -> None:
    if result.failed[i]:
        assert (result.token_ids[i], result.logprobs[i], result.top[i]) == (-1, None, None)
        return
    assert 0 <= result.token_ids[i] < V
    logprob, top = result.logprobs[i], result.top[i]
    if params.logprobs is None:
        assert logprob is None and top is None
        return
    assert logprob is not None and top is not None and len(top) == params.logprobs
    assert all(MIN_LOGPROB <= value <= 0 for value in [logprob, *top.values()])
    assert list(top.values()) == sorted(top.values(), reverse=True)
    assert top.get(result.token_ids[i], logprob) == logprob


def test_large_vocabulary_and_many_rows_cross_the_chunk_border(monkeypatch: pytest.MonkeyPatch) -> None:
    x = logits(7, vocab=5000)  # wider than the first width that top_p sorts
    options = {"temperature": 1.5, "seed": 3, "logprobs": 2}
    several = [{}, {"top_p": 0.3}, {"top_p": 0.999}, {"top_k": 50, "top_p": 0.9}, {"top_k": 1500}, {"min_p": 0.1}, {}]
    states = [state(SamplingParams(**options, **more), vocab=5000) for more in several]
    whole = [sample(x, states, [step] * 7) for step in range(20)]
    monkeypatch.setattr(columns, "_CHUNK_ELEMENTS", 10_000)  # two rows a chunk
    assert [sample(x, states, [step] * 7) for step in range(20)] == whole
    monkeypatch.setattr(drawing, "_TOP_P_WIDTH", 5000)  # sort everything at once
    assert [sample(x, states, [step] * 7) for step in range(20)] == whole


def test_rows_alone_and_together_agree_where_torch_uses_threads() -> None:
    """Above 32,768 elements torch splits an operation over threads, and a single row is split differently."""
    x = logits(3, vocab=50_000, spread=1.0)
    several = [{}, {"top_p": 0.9}, {"min_p": 0.001, "repetition_penalty": 1.2, "temperature": 1.3}]
    states = [state(SamplingParams(seed=5, logprobs=3, **more), [1], [2, 2], vocab=50_000) for more in several]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = sample(x, states, [2, 3, 4])
        for i in range(3):
            assert row_of(sample(x[i : i + 1], states[i : i + 1], [2 + i]), 0) == row_of(together, i)
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    x = logits(3).bfloat16()
    states = [state(SamplingParams(temperature=t, seed=1, logprobs=3, top_p=0.9)) for t in (0.0, 0.8, 1.0)]
    assert sample(x, states, [0, 1, 2]) == sample(x.float(), states, [0, 1, 2])


def test_empty_batch() -> None:
    assert sample(logits(0), [], []) == SampledTokens([], [], [], [])


# --- distribution ---------------------------------------------------------------------------------------------------


def draws_of(params: SamplingParams, x_V: Tensor, count: int) -> np.ndarray:
    states = [state(replace(params, seed=1234), vocab=len(x_V))] * count
    return np.array(sample(x_V.expand(count, -1), states, range(count)).token_ids)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}],
    ids=str,
)
def test_tokens_follow_the_exact_probabilities(options: dict[str, Any]) -> None:
    """Pearson's statistic is close to chi-square with d = cells - 1 <= 7. Laurent and Massart (2000): it exceeds
    d + 2 sqrt(d t) + 2 t with odds below exp(-t), so d + 40 with odds below exp(-10), and the seed is fixed. A token of
    15,000 expected draws that is off by a relative e adds e**2 * 15,000: 6% is caught.
    """
    count = 40_000
    x_V = torch.tensor([2.0, 1.5, 1.5, 0.0, -0.5, -1.0, 1.0, -1.0])
    params = SamplingParams(**options)
    probs = oracle_probs(x_V, params)
    observed = np.bincount(draws_of(params, x_V, count), minlength=len(x_V))
    assert observed[probs == 0].sum() == 0
    expected = probs[probs > 0] * count
    assert expected.min() > 20  # the chi-square approximation needs more than a few per cell
    statistic = float((((observed[probs > 0] - expected) ** 2) / expected).sum())
    assert statistic < (len(expected) - 1) + 40


def oracle_probs(x_V: Tensor, params: SamplingParams) -> np.ndarray:
    """Plain loops in float64."""
    z = x_V.double().numpy() / params.temperature
    probs = np.exp(z - z.max())
    probs[probs < params.min_p * probs.max()] = 0
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    if 0 < params.top_k < len(probs):
        probs[order[params.top_k :]] = 0
    probs /= probs.sum()
    reached = 0.0
    for token in order:
        share = probs[token]
        if reached >= params.top_p:
            probs[token] = 0
        reached += share
    return probs / probs.sum()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniforms_are_in_range_and_depend_on_seed_and_counter(seed: int, counter: int) -> None:
    a, b, c = uniforms([seed, seed, seed ^ 1], [counter, counter + 1, counter])
    assert min(a, b, c) >= 0
    assert max(a, b, c) < 1
    assert len({a, b, c}) == 3


def test_uniforms_are_uniform_along_a_stream_and_across_streams() -> None:
    n = 100_000
    for u in (uniforms([42] * n, range(n)), uniforms([stream_seed(42, i) for i in range(2000)], [0] * 2000)):
        # Kolmogorov-Smirnov: sqrt(n) * D exceeds 2.2 with odds 2 exp(-2 * 2.2**2), about 1e-4; the seed is fixed.
        gap = np.abs(np.sort(u) - (np.arange(len(u)) + 0.5) / len(u)).max()
        assert gap * math.sqrt(len(u)) < 2.2
        # Neighbours are uncorrelated: the sample correlation has a standard deviation of 1 / sqrt(n); 4 of them.
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(len(u))


def test_stream_is_the_documented_hash() -> None:
    def mix(x: int) -> int:
        mask = 2**64 - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for seed, choice in [(0, 0), (-1, 3), (2**63 - 1, 127)]:
        expected = mix((mix(seed % 2**64) + (choice + 1) * 0x9E3779B97F4A7C15) % 2**64)
        assert stream_seed(seed, choice) == expected
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # splitmix64's published first output for seed 0


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53, 1.0])
def test_draw_never_leaves_the_kept_tokens(u: float) -> None:
    mass = torch.tensor([[0, 3, 0, 2, 0, 0], [0, 0, 0, 0, 0, 1], [1 << 60, 0, 0, 0, 0, 0], [0, 1, 1 << 60, 1, 0, 0]])
    for row, token in zip(mass, draw(mass, torch.full((4,), u, dtype=torch.float64)), strict=True):
        assert row[token] > 0
    first, last = draw(mass[:1].expand(2, -1), torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert (first, last) == (1, 3)


# --- seeds ----------------------------------------------------------------------------------------------------------


def text_of(seed: int | None, choice: int, steps: int = 30) -> list[int]:
    own = new_state(SamplingParams(seed=seed), choice, (), EOS, V)
    return [sample(logits(1, seed=step, spread=1.0), [own], [step]).token_ids[0] for step in range(steps)]


def test_same_seed_same_text_and_choices_differ() -> None:
    texts = [text_of(7, choice) for choice in range(8)]
    assert texts == [text_of(7, choice) for choice in range(8)]
    assert len({tuple(t) for t in texts}) == 8
    assert text_of(8, 0) != texts[0]


def test_no_seed_means_a_fresh_one() -> None:
    assert len({tuple(text_of(None, 0)) for _ in range(4)}) == 4


def test_a_sequence_restarted_after_preemption_draws_the_same_token() -> None:
    own = state(SamplingParams(seed=3))
    first = [sample(logits(1, seed=s), [own], [s]).token_ids for s in range(10)]
    assert [sample(logits(1, seed=s), [own], [s]).token_ids for s in reversed(range(10))] == first[::-1]


# --- bias, min_tokens, penalties --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1.0, 1.7, 0.4]),
    st.sampled_from([0.0, 1.1, -2.0]),
    st.sampled_from([0.0, 0.6, -1.3]),
    TOKENS,
    TOKENS,
    st.integers(0, 1000),
)
def test_penalties_match_a_plain_loop(
    repetition: float, presence: float, frequency: float, prompt: list[int], output: list[int], seed: int
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias={3: 4.0, 90: -2.0},
    )
    x = logits(1, seed=seed)
    expected = x[0].tolist()
    expected[3] += 4.0
    expected[90] -= 2.0
    for token in range(V):
        if token in prompt or token in output:
            expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        if token in output:
            expected[token] -= presence + frequency * output.count(token)
    actual = sampler._edit(x, [state(params, prompt, output)], [len(output)])
    # float32 rounding of at most five operations on numbers below about 100 (half an ulp there is 4e-6 each).
    torch.testing.assert_close(actual[0], torch.tensor(expected), rtol=1e-6, atol=4e-5)


def test_greedy_takes_the_first_of_equal_maxima_after_the_edits() -> None:
    x = torch.zeros(1, V)
    assert sample(x, [state(SamplingParams(temperature=0))], [0]).token_ids == [0]
    biased = SamplingParams(temperature=0, logit_bias={9: 1, 7: 1})
    assert sample(x, [state(biased)], [0]).token_ids == [7]


@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"stop_token_ids": (11,)}], ids=str)
def test_min_tokens_forbids_every_end_until_reached(options: dict[str, Any]) -> None:
    x = torch.zeros(1, V)
    x[0, [2, 5, 11]] = torch.tensor([30.0, 29.0, 28.0])
    own = state(SamplingParams(temperature=0, min_tokens=4, **options))
    expected = 0 if "stop_token_ids" in options else 11
    assert [sample(x, [own], [n]).token_ids[0] for n in range(6)] == [expected] * 4 + [2, 2]


def test_min_tokens_wins_over_bias_and_a_fully_masked_row_fails_alone() -> None:
    x = logits(2)
    everything = state(SamplingParams(min_tokens=1, stop_token_ids=tuple(range(V)), logit_bias={4: 100}))
    result = sample(x, [everything, state(SamplingParams(temperature=0))], [0, 0])
    assert result.failed == [True, False]
    assert result.token_ids == [-1, int(x[1].argmax())]


class Only:
    """A grammar that allows these ids, whatever came before."""

    def __init__(self, *ids: int) -> None:
        self.seen: list[int] = []
        self._allowed = np.isin(np.arange(V), ids)

    def allowed_V(self) -> np.ndarray:
        return self._allowed

    def observe(self, token_id: int) -> None:
        self.seen.append(token_id)


def test_a_constraint_wins_over_bias_and_touches_no_neighbour() -> None:
    x_NV = logits(4)
    params = [SamplingParams(temperature=0), SamplingParams(temperature=1, seed=1, logit_bias={9: 100.0})] * 2
    free = sample(x_NV, [state(p) for p in params], [0] * 4)
    states = [state(p) for p in params]
    states[1].constraint, states[2].constraint = Only(4, 7), Only()
    bound = sample(x_NV, states, [0] * 4)
    assert bound.token_ids[1] in (4, 7)
    assert bound.failed == [False, False, True, False], "where nothing is allowed, that row alone fails"
    assert (bound.token_ids[0], bound.token_ids[3]) == (free.token_ids[0], free.token_ids[3])


def test_a_constraint_is_told_what_came() -> None:
    built = state(SamplingParams())
    built.constraint = told = Only(4)
    for token in (4, 9):
        built.observe(token)
    assert told.seen == [4, 9]


def test_a_model_end_token_in_the_padded_vocabulary_is_no_error() -> None:
    own = new_state(SamplingParams(min_tokens=2, temperature=0), 0, (), (V + 3,), V)
    assert sample(logits(1), [own], [0]).failed == [False]


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({"logit_bias": {V: 1.0}}, []),
        ({"stop_token_ids": (V,)}, []),
        ({"presence_penalty": 1.0}, [V]),
        ({"repetition_penalty": 1.1}, [-1]),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(options: dict[str, Any], prompt: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary; use ids in \[0, 97\)"):
        new_state(SamplingParams(**options), 0, prompt, EOS, V)


# --- kept sets against transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 13},
        {"top_p": 0.05},
        {"top_p": 0.6},
        {"top_p": 0.97},
        {"min_p": 0.03},
        {"min_p": 0.4},
        {"top_k": 20, "top_p": 0.8},
        {"min_p": 0.02, "top_k": 30, "top_p": 0.9},
    ],
    ids=str,
)
def test_kept_tokens_are_those_of_transformers(temperature: float, options: dict[str, Any]) -> None:
    """Random logits have no ties and, with these seeds, no cumulative probability within float32 rounding of top_p."""
    params = SamplingParams(temperature=temperature, **options)
    x = logits(40, vocab=300)
    scores = TemperatureLogitsWarper(temperature)(None, x)
    for wanted, warper in (("min_p", MinPLogitsWarper), ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
        if wanted in options:
            scores = warper(options[wanted])(None, scores)
    mass = kept_mass(x / temperature, [params] * 40)
    # A kept token whose probability is below 2**-60 has no mass; transformers keeps it, nobody will ever draw it.
    drawable = torch.softmax(x / temperature, dim=-1) >= 2.0**-60
    assert torch.equal(mass > 0, (scores > -torch.inf) & drawable)
    probs = mass.double() / mass.sum(-1, keepdim=True)
    # Both are float32 softmaxes, normalised over different sets: a few roundings apart.
    torch.testing.assert_close(probs.float(), torch.softmax(scores, dim=-1), rtol=1e-5, atol=1e-7)


def test_top_k_keeps_exactly_k_of_equal_tokens_smallest_ids_first() -> None:
    z = torch.tensor([[0.0, 1.0, -0.0, 1.0, 0.0, -1.0]])
    for k, kept in [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4])]:
        mass = kept_mass(z, [SamplingParams(top_k=k)])
        assert mass[0].nonzero().flatten().tolist() == kept


def test_top_p_keeps_the_token_that_reaches_it_and_no_more() -> None:
    z = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, kept in [(1e-9, [0]), (0.49, [0]), (0.51, [0, 1]), (0.76, [0, 1, 2]), (0.9, [0, 1, 2, 3])]:
        mass = kept_mass(z, [SamplingParams(top_p=top_p)])
        assert mass[0].nonzero().flatten().tolist() == kept


# --- logprobs ---------------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits_whatever_the_options() -> None:
    x = logits(1)
    params = SamplingParams(
        temperature=0.3, top_k=2, logit_bias={8: 100}, presence_penalty=2, logprobs=4, seed=0, repetition_penalty=1.5
    )
    result = sample(x, [state(params, [1, 2], [8, 8])], [2])
    raw = torch.log_softmax(x[0].double(), dim=-1)
    assert result.token_ids == [8]
    # Float32 rounds at 6e-8 of values up to 16.
    assert result.logprobs[0] == pytest.approx(raw[8].item(), abs=2e-6)
    best = raw.topk(4)
    assert list(result.top[0] or {}) == best.indices.tolist()
    assert list((result.top[0] or {}).values()) == pytest.approx(best.values.tolist(), abs=2e-6)


def test_equal_alternatives_come_by_id_however_many_a_neighbour_wants() -> None:
    x = torch.zeros(2, V)
    for neighbour in (0, 3, 20):
        states = [state(SamplingParams(logprobs=k, temperature=0)) for k in (3, neighbour)]
        assert list(sample(x, states, [0, 0]).top[0] or {}) == [0, 1, 2]


def test_more_alternatives_than_tokens() -> None:
    result = sample(torch.zeros(1, 5), [state(SamplingParams(logprobs=20, temperature=0), vocab=5)], [0])
    assert list(result.top[0] or {}) == [0, 1, 2, 3, 4]


def test_masked_alternatives_are_reported_with_the_floor() -> None:
    x = torch.full((1, V), -torch.inf)
    x[0, 3] = 1.0
    result = sample(x, [state(SamplingParams(logprobs=2, seed=0))], [0])
    assert (result.token_ids, result.logprobs, result.top) == ([3], [0.0], [{3: 0.0, 0: MIN_LOGPROB}])


def test_prompt_logprobs_match_log_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    x = logits(9)
    tokens = [int(t) for t in x.argsort(dim=-1)[:, V // 2]]
    raw = probabilities(x, torch.arange(V).expand(len(x), V)).logprobs_NK
    torch.testing.assert_close(raw.double(), torch.log_softmax(x.double(), dim=-1), rtol=0.0, atol=2e-6)
    for chunk in (1 << 22, 2 * V):
        monkeypatch.setattr(columns, "_CHUNK_ELEMENTS", chunk)
        for i, entry in enumerate(prompt_logprobs(x, tokens, 3)):
            assert list(entry) == [tokens[i], *raw[i].topk(3).indices.tolist()]
            assert all(value == raw[i, token].item() for token, value in entry.items())
    assert prompt_logprobs(x, tokens, 0) == [{t: raw[i, t].item()} for i, t in enumerate(tokens)]
    assert prompt_logprobs(x[:0], [], 3) == []
    best = x.argmax(dim=-1).tolist()
    assert [len(entry) for entry in prompt_logprobs(x, best, 3)] == [3] * 9  # the token is one of the alternatives


def test_prompt_logprobs_of_broken_logits_are_an_error() -> None:
    x = logits(3)
    x[1, 4] = torch.nan
    with pytest.raises(EngineError, match="first 1"):
        prompt_logprobs(x, [0, 0, 0], 1)


def test_all_greedy_batch_makes_no_copy_of_the_logits() -> None:
    x = logits(64, vocab=4000)
    states = [state(SamplingParams(temperature=0), vocab=4000) for _ in range(64)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = sample(x, states, [0] * 64)
    assert result.token_ids == x.argmax(dim=-1).tolist()
    largest = max(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage)
    assert largest < x.numel() * 4 // 100
    assert statistics.fmean(result.failed) == 0
