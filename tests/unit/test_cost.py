"""The step cost model: learns a linear machine, keeps what it knows, never explodes, never goes below zero."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquetier.engine.cost import MIN_SEEN, StepCostModel, StepFeatures, plan_features
from loquetier.engine.rows import PrefillChunk, Sequence, StepPlan, TrainItem
from loquetier.errors import IntegrityError


def seconds_of(f: StepFeatures) -> float:
    """A machine that really is linear: 5 ms per step and plausible costs per row."""
    return (
        5e-3
        + 1e-4 * f.prefill_rows
        + 3e-4 * f.decode_rows
        + 2e-4 * f.train_rows
        + 3e-5 * f.backward_rows
        + 1e-7 * f.kv_tokens
    )


def random_step(rng: random.Random, train: bool = True) -> StepFeatures:
    trains = train and rng.random() < 0.5
    decode = rng.randint(0, 32)
    return StepFeatures(
        prefill_rows=rng.choice([0, 0, 64, 200, 512]),
        decode_rows=decode,
        train_rows=rng.choice([0, 256, 900]) if trains else 0,
        backward_rows=rng.randint(0, 4) * 512 if trains else 0,
        kv_tokens=decode * rng.randint(1, 1000),
    )


def trained(steps: int, noise: float = 0.0, train: bool = True) -> StepCostModel:
    rng, model = random.Random(0), StepCostModel()
    for _ in range(steps):
        f = random_step(rng, train)
        model.observe(f, seconds_of(f) * rng.uniform(1 - noise, 1 + noise))
    return model


def test_says_nothing_without_data() -> None:
    model = StepCostModel()
    assert model.predict(StepFeatures(decode_rows=1)) is None
    assert model.num_observations == 0
    assert model.prediction_error is None


def test_learns_a_linear_machine() -> None:
    model = trained(2000)
    rng = random.Random(1)
    for _ in range(50):
        f = random_step(rng)
        # Noise-free data: what is left is how far coordinate descent is from its limit.
        assert model.predict(f) == pytest.approx(seconds_of(f), rel=0.03)
    assert model.prediction_error is not None and model.prediction_error < 0.03


def test_learns_through_noise() -> None:
    model = trained(2000, noise=0.2)
    rng = random.Random(1)
    for _ in range(50):
        f = random_step(rng)
        # +-20 % uniform noise averages out over a memory of ~500 steps; the fit of relative errors leans low
        # by about the noise's variance (1.3 %).
        assert model.predict(f) == pytest.approx(seconds_of(f), rel=0.12)


def test_parts_never_seen_are_not_predicted_as_free() -> None:
    model = trained(200, train=False)
    assert model.predict(StepFeatures(decode_rows=8, kv_tokens=800)) is not None
    assert model.predict(StepFeatures(decode_rows=8, train_rows=1)) is None
    for _ in range(MIN_SEEN):
        model.observe(StepFeatures(train_rows=500), 0.2)
    assert model.predict(StepFeatures(decode_rows=8, train_rows=1)) is not None


def test_follows_a_machine_that_became_slower() -> None:
    model, rng = trained(1000), random.Random(2)
    for _ in range(2500):
        f = random_step(rng)
        model.observe(f, 3 * seconds_of(f))
    f = StepFeatures(decode_rows=16, train_rows=512, kv_tokens=4000)
    # 2500 steps of forgetting 0.998 leave 0.7 % of the old weight, and the old steps, being shorter, count 9 x.
    assert model.predict(f) == pytest.approx(3 * seconds_of(f), rel=0.1)


def test_remembers_training_cost_through_a_long_quiet_time() -> None:
    model, rng = trained(1000), random.Random(3)
    step = StepFeatures(train_rows=900, backward_rows=2048)
    for _ in range(20_000):
        f = random_step(rng, train=False)
        model.observe(f, seconds_of(f))
    assert model.predict(step) == pytest.approx(seconds_of(step), rel=0.1)


def test_one_hiccup_hardly_counts() -> None:
    model = trained(1000)
    f = StepFeatures(decode_rows=16, kv_tokens=4000)
    before = model.predict(f)
    model.observe(f, 30.0)
    assert model.predict(f) == pytest.approx(before, rel=0.05)


def test_a_clock_that_goes_backwards_is_refused() -> None:
    for seconds in (-1.0, math.nan, math.inf):
        with pytest.raises(IntegrityError):
            StepCostModel().observe(StepFeatures(), seconds)
    with pytest.raises(IntegrityError):
        StepCostModel().observe(StepFeatures(decode_rows=-1), 1.0)


rows = st.one_of(st.integers(0, 4), st.integers(0, 10_000))
features = st.builds(
    StepFeatures,
    prefill_rows=rows,
    decode_rows=rows,
    train_rows=rows,
    backward_rows=st.integers(0, 10**7),
    kv_tokens=st.integers(0, 10**9),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(features, st.floats(0, 1e4)), min_size=1, max_size=80), features)
def test_predictions_are_finite_and_never_negative(
    steps: list[tuple[StepFeatures, float]], asked: StepFeatures
) -> None:
    model = StepCostModel()
    for f, seconds in steps:
        model.observe(f, seconds)
        for question in (f, asked, StepFeatures()):
            predicted = model.predict(question)
            assert predicted is None or (math.isfinite(predicted) and predicted >= 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(features, st.floats(1e-3, 10)), min_size=20, max_size=60), features, features)
def test_more_work_never_costs_less(
    steps: list[tuple[StepFeatures, float]], one: StepFeatures, other: StepFeatures
) -> None:
    """The policies bisect on this."""
    model = StepCostModel()
    for f, seconds in steps:
        model.observe(f, seconds)
    both = StepFeatures(
        prefill_rows=one.prefill_rows + other.prefill_rows,
        decode_rows=one.decode_rows + other.decode_rows,
        train_rows=one.train_rows + other.train_rows,
        backward_rows=one.backward_rows + other.backward_rows,
        kv_tokens=one.kv_tokens + other.kv_tokens,
    )
    small, large = model.predict(one), model.predict(both)
    assert small is None or large is None or small <= large


@pytest.mark.parametrize("kind", ["same step for ever", "contradicting", "extreme"])
def test_stays_bounded_over_many_updates(kind: str) -> None:
    """The normal equations reach their steady state after a few thousand steps (0.998^20000 = 4e-18), so what
    holds after 20,000 holds after a million; the run is kept short for that reason alone."""
    model, rng = StepCostModel(), random.Random(4)
    step = StepFeatures(decode_rows=8, kv_tokens=800)
    for i in range(20_000):
        if kind == "same step for ever":
            model.observe(step, 0.02)
        elif kind == "contradicting":
            model.observe(step, 0.0 if i % 2 else 5.0)
        else:
            model.observe(StepFeatures(train_rows=rng.choice([0, 1, 10**6]), kv_tokens=10**9), rng.choice([0.0, 1e5]))
    largest = max(abs(value) for row in model._a for value in row)
    # Largest scaled x / seconds is 10^9 / 65536 / 1e-4 = 1.5e8; its square over (1 - 0.998) is 1.2e19.
    assert largest < 2e19
    for c in model._coefficients:
        assert math.isfinite(c) and 0 <= c < 1e6
    if kind == "same step for ever":
        assert model.predict(step) == pytest.approx(0.02, rel=1e-3)  # noise-free and 1-dimensional


def test_plan_features_count_each_kind() -> None:
    running = Sequence(seq_id=1, tokens=[0] * 10, prompt_len=5, max_total_len=20, num_computed=9)
    prompt = Sequence(seq_id=2, tokens=[0] * 10, prompt_len=10, max_total_len=20, num_computed=4)
    plan = StepPlan(
        train=(TrainItem(1, 1, 30, 0),),
        evaluate=(TrainItem(1, 2, 7, 0),),
        prefill=(PrefillChunk(prompt, 4, 3),),
        decode=(running,),
    )
    # Chunk [4, 7): its rows see 5 + 6 + 7 tokens; the decode row sees 10.
    assert plan_features(plan, 60) == StepFeatures(
        prefill_rows=3 + 7, decode_rows=1, train_rows=30, backward_rows=60, kv_tokens=5 + 6 + 7 + 10
    )
