"""What the demo measured, as a table and as JSON."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loquetier.demo.state import DemoState


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A model on the held-out orders."""

    exact_match: float
    """Part of the greedy answers that are right in every field."""
    loss: float
    """Mean over the tokens of the right answers."""
    num_examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSummary:
    """One client's stream."""

    answered: int
    tokens: int
    tokens_per_second: float
    """While answering, waiting in the queue included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that the demo reports; all of it measured in this run."""

    base: str
    dtype: str
    steps: int
    training_seconds: float
    """From the first to the last sample of the engine's counters: what the two rates are taken over."""
    generated_tokens_per_second: float
    """All streams together, while training."""
    trained_tokens_per_second: float
    """Rows of training, labelled or not, while serving."""
    engine_steps: int
    """Since the runtime began."""
    mixed_steps: int
    """Steps whose forward held both rows in training and rows being served."""
    publishes: int
    publish_ms_mean: float | None
    """None: nothing was published."""
    streams: dict[str, StreamSummary]
    before: Quality
    """The bare base: what the adapter is before its first step."""
    after: Quality
    """The last published version."""
    live_question: str
    expected: str
    live_answers: list[tuple[str, str]]
    """(version, text) where the text changed."""
    peak_rss_mib: float
    """Of the process."""
    wall_seconds: float
    """Loading included."""


def summarize(
    state: DemoState, before: Quality, after: Quality, *, base: str, dtype: str, wall_seconds: float
) -> Summary:
    """Put the readings together; the training has ended and made at least one step."""
    first, last, stats = state.samples[0], state.samples[-1], state.stats
    assert stats is not None, "sampled at least once"
    seconds = last.seconds - first.seconds
    answers = state.live_answers
    return Summary(
        base=base,
        dtype=dtype,
        steps=len(state.steps),
        training_seconds=seconds,
        generated_tokens_per_second=(last.tokens_generated - first.tokens_generated) / seconds,
        trained_tokens_per_second=(last.train_rows - first.train_rows) / seconds,
        engine_steps=stats.totals.steps,
        mixed_steps=stats.totals.mixed_steps,
        publishes=stats.publishes,
        publish_ms_mean=stats.publish_seconds / stats.publishes * 1000 if stats.publishes else None,
        streams={
            s.model: StreamSummary(answered=s.answered, tokens=s.num_tokens, tokens_per_second=s.num_tokens / s.seconds)
            for s in state.streams
        },
        before=before,
        after=after,
        live_question=state.live_question,
        expected=state.expected,
        live_answers=[(a.version, a.text) for i, a in enumerate(answers) if i == 0 or a.text != answers[i - 1].text],
        peak_rss_mib=_peak_rss_mib(),
        wall_seconds=wall_seconds,
    )


def write_summary(summary: Summary, directory: Path) -> Path:
    """Write summary.json; returns its path."""
    path = directory / "summary.json"
    path.write_text(json.dumps(asdict(summary), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def print_summary(summary: Summary, console: Console) -> None:
    """The same for people."""
    table = Table(title="What was measured", show_header=False, title_style="bold", min_width=64)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    for name, value in _lines(summary):
        table.add_row(name, value)
    console.print(table)
    console.print("How the adapter in training answered, by version:", style="bold")
    console.print(f"  {summary.live_question}", style="dim", markup=False, highlight=False)
    answers = summary.live_answers
    for version, text in answers if len(answers) <= 6 else [*answers[:3], *answers[-3:]]:
        console.print(f"  {version:>14}  {' '.join(text.split())}", markup=False, highlight=False)


def _lines(s: Summary) -> list[tuple[str, str]]:
    n = s.before.num_examples
    return [
        ("base", f"{s.base}, {s.dtype}"),
        *(
            (f"answers by {name}", f"{one.answered} ({one.tokens_per_second:.1f} tokens/s)")
            for name, one in s.streams.items()
        ),
        ("steps of orders", f"{s.steps} in {s.training_seconds:.1f} s"),
        ("tokens/s generated while training", f"{s.generated_tokens_per_second:.1f}"),
        ("tokens/s trained while serving", f"{s.trained_tokens_per_second:.1f}"),
        ("forward passes of both kinds", f"{s.mixed_steps}"),
        ("publish, mean", "-" if s.publish_ms_mean is None else f"{s.publish_ms_mean:.1f} ms"),
        (f"exact match on {n} held-out orders", f"{s.before.exact_match:.0%} -> {s.after.exact_match:.0%}"),
        ("held-out loss", f"{s.before.loss:.3f} -> {s.after.loss:.3f}"),
        ("peak memory (RSS)", f"{s.peak_rss_mib:,.0f} MiB"),
        ("wall time, loading included", f"{s.wall_seconds:.0f} s"),
    ]


def _peak_rss_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
