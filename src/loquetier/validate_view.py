"""A validation report for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loquetier.training.validate import Problem, Segment, ValidationReport

_SEGMENT_CHARS = 600
"""Longer segments are shown without their middle."""


def print_report(report: ValidationReport, console: Console) -> None:
    """Problems, statistics, three examples (labels green, or in brackets where there is no color), and the verdict."""
    for problem in report.problems:
        console.print(_problem(problem))
    left = report.num_errors + report.num_warnings - len(report.problems)
    if left:
        console.print(f"... and {left} more")
    console.print(_statistics(report))
    for number, sample in enumerate(report.samples, 1):
        has_color = console.color_system is not None
        console.print(Text(f"Example {number}, labels {'green' if has_color else 'in ⟦⟧'}", style="bold"))
        console.print(_sample(sample, has_color))
    style, verdict = ("green", "ready to train") if report.ok else ("red", "a job would refuse this data")
    console.print(Text(f"{report.num_errors} error(s), {report.num_warnings} warning(s): {verdict}", style=style))


def _problem(problem: Problem) -> Text:
    style = "red" if problem.level == "error" else "yellow"
    where = f"line {problem.line}" if problem.line else "file"
    # Text, not markup: messages quote the file, and the file may hold anything, escape codes too.
    return Text.assemble((f"{where}: ", "bold"), (f"{problem.level}: ", style), _printable(problem.message))


def _statistics(report: ValidationReport) -> Table:
    tokens = report.tokens
    rows = (
        ("format", report.format or "none recognised"),
        ("examples", f"{report.num_examples} ({report.num_duplicates} duplicates)"),
        (
            "tokens per example",
            f"min {tokens.minimum}, median {tokens.median:g}, p95 {tokens.p95}, max {tokens.maximum}",
        ),
        ("tokens of one epoch", f"{report.trained_tokens}, of which {report.labelled_tokens} are labels"),
        (
            f"longer than {report.max_seq_len}",
            f"{report.num_truncated} examples, {report.num_cut_tokens} of {tokens.total} tokens cut off",
        ),
        ("nothing left to learn", f"{report.num_without_labels} examples"),
    )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _sample(sample: tuple[Segment, ...], has_color: bool) -> Text:
    text = Text()
    for part, is_label in sample:
        if len(part) > _SEGMENT_CHARS:
            half = _SEGMENT_CHARS // 2
            part = f"{part[:half]} [... {len(part) - 2 * half} characters ...] {part[-half:]}"
        part = _printable(part)
        if is_label and not has_color:
            part = f"⟦{part}⟧"
        text.append(part, style="green underline" if is_label else "dim")
    return text


def _printable(text: str) -> str:
    """`text` without control characters other than line breaks and tabs: a file must not steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
