"""Early stopping and the best evaluation: pure functions of a job's history, as transformers decides."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import EarlyStoppingCallback

from loquetier.config import TrainingConfig
from loquetier.errors import ConfigError
from loquetier.training.ending import best_evaluation, check_evaluation, improved_now, reason_to_stop
from loquetier.training.job import EvalResult, StepRecord

NAN, INF = math.nan, math.inf


def history(*losses: float | None) -> list[StepRecord]:
    """One step per entry; None = a step without an evaluation."""
    return [
        StepRecord(i, 1.0, 0.5, 1e-3, 1.0, 10, 0.1, None if loss is None else EvalResult(loss, 0.5, 5))
        for i, loss in enumerate(losses, 1)
    ]


def stopping(patience: int, threshold: float = 0.0) -> TrainingConfig:
    return TrainingConfig(eval_every=1, early_stopping_patience=patience, early_stopping_threshold=threshold)


@pytest.mark.parametrize(
    ("losses", "step", "since"),
    [
        ((3.0,), 1, 0),
        ((3.0, None, 2.0), 3, 0),
        ((3.0, 2.0, 2.0), 2, 1),
        ((3.0, 2.0, 2.5, 2.1), 2, 2),
        ((NAN, 2.0), 2, 0),
        ((2.0, NAN, INF), 1, 2),
    ],
)
def test_best(losses: tuple[float | None, ...], step: int, since: int) -> None:
    best = best_evaluation(history(*losses))
    assert best is not None and (best.step, best.evaluations_since) == (step, since)
    assert improved_now(history(*losses)) == (step == len(losses))


@pytest.mark.parametrize("losses", [(), (None, None), (NAN,), (INF, NAN)])
def test_no_best(losses: tuple[float | None, ...]) -> None:
    assert best_evaluation(history(*losses)) is None and not improved_now(history(*losses))


def test_a_small_improvement_is_the_best_but_does_not_reset_patience() -> None:
    best = best_evaluation(history(3.0, 2.99, 2.98), threshold=0.1)
    assert best is not None and (best.step, best.loss, best.evaluations_since) == (3, 2.98, 2)


def test_reasons() -> None:
    assert reason_to_stop(history(3.0, 3.0, 3.0), TrainingConfig()) is None
    assert reason_to_stop(history(3.0, 3.0), stopping(2)) is None
    reason = reason_to_stop(history(2.5, None, 3.0, 2.5), stopping(2))
    assert reason == "early stopping: 2 evaluations without improvement over loss 2.5 of step 1"
    assert reason_to_stop(history(NAN), stopping(2)) is None
    assert "none of 2 evaluations" in str(reason_to_stop(history(NAN, None, INF), stopping(2)))


@pytest.mark.parametrize("seed", range(20))
def test_stops_where_transformers_stops(seed: int) -> None:
    rng = random.Random(seed)
    losses = [round(3 - 0.05 * i + rng.uniform(-0.4, 0.4), 2) for i in range(30)]
    patience, threshold = rng.randint(1, 4), rng.choice([0.0, 0.05, 0.2])
    theirs = EarlyStoppingCallback(patience, threshold)
    args: Any = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    state: Any = SimpleNamespace(best_metric=None)
    for count, loss in enumerate(losses, 1):
        control: Any = SimpleNamespace(should_training_stop=False)
        theirs.on_evaluate(args, state, control, metrics={"eval_loss": loss})
        state.best_metric = loss if state.best_metric is None else min(loss, state.best_metric)
        ours = reason_to_stop(history(*losses[:count]), stopping(patience, threshold))
        assert (ours is not None) == control.should_training_stop
        if ours is not None:
            return
    pytest.fail("nothing stopped: the losses do not test anything")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience=2: needs evaluations; set eval_every"),
        ({"publish": "best"}, "publish='best': needs evaluations; set eval_every"),
        ({"early_stopping_patience": 0, "eval_every": 1}, "early_stopping_patience=0: must be an integer >= 1"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold=0.1: needs early_stopping_patience"),
        ({"early_stopping_threshold": -1.0}, "early_stopping_threshold=-1.0: must be in [0, 1e9]"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio=0.0: must be > 0"),
        ({"loraplus_lr_ratio": 1e5}, "at most 1"),
        ({"loraplus_lr_ratio": NAN}, "loraplus_lr_ratio=nan"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**settings)
    assert message in str(caught.value)


def test_settings_that_need_evaluation_data() -> None:
    with pytest.raises(ConfigError, match=r"early_stopping_patience=3: needs evaluation data; give eval_data"):
        check_evaluation(stopping(3), 0)
    with pytest.raises(ConfigError, match=r"publish='best': needs evaluation data"):
        check_evaluation(TrainingConfig(publish="best", eval_every=2), 0)
    check_evaluation(stopping(3), 1)
    check_evaluation(TrainingConfig(eval_every=2), 0)
