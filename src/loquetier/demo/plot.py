"""The demo's PNG: loss, exact match, and tokens per second of both kinds over the same time."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loquetier.demo.state import DemoState, rates
from loquetier.demo.summary import Summary

_TRAINED, _GENERATED, _GREY = "#2a9d8f", "#e76f51", "#6c757d"
_WINDOW = 10.0
"""Seconds over which each point's tokens per second are taken."""


def write_plot(state: DemoState, summary: Summary, directory: Path) -> Path | None:
    """Write demo.png; returns its path, or None when matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, width_ratios=(3.2, 1), height_ratios=(1.5, 1, 1))
    loss = figure.add_subplot(grid[0, 0])
    trained = figure.add_subplot(grid[1, 0], sharex=loss)
    generated = figure.add_subplot(grid[2, 0], sharex=loss)
    _plot_loss(loss, state, summary)
    times, served_rate, trained_rate = rates(state.samples, _WINDOW)
    _plot_rate(trained, times, trained_rate, "trained", _TRAINED, summary.trained_tokens_per_second)
    _plot_rate(generated, times, served_rate, "generated", _GENERATED, summary.generated_tokens_per_second)
    generated.set_xlabel("seconds since the training began")
    for axis in (loss, trained):
        axis.tick_params(labelbottom=False)
    _plot_match(figure.add_subplot(grid[0, 1]), summary)
    _write_facts(figure.add_subplot(grid[1:, 1]), summary)
    figure.suptitle(
        f"Loquetier: {len(summary.streams) + 1} adapters answer while one of them is trained, on one {summary.base}",
        fontsize=14,
        fontweight="bold",
    )
    path = directory / "demo.png"
    figure.savefig(path)
    return path


def _plot_loss(axis: Any, state: DemoState, summary: Summary) -> None:
    axis.plot(
        state.step_times, [s.loss for s in state.steps], color=_TRAINED, marker=".", lw=1.2, label="training step"
    )
    held_out = [(0.0, summary.before.loss), *state.held_out]
    axis.plot(*zip(*held_out, strict=True), color=_GREY, marker="D", ms=6, ls=":", label="held-out orders")
    axis.set_ylabel("loss")
    axis.set_ylim(bottom=0)
    axis.set_title(f"Training orders: {summary.steps} steps, every one published", loc="left", fontsize=11)
    axis.legend(frameon=False)
    _clean(axis)


def _plot_rate(axis: Any, times: list[float], rate: list[float], kind: str, color: str, mean: float) -> None:
    axis.fill_between(times, rate, color=color, alpha=0.25, lw=0)
    axis.plot(times, rate, color=color, lw=1.5)
    axis.axhline(mean, color=color, ls="--", lw=1)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens/s")
    axis.set_title(f"Tokens {kind}: {mean:.1f}/s on average", loc="left", fontsize=11)
    _clean(axis)


def _plot_match(axis: Any, summary: Summary) -> None:
    values = (summary.before.exact_match * 100, summary.after.exact_match * 100)
    bars = axis.bar(("base", "trained"), values, color=(_GREY, _TRAINED), width=0.6)
    axis.bar_label(bars, fmt="%.0f%%", fontsize=12, fontweight="bold")
    axis.set_ylim(0, 112)
    axis.set_yticks(())
    axis.set_title(f"Exact match, {summary.before.num_examples} held-out orders", fontsize=11)
    _clean(axis)
    axis.spines["left"].set_visible(False)


def _write_facts(axis: Any, summary: Summary) -> None:
    axis.axis("off")
    lines = [
        *((f"answers by {name}", f"{one.answered}") for name, one in summary.streams.items()),
        ("mixed forward passes", f"{summary.mixed_steps}"),
        ("publish, mean", "-" if summary.publish_ms_mean is None else f"{summary.publish_ms_mean:.1f} ms"),
        ("peak memory", f"{summary.peak_rss_mib:,.0f} MiB"),
        ("type", summary.dtype),
        ("wall time", f"{summary.wall_seconds:.0f} s"),
    ]
    for number, (name, value) in enumerate(lines):
        height = 0.95 - number * 0.11
        axis.text(0.0, height, name, color=_GREY, fontsize=11, transform=axis.transAxes)
        axis.text(1.0, height, value, ha="right", fontsize=11, fontweight="bold", transform=axis.transAxes)


def _clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
