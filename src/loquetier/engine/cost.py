"""How long will a step take? A linear model of step time, learned while the engine runs. Plain Python.

    seconds = c + a * prefill + b * decode + d * train + e * backward + k * kv_tokens,   all coefficients >= 0

It is recursive least squares with forgetting, kept in information form: the normal equations
``A = sum w_i x_i x_iT`` and ``b = sum w_i x_i`` decay by `FORGETTING` with each step, and a few sweeps of
projected coordinate descent, started from the last solution, move the coefficients. Why this form:

- ``A`` is a decaying sum of outer products, so it is bounded and stays positive semi-definite for ever. The
  covariance form of the textbook grows without bound in directions that see no data (no training for an hour).
- Descent from the last solution leaves a coefficient without recent data where it was, instead of sending it to 0.
- Costs cannot be negative. Clamping afterwards would spoil the other coefficients; the projection does not.

Errors count relative to the step's own duration (``x / seconds`` is fitted to 1): a 10 ms decode step weighs as
much as a 2 s training step, and one long hiccup weighs next to nothing.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from loquetier.engine.rows import StepPlan
from loquetier.errors import IntegrityError

FORGETTING = 0.998
"""Weight kept per step: a memory of about 500 steps."""
MIN_SEEN = 8
"""Steps with a part (say, TRAIN rows) that must be seen before a prediction involving it is given."""
_SCALES = (1.0, 256.0, 32.0, 512.0, 2048.0, 65536.0)
_SWEEPS = 6
_RIDGE = 1e-9
_MIN_SECONDS = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFeatures:
    """What of a step costs time. All counts are >= 0."""

    prefill_rows: int = 0
    """PREFILL and EVAL rows: both are forward only."""
    decode_rows: int = 0
    train_rows: int = 0
    """TRAIN rows of this step's forward."""
    backward_rows: int = 0
    """Units run, each times the rows of its tape."""
    kv_tokens: int = 0
    """Tokens of earlier steps that PREFILL, DECODE and windowed TRAIN rows attend to, and of this one for PREFILL,
    summed over the rows."""


def plan_features(plan: StepPlan, backward_rows: int) -> StepFeatures:
    """Features of a plan that is about to run or has run.

    Args:
        plan: the step's plan.
        backward_rows: units that ran (or will), each times the rows of its tape; the plan alone cannot tell.
    """
    chunks = sum(c.length * c.start + c.length * (c.length + 1) // 2 for c in plan.prefill)
    return StepFeatures(
        prefill_rows=sum(c.length for c in plan.prefill) + sum(i.num_rows for i in plan.evaluate),
        decode_rows=len(plan.decode),
        train_rows=sum(i.num_rows for i in plan.train),
        backward_rows=backward_rows,
        kv_tokens=chunks + sum(s.num_computed + 1 for s in plan.decode) + sum(i.num_rows * i.start for i in plan.train),
    )


def _scaled(features: StepFeatures) -> list[float]:
    counts = (
        1,
        features.prefill_rows,
        features.decode_rows,
        features.train_rows,
        features.backward_rows,
        features.kv_tokens,
    )
    if min(counts) < 0:
        raise IntegrityError(f"{features}: a step cannot have a negative number of rows")
    return [count / scale for count, scale in zip(counts, _SCALES, strict=True)]


class StepCostModel:
    """Predicts a step's seconds from its features; learns from every step that ran."""

    def __init__(self, error_window: int = 64) -> None:
        n = len(_SCALES)
        self._a = [[0.0] * n for _ in range(n)]
        self._b = [0.0] * n
        self._coefficients = [0.0] * n
        self._seen = [0] * n
        self._errors: deque[float] = deque(maxlen=error_window)

    @property
    def num_observations(self) -> int:
        """Steps observed so far."""
        return self._seen[0]

    @property
    def prediction_error(self) -> float | None:
        """Mean of ``|predicted - actual| / actual`` over the last steps that could be predicted beforehand."""
        return sum(self._errors) / len(self._errors) if self._errors else None

    def predict(self, features: StepFeatures) -> float | None:
        """Seconds a step with these features will take, >= 0.

        None while any part that the step contains was seen in fewer than `MIN_SEEN` steps: a coefficient
        without data is 0, and "training is free" would be the worst of guesses.
        """
        x = _scaled(features)
        if any(value > 0 and seen < MIN_SEEN for value, seen in zip(x, self._seen, strict=True)):
            return None
        return self._dot(x)

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from one step. Mutates the model only.

        Raises:
            IntegrityError: `seconds` is negative or not finite, or a count is negative.
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            raise IntegrityError(f"a step took {seconds} seconds: the clock must be monotonic")
        seconds = max(seconds, _MIN_SECONDS)
        predicted = self.predict(features)
        if predicted is not None:
            self._errors.append(abs(predicted - seconds) / seconds)
        x = _scaled(features)
        for j, value in enumerate(x):
            self._seen[j] += value > 0
        self._accumulate([value / seconds for value in x])
        for _ in range(_SWEEPS):
            self._sweep()

    def _dot(self, x: list[float]) -> float:
        return sum(c * v for c, v in zip(self._coefficients, x, strict=True))

    def _accumulate(self, x: list[float]) -> None:
        for i, row in enumerate(self._a):
            for j in range(len(row)):
                row[j] = FORGETTING * row[j] + x[i] * x[j]
            self._b[i] = FORGETTING * self._b[i] + x[i]

    def _sweep(self) -> None:
        """One pass of coordinate descent: each coefficient to its best value >= 0 given the others."""
        for j, row in enumerate(self._a):
            gradient = self._b[j] - sum(a * c for a, c in zip(row, self._coefficients, strict=True))
            # The ridge is on the *change*: a part without recent data (row ~ 0) keeps its coefficient.
            self._coefficients[j] = max(0.0, self._coefficients[j] + gradient / (row[j] + _RIDGE))
