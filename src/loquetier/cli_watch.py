"""Following a job: its events as they come, by the server's stream where it has one, else by asking again and again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from loquetier.cli_client import Api, ServerUnreachableError, printable
from loquetier.cli_jobs import FINAL, job_path, newest_first
from loquetier.cli_view import colored, event_line

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 120.0
"""A server that restarts goes on with its jobs: so long it may be away before watching ends."""
_STEP = re.compile(r"Step (\d+)/(\d+)")

Seen = dict[str, Any]
"""An event, or the job itself when something of it has changed."""


def follow(api: Api, job: str, sleep: Callable[[float], None] = time.sleep) -> Iterator[Seen]:
    """The job, then its events from the first on, each once, and the job again when it has ended.

    Raises:
        ServerRefusedError: there is no such job, say. ServerUnreachableError: for longer than `PATIENCE_SECONDS`.
    """
    known: set[str] = set()
    yield api.get(job_path(job))
    waited = 0.0
    while True:
        try:
            # Asked for before the events: whatever happened until its end is then among them.
            found = api.get(job_path(job))
            yield from _new_events(api, job, known)
            waited = 0.0
            if found.get("status") in FINAL:
                yield found
                return
            with closing(_live_events(api, job, known)) as live:
                yield from live
        except ServerUnreachableError:
            if waited >= PATIENCE_SECONDS:
                raise
        sleep(POLL_SECONDS)
        waited += POLL_SECONDS


def _new_events(api: Api, job: str, known: set[str]) -> list[Seen]:
    """Events that are not known yet, oldest first; they are then."""
    found: list[Seen] = []
    for event in newest_first(api, f"{job_path(job)}/events"):
        if event["id"] in known:
            break
        found.append(event)
    known.update(event["id"] for event in found)
    return found[::-1]


def _live_events(api: Api, job: str, known: set[str]) -> Generator[Seen, None, None]:
    """Events from the server's stream until it ends; nothing where there is no stream."""
    with api.events(f"{job_path(job)}/events?stream=true") as stream:
        for event in stream or ():
            if event.get("object") == "fine_tuning.job.event" and event["id"] not in known:
                known.add(event["id"])
                yield event


@dataclass(slots=True)
class _View:
    """What is shown: messages as lines, steps as a bar (as lines too where there is no terminal)."""

    console: Console
    bar: Progress
    task: TaskID | None = field(default=None)

    def show(self, seen: Seen) -> None:
        if seen.get("object") != "fine_tuning.job.event":
            return
        step = _STEP.search(str(seen.get("message", "")))
        if step is not None and self.console.is_terminal:
            self._advance(int(step[1]), int(step[2]), seen.get("data") or {})
        else:
            self.console.print(event_line(seen))

    def _advance(self, step: int, total: int, data: dict[str, Any]) -> None:
        loss = data.get("train_loss")
        text = f"loss {loss:.4f}" if isinstance(loss, (int, float)) else ""
        if self.task is None:
            self.task = self.bar.add_task("training", total=total, loss=text)
        self.bar.update(self.task, completed=step, total=total, loss=text)


def show_progress(seen: Iterator[Seen], console: Console) -> Seen:
    """Show what `follow` tells; returns the job as it ended."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    last: Seen = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        view = _View(console, bar)
        for one in seen:
            view.show(one)
            if one.get("object") != "fine_tuning.job.event":
                last = one
    console.print(colored(last.get("status")), printable(str(last.get("fine_tuned_model") or "")), sep="  ")
    error = last.get("error") or {}
    if error.get("message"):
        console.print(printable(f"{error.get('code')}: {error['message']}"), style="red", markup=False)
    return last
