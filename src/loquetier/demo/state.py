"""What the demo has measured so far: written by the clients and the job's callback, read by the views. No torch."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loquetier.runtime import RuntimeStats
from loquetier.training.job import StepRecord


@dataclass(slots=True)
class StreamState:
    """One client, which asks one question after the other."""

    model: str
    """Adapter that it asks."""
    version: str = ""
    """The version that gave the present answer."""
    question: str = ""
    text: str = ""
    """Of the present answer, so far."""
    answered: int = 0
    """Answers finished."""
    num_tokens: int = 0
    """Generated, over all answers."""
    seconds: float = 0.0
    """Spent on answers, from submitting to the last token."""
    began: float = 0.0
    """`time.monotonic()` of the present answer's submission; 0 = none yet."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A reading of the engine's counters."""

    seconds: float
    """Since the training began."""
    tokens_generated: int
    train_rows: int


@dataclass(frozen=True, slots=True)
class LiveAnswer:
    """What one version of the adapter in training said to the fixed question."""

    version: str
    text: str


@dataclass(slots=True)
class DemoState:
    """Everything the views show. Take `lock` to read more than one field or to write."""

    total_steps: int
    streams: list[StreamState]
    live_question: str
    expected: str
    """The right answer to `live_question`."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    began: float = field(default_factory=time.monotonic)
    live_text: str = ""
    live_version: str = ""
    live_answers: list[LiveAnswer] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    """When each of `steps` was done, in seconds since the training began."""
    held_out: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the training began, held-out loss) of each evaluation."""
    samples: list[Sample] = field(default_factory=list)
    stats: RuntimeStats | None = None

    @property
    def seconds(self) -> float:
        """Since the training began."""
        return time.monotonic() - self.began


def rates(samples: list[Sample], window: float) -> tuple[list[float], list[float], list[float]]:
    """Times, and tokens per second of serving and of training over the last `window` seconds before each. Pure.

    A window reaches back to the first sample at most; what has less than half a window before it is left out,
    because one step more or less would be most of what it shows. A short run gets a window of half its length.
    """
    if len(samples) < 2:
        return [], [], []
    window = min(window, (samples[-1].seconds - samples[0].seconds) / 2)
    times: list[float] = []
    served: list[float] = []
    trained: list[float] = []
    start = 0
    for i in range(1, len(samples)):
        while start < i - 1 and samples[i].seconds - samples[start].seconds > window:
            start += 1
        span = samples[i].seconds - samples[start].seconds
        if span > 0 and span >= window / 2:
            times.append(samples[i].seconds)
            served.append((samples[i].tokens_generated - samples[start].tokens_generated) / span)
            trained.append((samples[i].train_rows - samples[start].train_rows) / span)
    return times, served, trained
