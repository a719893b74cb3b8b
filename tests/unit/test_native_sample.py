"""Sampling in C, every ISA variant, against float64 with a sort; and through `sample` against the torch code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.native import native_library
from torch import Tensor

from loquetier.config import SamplingParams
from loquetier.engine import sampler
from loquetier.kernels.native import ISA_NAMES
from loquetier.kernels.native_sample import DrawArguments, NativeSample
from loquetier.kernels.selfcheck import drawn

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module", params=ISA_NAMES)
def sample(request: pytest.FixtureRequest) -> Iterator[NativeSample]:
    with native_library(request.param) as library:
        yield NativeSample(library)


def logits_of(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0, spread: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rounded to bfloat16 first: some hundred distinct values, so that there are ties.
    return (spread * torch.randn(rows, vocab, generator=generator)).to(BF16).to(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("vocab", [1, 3, 16, 17, 1000, 49152])
def test_the_first_of_the_largest(sample: NativeSample, vocab: int, dtype: torch.dtype) -> None:
    logits_NV = logits_of(5, vocab, dtype)
    logits_NV[1, vocab // 2 :] = logits_NV[1].max() + 1  # a tie of half the row
    logits_NV[2] = -torch.inf
    best_N, ids_N = sample.argmax(logits_NV)
    assert torch.equal(best_N, logits_NV.float().amax(-1)) and ids_N[1] == vocab // 2 and ids_N[2] == 0
    first_N = (logits_NV == logits_NV.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(ids_N, first_N)


@pytest.mark.parametrize("at", [0, 15, 16, 20])
def test_a_nan_anywhere_is_told(sample: NativeSample, at: int) -> None:
    logits_NV = logits_of(3, 21, F32)
    logits_NV[1, at] = torch.nan
    best_N, _ = sample.argmax(logits_NV)
    assert best_N.isnan().tolist() == [False, True, False]


@given(
    vocab=st.integers(1, 700), temperature=st.floats(0.1, 5), top_k=st.integers(-1, 800), top_p=st.floats(0.01, 1),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]), uniform=st.floats(0, 1, exclude_max=True), spread=st.floats(0, 30),
    dtype=st.sampled_from([F32, BF16]), seed=st.integers(0, 1000),
)  # fmt: skip
@example(
    vocab=4, temperature=1.0, top_k=0, top_p=1.0, min_p=1.0, uniform=0.0, spread=1.192092896e-07, dtype=F32, seed=0
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_draw_is_the_inverse_of_the_distribution(
    sample: NativeSample, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float,
    spread: float, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    """Within rounding: where the uniform number falls within 1e-6 of a border, the tokens on either side will do."""
    logits_NV = logits_of(2, vocab, dtype, seed, spread)
    best_N, _ = sample.argmax(logits_NV)
    options = (temperature, min_p, top_p)
    near = [DrawArguments(1, top_k, *options, min(max(uniform + d, 0.0), 1.0)) for d in (-1e-6, 0.0, 1e-6)]
    (token,) = sample.draw(logits_NV, best_N, [near[1]]).tolist()
    tokens = {drawn(logits_NV[1], d) for d in near}
    # The cuts themselves are borders too: a share of the mass, and a floor under it. In float32 a token whose
    # probability lies at the floor may fall on either side of it, so every floor between such tokens will do.
    share_V = torch.softmax(logits_NV[1].double() / temperature, dim=-1)
    share_V /= share_V.max()
    at_floor = share_V[(share_V - min_p).abs() < 1e-5 * min_p].unique().tolist() if min_p else []
    cuts = [(top_p - 1e-6, min_p), (top_p + 1e-6, min_p)]
    cuts += [(top_p, floor * (1 - 1e-12)) for floor in [*at_floor, min_p * (1 + 1e-5)]]
    for p, m in cuts:
        tokens |= {drawn(logits_NV[1], DrawArguments(1, top_k, temperature, m, p, d.uniform)) for d in near}
    assert token in tokens


def test_a_row_draws_the_same_in_any_company(sample: NativeSample) -> None:
    logits_NV = logits_of(9, 5003, F32)
    best_N, _ = sample.argmax(logits_NV)
    draws = [DrawArguments(i, 40 * (i % 2), 0.9, 0.0, 0.9, i / 9) for i in range(9)]
    together = sample.draw(logits_NV, best_N, draws).tolist()
    for i in range(9):
        alone = DrawArguments(0, draws[i].top_k, 0.9, 0.0, 0.9, i / 9)
        assert sample.draw(logits_NV[i : i + 1], best_N[i : i + 1], [alone]).tolist() == [together[i]]


def test_the_engines_sampler_gives_the_same_tokens_with_and_without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NV = logits_of(24, 2003, F32)
    options: tuple[dict[str, Any], ...] = (
        {},
        {"top_k": 9},
        {"top_p": 0.7},
        {"min_p": 0.05, "top_p": 0.9},
        {"temperature": 0.0},
        {"top_k": 50, "top_p": 0.5},
    )
    states = [sampler.new_state(SamplingParams(seed=i, **options[i % 6]), 0, [1], (), 2003) for i in range(24)]
    in_c = sampler.sample(logits_NV, states, list(range(24)))
    monkeypatch.setattr(sampler, "_native", lambda: None)
    assert sampler.sample(logits_NV, states, list(range(24))) == in_c


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_logits_that_c_cannot_read_are_sampled_though_their_edited_copy_could_be(dtype: torch.dtype) -> None:
    """The edited copy is float32; whether a row is broken is read from the raw logits."""
    logits_NV = logits_of(2, 40, F32).to(dtype)
    logits_NV[1, 7] = torch.nan
    states = [sampler.new_state(SamplingParams(temperature=0.0, logit_bias={3: 100.0}), 0, [1], (), 40)] * 2
    found = sampler.sample(logits_NV, states, [0, 0])
    assert found.token_ids == [3, -1] and found.failed == [False, True]
