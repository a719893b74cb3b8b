"""What `loquetier bench` shows: a progress bar, then a table; and where it puts the result."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loquetier.bench.peers.client import check_client
from loquetier.bench.peers.envs import PeerEnvironments
from loquetier.bench.peers.measure import measure
from loquetier.bench.peers.plan import Plan
from loquetier.bench.plot import check_matplotlib, plot
from loquetier.bench.summary import COLUMNS, OURS

WIDE = 170
"""Characters of the table where the output is no terminal."""


def bench_command(
    plan: Plan, *, rounds: int, output: Path, envs: PeerEnvironments | None, make_envs: bool, resume: bool
) -> None:
    """Measure, show, save; a picture lies beside the result."""
    console = Console()
    signal.signal(signal.SIGTERM, _leave)  # else the sides' processes would outlive us
    check_matplotlib()
    if plan.servers:
        check_client()
    if envs is not None:
        if make_envs:
            envs.make(plan.peers, console.print)
        for peer in plan.peers:
            envs.python(peer)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task("loading", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(shown, description=what, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"{done}/{total} {what}")

        result = measure(plan, rounds=rounds, output=output, envs=envs, resume=resume, tell=tell)
    shown_on = console if console.is_terminal else Console(width=WIDE)
    shown_on.print(table(result))
    picture = output.with_suffix(".png")
    plot(result, picture)
    console.print(f"saved {output} and {picture}")


def _leave(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def table(result: dict[str, Any]) -> Table:
    """One line per row; in brackets how many times better we are than that column."""
    m = result["machine"]
    present = [c for c in COLUMNS if any(c in row["columns"] for row in result["rows"])]
    shown = Table(
        title=f"{result['plan']['base']} {result['dtype']}, {m['cpu']}, {m['threads']} threads, medians of "
        f"{result['rounds']} rounds",
        caption="in brackets: how many times better Loquetier is; best possible: by measured bandwidth and GEMM rate",
    )
    for column in ("", *present, "best possible", "target"):
        shown.add_column(column, justify="left" if not column else "right")
    for row in result["rows"]:
        cells = [cell(row, column) for column in present]
        shown.add_row(f"{row['title']}, {row['unit']}", *cells, best(row), targets(row))
    return shown


def cell(row: dict[str, Any], column: str) -> str:
    """A column's median, its spread for ours, and the ratio for the others."""
    found = row["columns"].get(column)
    if found is None:
        return ""
    value = number(found["median"])
    if column == OURS:
        return value if found["rounds"] == 1 else f"{value} ({number(found['low'])}-{number(found['high'])})"
    ratio = row["ratios"].get(column)
    return value if ratio is None else f"{value} ({ratio['median']:.2f}x)"


def best(row: dict[str, Any]) -> str:
    """The roofline, and our share of it."""
    return "" if row["roofline"] is None else f"{number(row['roofline'])} ({100 * row['share_of_roofline']:.0f} %)"


def targets(row: dict[str, Any]) -> str:
    """Every goal and whether it is met."""
    return ", ".join(_target(goal, row["unit"]) for goal in row["goals"])


def _target(goal: dict[str, Any], unit: str) -> str:
    sign, limit = (">=", goal["at_least"]) if goal["at_least"] is not None else ("<=", goal["at_most"])
    of = f"{limit:g}x {goal['against']}" if goal["against"] else f"{limit:g}{'' if unit == 'x' else ' '}{unit}"
    return f"{sign} {of} {'met' if goal['met'] else 'MISSED'}"


def number(value: float) -> str:
    """Three digits that matter, thousands in full."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
