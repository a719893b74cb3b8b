"""What `loquetier bench` shows: progress, then a table of rates and ratios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loquetier.bench.run import run, save


def bench_command(base: str, *, dtype: str, rounds: int, with_peer: bool, output: Path) -> None:
    """Measure, show, save."""
    console = Console()
    with console.status("measuring") as status:

        def tell(line: str) -> None:
            status.update(line)
            if not console.is_terminal:
                console.print(line)

        result = run(base, dtype=dtype, rounds=rounds, with_peer=with_peer, tell=tell)
    console.print(table(result))
    save(result, output)
    console.print(f"saved {output}")


def table(result: dict[str, Any]) -> Table:
    """One row per kind of work; PEFT's columns only when it was measured."""
    s, w, machine = result["summary"], result["workload"], result["machine"]
    shown = Table(
        title=f"{result['base']} {result['dtype']}, {machine['cpu']}, {machine['threads']} threads, medians of "
        f"{result['rounds']} rounds",
        caption=f"{w['num_requests']} requests x {w['new_tokens']} tokens, {w['num_adapters']} adapters r={w['rank']}; "
        f"{w['num_examples']} training examples, {w['train_tokens']} tokens without padding",
    )
    for column in ("work", "loquetier", "PEFT", "ratio"):
        shown.add_column(column, justify="left" if column == "work" else "right")
    for label, ours, peer, ratio, unit in _rows():
        if ours not in s:
            continue
        shown.add_row(
            label,
            f"{s[ours]:.1f} {unit}",
            f"{s[peer]:.1f} {unit}" if peer in s else "-",
            f"{s[ratio]:.2f}x" if ratio in s else "-",
        )
    shown.add_row("LoRA tax (against base-only requests)", f"{100 * s['lora_tax']:.0f} %", "-", "-")
    return shown


def _rows() -> list[tuple[str, str, str, str, str]]:
    return [
        ("serve, adapters mixed in one batch", "serve_tokens_per_s", "peft_serve_tokens_per_s", "serve_ratio", "tok/s"),
        ("serve, base only", "serve_base_tokens_per_s", "", "", "tok/s"),
        ("fine-tune one adapter", "train_tokens_per_s", "peft_train_tokens_per_s", "train_ratio", "tok/s"),
        ("serve and fine-tune at once", "both_seconds", "peft_both_seconds", "both_ratio", "s"),
    ]
