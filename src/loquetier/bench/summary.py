"""From samples to figures: medians, spread, ratios of the same round, and whether they meet the targets. Pure.

A sample is one measurement of one side in one round, as the result file keeps it. A ratio is taken between samples of
the same round and then summarized, so that a slow minute of the machine hits both sides of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Sample = Mapping[str, Any]
Series = dict[int, float]
"""A value per round."""

OURS, PEFT, VLLM_LORA, VLLM = "Loquetier", "PEFT", "vLLM-CPU + LoRA", "vLLM-CPU"
COLUMNS = (OURS, PEFT, VLLM_LORA, VLLM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a row should reach. A goal whose peer was not measured is left out."""

    against: str | None
    """A column, for the ratio to it; None for our own value."""
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    key: str
    title: str
    unit: str
    columns: Mapping[str, Callable[[Sequence[Sample]], Series]]
    goals: tuple[Goal, ...] = ()
    higher_is_better: bool = True
    best: str | None = None
    """Name of its roofline in `roofline.bounds`."""


def of(side: str, task: str, value: Callable[[Sample], float]) -> Callable[[Sequence[Sample]], Series]:
    """One value per round from a side's samples of a task: their mean where a round has several."""

    def series(samples: Sequence[Sample]) -> Series:
        found: dict[int, list[float]] = {}
        for sample in samples:
            if sample["side"] == side and sample["task"] == task:
                found.setdefault(sample["round"], []).append(value(sample))
        return {number: statistics.fmean(values) for number, values in found.items()}

    return series


def rate(side: str, task: str) -> Callable[[Sequence[Sample]], Series]:
    """Tokens per second."""
    return of(side, task, lambda s: s["tokens"] / s["seconds"])


def field(side: str, task: str, name: str, scale: float = 1.0) -> Callable[[Sequence[Sample]], Series]:
    """A number that the sample has."""
    return of(side, task, lambda s: scale * s[name])


def both(
    f: Callable[[float, float], float],
    a: Callable[[Sequence[Sample]], Series],
    b: Callable[[Sequence[Sample]], Series],
) -> Callable[[Sequence[Sample]], Series]:
    """`f` of the values of two series in the same round."""
    return lambda samples: paired(f, a(samples), b(samples))


def paired(f: Callable[[float, float], float], a: Series, b: Series) -> Series:
    """`f` of two series, round by round; rounds that one of them lacks are left out."""
    return {number: f(a[number], b[number]) for number in sorted(a.keys() & b.keys())}


@dataclass(frozen=True, slots=True)
class Figure:
    """A series in one line."""

    median: float
    low: float
    high: float
    rounds: int


def figure(series: Series) -> Figure | None:
    """None for an empty series."""
    values = list(series.values())
    return Figure(statistics.median(values), min(values), max(values), len(values)) if values else None


def summarize(
    rows: Iterable[Row], samples: Sequence[Sample], bounds: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The rows that were measured, JSON-ready.

    Args:
        bounds: what the machine allows at most (or at least, where lower is better), by `Row.best`.
    """
    return [line for row in rows if (line := _line(row, samples, bounds or {})) is not None]


def _line(row: Row, samples: Sequence[Sample], bounds: Mapping[str, float]) -> dict[str, Any] | None:
    series = {column: values for column, get in row.columns.items() if (values := get(samples))}
    if OURS not in series:
        return None

    def better(ours: float, theirs: float) -> float:
        return ours / theirs if row.higher_is_better else theirs / ours

    # A ratio of shares says nothing, and a share may be 0.
    compared = {} if row.unit in ("%", "x") else {c: s for c, s in series.items() if c != OURS}
    ratios = {c: figure(paired(better, series[OURS], s)) for c, s in compared.items()}
    own = figure(series[OURS])
    assert own is not None, "OURS is in series"
    bound = bounds.get(row.best) if row.best else None
    goals = [goal for goal in row.goals if goal.against is None or ratios.get(goal.against)]
    return {
        "key": row.key,
        "title": row.title,
        "unit": row.unit,
        "higher_is_better": row.higher_is_better,
        "columns": {c: asdict(f) for c, s in series.items() if (f := figure(s)) is not None},
        "ratios": {c: asdict(f) for c, f in ratios.items() if f is not None},
        "roofline": bound,
        "share_of_roofline": better(own.median, bound) if bound else None,
        "goals": [_verdict(goal, own, ratios) for goal in goals],
    }


def _verdict(goal: Goal, own: Figure, ratios: Mapping[str, Figure | None]) -> dict[str, Any]:
    found = own if goal.against is None else ratios[goal.against]
    assert found is not None, "goals without figures are left out"
    met = (goal.at_least is None or found.median >= goal.at_least) and (
        goal.at_most is None or found.median <= goal.at_most
    )
    return asdict(goal) | {"value": found.median, "met": met}
