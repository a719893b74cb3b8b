"""README's table, made from a committed result.

``python -m loquetier.bench.report docs/benchmarks/core-cpu.json README.md``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench table: begin -->", "<!-- bench table: end -->"


def markdown(result: dict[str, Any]) -> str:
    """The table, with what was measured, where, and on which commit."""
    s, w, m = result["summary"], result["workload"], result["machine"]
    rows = [
        ("serve, adapters mixed in one batch", "serve_tokens_per_s", "serve_ratio"),
        ("fine-tune one adapter", "train_tokens_per_s", "train_ratio"),
    ]
    lines = ["| same work, same threads | Loquetier | PEFT | ratio |", "|---|--:|--:|--:|"]
    for label, key, ratio in rows:
        lines.append(f"| {label} | {s[key]:.0f} tok/s | {s['peft_' + key]:.0f} tok/s | {s[ratio]:.2f}x |")
    lines.append(
        f"| serve and fine-tune (PEFT: one after the other) | {s['both_seconds']:.1f} s "
        f"| {s['peft_both_seconds']:.1f} s | {s['both_ratio']:.2f}x |"
    )
    note = (
        f"{result['base']}, {result['dtype']}; {w['num_requests']} requests of {w['new_tokens']} tokens on "
        f"{w['num_adapters']} adapters r={w['rank']} on all linears (base-only requests: "
        f"{s['serve_base_tokens_per_s']:.0f} tok/s, so adapters cost {100 * s['lora_tax']:.0f} %); "
        f"{w['num_examples']} examples, {w['train_tokens']} tokens without padding. "
        f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, commit {result['commit']}, medians of "
        f"{result['rounds']} interleaved rounds; `make bench` repeats it."
    )
    return "\n".join([*lines, "", note])


def insert(page: str, table: str) -> str:
    """Put the table between the marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(argv: list[str]) -> None:
    """Rewrite the page named second from the result named first."""
    result, page = Path(argv[0]), Path(argv[1])
    table = markdown(json.loads(result.read_text(encoding="utf-8")))
    page.write_text(insert(page.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
