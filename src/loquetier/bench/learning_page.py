"""docs/learning.md's table and plot, made from a committed result.

``python -m loquetier.bench.learning_page docs/benchmarks/gsm8k-cpu.json docs/learning.md``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from loquetier.bench.report import insert

SIDES = (("ours", "Loquetier", "#2a9d8f"), ("peft", "PEFT + Trainer", "#e76f51"))
STYLES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"lw": 2.0}, {"lw": 1.2, "marker": "D", "ms": 8, "mfc": "none"}),
    ({"ls": "", "marker": "x", "ms": 5}, {"ls": "", "marker": "+", "ms": 9}),
)
"""Of each side's training and held-out curve; the second side's are marks, because the lines lie on each other."""
SHOWN_STEPS = 6
"""Rows of the table that show training losses, evenly spread, the first and the last step included."""


def markdown(result: dict[str, Any]) -> str:
    """The table, with the settings and where it was made."""
    s, m, d = result["settings"], result["machine"], result["data"]
    train = [result[side]["train_loss"] for side, _, _ in SIDES]
    looks = [result[side]["held_out_loss"] for side, _, _ in SIDES]
    lines = ["| loss per labelled token | Loquetier | PEFT + Trainer | difference |", "|---|--:|--:|--:|"]
    last = len(train[0]) - 1
    for i in sorted({round(n * last / (SHOWN_STEPS - 1)) for n in range(SHOWN_STEPS)}):
        lines.append(_row(f"training, step {i + 1}", train[0][i], train[1][i]))
    for (step, ours), (_, theirs) in zip(*looks, strict=True):
        lines.append(_row(f"held out, after {step} steps", ours, theirs))
    largest = result["differences"]
    examples = s["steps"] * s["batch_size"] * s["accumulation"]
    note = (
        f"Largest difference over all {len(train[0])} steps: {largest['train_loss']:.1e} in training, "
        f"{largest['held_out_loss']:.1e} held out.\n\n"
        f"{s['base']}, {result['dtype']}, LoRA r={s['rank']}, alpha {s['alpha']} on all linears; {s['steps']} "
        f"optimizer steps of {s['accumulation']} x {s['batch_size']} examples; AdamW, learning rate "
        f"{s['learning_rate']}, {s['schedule']} after a warm-up of {s['warmup_ratio']:.0%}, "
        f"gradient norm clipped at {s['max_grad_norm']}. {examples} examples ({d['train_tokens']} tokens, "
        f"{d['train_labels']} of them labels) and {s['held_out']} held out, chosen with "
        f"seed {s['seed']} from the {d['examples']} of GSM8K's training file (sha256 "
        f"`{d['sha256'][:12]}`). {m['cpu']}, {m['threads']} thread(s), torch {m['torch']}, transformers "
        f"{m['transformers']}, peft {m['peft']}, accelerate {m['accelerate']}; engine of commit {result['commit']}."
    )
    return "\n".join([*lines, "", note])


def _row(label: str, ours: float, theirs: float) -> str:
    return f"| {label} | {ours:.4f} | {theirs:.4f} | {abs(ours - theirs):.1e} |"


def plot(result: dict[str, Any], path: Path) -> None:
    """Both sides' curves, and their difference, as a picture. Needs matplotlib (the demo extra)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    losses, apart = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    for (side, label, color), (train_style, held_out_style) in zip(SIDES, STYLES, strict=True):
        curve = result[side]
        steps = range(1, len(curve["train_loss"]) + 1)
        losses.plot(steps, curve["train_loss"], color=color, label=f"training, {label}", **train_style)
        at, held_out = zip(*curve["held_out_loss"], strict=True)
        losses.plot(at, held_out, color=color, label=f"held out, {label}", **held_out_style)
    losses.set_ylabel("loss per labelled token")
    losses.legend(frameon=False)
    ours, theirs = (result[side]["train_loss"] for side, _, _ in SIDES)
    apart.semilogy(range(1, len(ours) + 1), [abs(a - b) for a, b in zip(ours, theirs, strict=True)], color="#6c757d")
    apart.set_ylabel("difference in training")
    apart.set_xlabel("optimizer step")
    for axis in (losses, apart):
        axis.spines[["top", "right"]].set_visible(False)
    s = result["settings"]
    figure.suptitle(f"GSM8K, {s['base']}, LoRA r={s['rank']} on all linears, {result['dtype']}", fontweight="bold")
    figure.savefig(path)


def main(argv: list[str]) -> None:
    """Rewrite the page named second, and the picture beside the result named first."""
    path, page = Path(argv[0]), Path(argv[1])
    result = json.loads(path.read_text(encoding="utf-8"))
    page.write_text(insert(page.read_text(encoding="utf-8"), markdown(result)), encoding="utf-8")
    plot(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
