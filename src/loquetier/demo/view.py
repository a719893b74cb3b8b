"""The demo as it runs: a live screen on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loquetier.demo.state import DemoState, StreamState, rates

_BARS = "▁▂▃▄▅▆▇█"
_COLORS = ("yellow", "magenta", "cyan")
_WINDOW = 10.0
"""Seconds over which the shown tokens per second are taken."""
_TEXT_LINES = 5
_PANEL_LINES = 12
"""Both rows of panels together fit a terminal of 24 lines."""


def sparkline(values: list[float], width: int) -> str:
    """The values as a row of bars, the highest one full; means of neighbours if there are more than `width`. Pure."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    top = max(means) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(mean / top * len(_BARS)))] for mean in means)


class LiveView:
    """A screen of panels, redrawn in place. Use it as a context."""

    refresh_every = 0.25
    """Seconds."""

    def __init__(self, state: DemoState, console: Console) -> None:
        self._state, self._console = state, console
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def refresh(self) -> None:
        """Redraw."""
        with self._state.lock:
            screen = render(self._state, self._console.width)
        self._live.update(screen, refresh=True)


class PlainView:
    """Lines of text, for a log file or CI. Use it as a context."""

    refresh_every = 5.0
    """Seconds."""

    def __init__(self, state: DemoState, console: Console) -> None:
        self._state, self._console = state, console

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def refresh(self) -> None:
        """Print where things are."""
        with self._state.lock:
            line = plain_line(self._state)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def plain_line(state: DemoState) -> str:
    """One line of everything that moves."""
    _, served, trained = rates(state.samples[-40:], _WINDOW)
    loss = f"loss {state.steps[-1].loss:.3f}" if state.steps else "no loss yet"
    counts = ", ".join(f"{s.model} {s.answered}" for s in state.streams)
    live = state.live_answers[-1] if state.live_answers else None
    return (
        f"[{state.seconds:4.0f} s] step {len(state.steps)}/{state.total_steps} {loss} | "
        f"tokens/s {_last(served):.0f} generated, {_last(trained):.0f} trained | "
        f"mixed steps {state.stats.totals.mixed_steps if state.stats else 0} | answered: {counts}"
        + (f" | {live.version}: {live.text!r}" if live else "")
    )


def render(state: DemoState, width: int) -> RenderableType:
    """The whole screen."""
    column = max(24, (width - 4) // len(state.streams))
    streams = [_stream_panel(stream, color, column) for stream, color in zip(state.streams, _COLORS, strict=True)]
    bottom = Table.grid(expand=True, padding=0)
    bottom.add_column(ratio=3)
    bottom.add_column(ratio=2)
    bottom.add_row(_training_panel(state, width * 3 // 5 - 6), _engine_panel(state))
    return Group(Columns(streams, padding=(0, 0)), bottom)


def _stream_panel(stream: StreamState, color: str, width: int) -> Panel:
    rate = stream.num_tokens / (stream.seconds or time.monotonic() - stream.began) if stream.began else 0.0
    body = Text(f"{stream.question}\n", style="dim", overflow="fold")
    body.append(_tail(stream.text, (width - 4) * (_TEXT_LINES - 1)), style=color)
    return Panel(
        body,
        title=f"[bold {color}]{stream.version or stream.model}",
        subtitle=f"{stream.answered} answered, {rate:.1f} tokens/s",
        border_style=color,
        width=width,
        height=_TEXT_LINES + 3,
    )


def _tail(text: str, room: int) -> str:
    return text if len(text) <= room else f"...{text[-room + 3 :]}"


def _training_panel(state: DemoState, width: int) -> Panel:
    done = len(state.steps)
    body = Text()
    filled = width * done // state.total_steps
    body.append("━" * filled, style="bold green").append("━" * (width - filled), style="dim")
    body.append(f"\nstep {done}/{state.total_steps}")
    if state.steps:
        step = state.steps[-1]
        body.append(f"   loss {step.loss:.4f}   lr {step.learning_rate:.1e}")
        body.append(f"   held out {state.held_out[-1][1]:.4f}\n" if state.held_out else "\n")
        body.append(sparkline([record.loss for record in state.steps], width), style="green")
    body.append(f"\n\nheld out: {state.live_question}\n", style="dim")
    for answer in _milestones(state, width - 16):
        body.append(f"{answer[0]:>14} ", style="dim").append(f"{answer[1]}\n")
    body.append(f"{state.live_version:>14} ", style="bold green").append(_one_line(state.live_text, width - 16))
    return Panel(
        body,
        title=f"[bold green]orders, in training and answering, {state.seconds:.0f} s",
        border_style="green",
        height=_PANEL_LINES,
    )


def _milestones(state: DemoState, room: int) -> list[tuple[str, str]]:
    """The first answer and the last three that differ from the one before: how the adapter got there."""
    changed = [a for i, a in enumerate(state.live_answers) if i == 0 or a.text != state.live_answers[i - 1].text]
    shown = changed if len(changed) <= 4 else [changed[0], *changed[-3:]]
    return [(answer.version, _one_line(answer.text, room)) for answer in shown]


def _one_line(text: str, room: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= room else f"{flat[: room - 3]}..."


def _engine_panel(state: DemoState) -> Panel:
    _, served, trained = rates(state.samples[-40:], _WINDOW)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("tokens/s generated", f"{_last(served):.1f}")
    table.add_row("tokens/s trained", f"{_last(trained):.1f}")
    stats = state.stats
    if stats is not None:
        totals = stats.totals
        publish = stats.publish_seconds / stats.publishes * 1000 if stats.publishes else None
        table.add_row("steps", f"{totals.steps}")
        table.add_row("  forward of both kinds", f"[bold]{totals.mixed_steps}")
        table.add_row("rows: decode", f"{totals.decode_rows}")
        table.add_row("rows: prefill", f"{totals.prefill_rows}")
        table.add_row("rows: train", f"{totals.train_rows}")
        table.add_row("backward units", f"{totals.backward_units}")
        table.add_row("publish, mean", "-" if publish is None else f"{publish:.1f} ms")
    return Panel(table, title="[bold]engine, one forward pass for all", height=_PANEL_LINES)


def _last(values: list[float]) -> float:
    return values[-1] if values else 0.0
