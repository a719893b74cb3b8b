"""The benchmark's picture: a panel per measure, a bar per side, from zero, with the rounds' spread."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loquetier.bench.summary import COLUMNS, OURS, PEFT, VLLM, VLLM_LORA
from loquetier.errors import ConfigError

COLORS = {OURS: "#2a9d8f", PEFT: "#e76f51", VLLM_LORA: "#457b9d", VLLM: "#a8c5da"}
_GREY = "#6c757d"
_ACROSS = 3
_UNITS = {"tok/s": "tokens per second", "ms": "milliseconds", "s": "seconds", "x": "times", "%": "percent"}


def check_matplotlib() -> None:
    """Raises ConfigError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError("the benchmark draws its result with matplotlib: install the demo extra")


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the picture of a result. Raises ConfigError: matplotlib is not installed."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["columns"]]
    down = -(-len(rows) // _ACROSS)
    figure = Figure(figsize=(15, 0.9 + 1.95 * down), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, _ACROSS, squeeze=False).flatten()
    for axis, row in zip(axes, rows, strict=False):
        _panel(axis, row)
    for axis in axes[len(rows) :]:
        axis.axis("off")
    m = result["machine"]
    figure.suptitle(
        f"{result['plan']['base']}, {result['dtype']}, {m['cpu']}, {m['threads']} threads; medians and range of "
        f"{result['rounds']} rounds, commit {result['commit']}",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path)


def _panel(axis: Any, row: dict[str, Any]) -> None:
    present = [c for c in COLUMNS if c in row["columns"]]
    figures = [row["columns"][c] for c in present]
    middle = [f["median"] for f in figures]
    spread = [[f["median"] - f["low"] for f in figures], [f["high"] - f["median"] for f in figures]]
    colors = [COLORS[c] for c in present]
    axis.barh(present, middle, xerr=spread, color=colors, height=0.66, error_kw={"ecolor": "black", "capsize": 3})
    limits = {g["at_least"] if g["at_least"] is not None else g["at_most"] for g in row["goals"] if not g["against"]}
    marks = [(limit, "target", ":") for limit in limits]
    if row["roofline"] is not None:
        marks.append((row["roofline"], "best possible", "--"))
    above = axis.get_xaxis_transform()
    for place, (at, label, style) in enumerate(sorted(marks)):
        side = "right" if place < len(marks) - 1 else "left"  # two labels must not meet
        axis.axvline(at, color=_GREY, ls=style, lw=1.4, zorder=0.5)
        axis.text(at, 1.0, label, color=_GREY, ha=side, va="bottom", fontsize=8, transform=above)
    reach = max([*(f["high"] for f in figures), 0.0, *(at for at, *_ in marks)]) or 1.0
    axis.set_xlim(min(0.0, *(f["low"] for f in figures)), 1.5 * reach)
    for place, (column, found) in enumerate(zip(present, figures, strict=True)):
        ratio = row["ratios"].get(column)
        text = _value(found["median"], row["unit"])
        if ratio is not None:
            text += f"  (Loquetier {ratio['median']:.1f}x)"
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
        axis.text(max(found["high"], 0) + 0.02 * reach, place, text, va="center", fontsize=9, bbox=behind)
    axis.set_ylim(max(len(present), 2) - 0.5, -0.5)  # the first on top, bars as thick in every panel of up to two
    better = "more is better" if row["higher_is_better"] else "less is better"
    axis.set_title(row["title"], loc="left", fontsize=10, fontweight="bold", pad=14)
    axis.set_xlabel(f"{_UNITS.get(row['unit'], row['unit'])}, {better}", fontsize=8.5, color=_GREY)
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)


def _value(value: float, unit: str) -> str:
    shown = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{shown}{'' if unit == 'x' else ' '}{unit}"
