"""How often a value fell into which range: what a histogram of the metrics needs, counted where the values arise."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
"""Bounds of vLLM's `iteration_tokens_total`."""


@dataclass(slots=True)
class Tally:
    """Counts by range. One thread adds; hand out `copy` to others."""

    bounds: tuple[float, ...]
    """Ascending; a value counts for the first bound that is not below it."""
    counts: list[int] = field(default_factory=list)
    """One for each bound, and one for what is above all."""
    total: float = 0.0
    """Sum of the values."""

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Tally:
        """As it is now."""
        return Tally(self.bounds, list(self.counts), self.total)


@dataclass(slots=True)
class JobTally:
    """What jobs have done since the engine began."""

    steps: int = 0
    """Optimizer steps."""
    tokens: int = 0
    """Rows computed for them."""
    ended: Counter[str] = field(default_factory=Counter)
    """Jobs that have ended, by their last state."""
