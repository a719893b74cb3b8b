"""Jobs, events and adapters of a server for people: tables and lines."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loquetier.cli_client import printable

_NEVER_CUT = 10_000
"""Columns."""
_PADDING = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$")
"""Spaces at a line's end, which would wrap into empty lines; escape codes behind them stay."""
_COLORS = {
    "succeeded": "green",
    "running": "cyan",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
    "error": "red",
    "warn": "yellow",
}
_DETAILS = (
    "id", "status", "reason", "position", "model", "fine_tuned_model", "live_model", "training_file",
    "validation_file", "trained_tokens", "seed", "error", "created_at", "finished_at", "estimated_finish",
    "result_files", "metadata", "method", "training", "lora",
)  # fmt: skip


def console() -> Console:
    """Where answers go; colors only on a terminal."""
    return Console(highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """One line per row, however narrow the terminal: an id or a name that is cut off cannot be copied."""
    wide = Console(highlight=False, soft_wrap=True, width=_NEVER_CUT)
    with wide.capture() as printed:
        wide.print(table)
    for line in printed.get().splitlines():
        print(_PADDING.sub(r"\1", line))


def when(seconds: Any) -> str:
    """Unix seconds as local time; "" for none."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        return ""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def colored(value: Any) -> Text:
    """A state or level."""
    text = printable(str(value))
    return Text(text, style=_COLORS.get(text, ""))


def job_table(jobs: list[dict[str, Any]]) -> Table:
    """One line for each job."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("job", "status", "model", "created", "trained tokens"):
        table.add_column(name)
    for job in jobs:
        model = job.get("fine_tuned_model") or job.get("live_model") or job.get("model")
        tokens = job.get("trained_tokens")
        table.add_row(
            Text(printable(str(job.get("id")))),
            colored(job.get("status")),
            Text(printable(str(model))),
            when(job.get("created_at")),
            "" if tokens is None else str(tokens),
        )
    return table


def job_details(job: dict[str, Any]) -> Table:
    """Everything the server says of a job that is not empty."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in _DETAILS:
        value = job.get(name)
        if value in (None, [], {}):
            continue
        if name == "status":
            shown = colored(value)
        elif name in ("created_at", "finished_at", "estimated_finish"):
            shown = Text(when(value))
        elif isinstance(value, (dict, list)):
            shown = Text(printable(json.dumps(value, ensure_ascii=False)))
        else:
            shown = Text(printable(str(value)))
        table.add_row(Text(name.replace("_", " "), style="bold"), shown)
    return table


def event_line(event: dict[str, Any]) -> Text:
    """When, and what."""
    level, line = str(event.get("level", "info")), Text(when(event.get("created_at")) + "  ", style="dim")
    if level != "info":
        line.append(f"{printable(level)}: ", style=_COLORS.get(level, ""))
    line.append(printable(str(event.get("message", ""))), style="")
    return line


def adapter_table(versions: list[dict[str, Any]]) -> Table:
    """One line for each version, in the order of names and numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    columns = ("version", "live", "resident", "method", "r", "bytes", "running")
    for name in columns:
        table.add_column(name)
    for one in sorted(versions, key=lambda v: (str(v.get("lora_name")), v.get("version") or 0)):
        marks = ["yes" if one.get(name) else "-" for name in columns[1:3]]
        rest = [one.get(name) for name in columns[3:]]
        cells = [str(one.get("id")), *marks, *("" if value is None else str(value) for value in rest)]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
