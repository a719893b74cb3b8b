"""Who goes first, who gives way and how much training fits. Pure functions: no state, no clock, no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from loquetier.config import EngineConfig
from loquetier.engine.cost import StepCostModel, StepFeatures
from loquetier.engine.rows import REPLAY_COST, Sequence, TapeKind, TrainItem

ALL_UNITS = 1 << 30
"""More units than any tape has."""
MAX_STEPS_WITHOUT_TRAINING = 8
"""Minimum progress: work that waits is given one unit (or one item) at least every ninth step, whatever the
step time budget says. Serving that uses up the whole budget would otherwise stop training for ever."""
MAX_RESERVED_PAGES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainLimits:
    """What the engine knows of its tapes and the scheduler does not."""

    units_per_tape: int = ALL_UNITS
    """Units that a graph tape opened by this step's TRAIN rows would have: the layers. A replay tape has as many for
    each of its windows."""
    open_tape_rows: int = 0
    """Rows that a unit of the open tape costs (`unit_rows`); 0 = none is open, or unknown (then units follow the
    fixed limit)."""
    graph_row_bytes: int = 0
    """Bytes that a graph tape keeps per TRAIN row; 0 = unknown, memory does not decide."""


@dataclass(frozen=True, slots=True)
class TrainShare:
    """What training gets of a step."""

    items: tuple[TrainItem, ...] = ()
    """In the order of their turns."""
    backward_units: int = 0
    tape: TapeKind = "graph"
    """The tape that `items` open."""
    unit_rows: int = 0
    """Rows that each of `backward_units` costs."""


def admission_order(seq: Sequence) -> tuple[int, int]:
    """Sort key of sequences: lower priority number first, then arrival."""
    return (seq.priority, seq.seq_id)


def preemption_victim(running: Iterable[Sequence]) -> Sequence:
    """The sequence that gives up its pages: the last one in admission order. `running` is not empty."""
    return max(running, key=admission_order)


def reserved_pages(num_running: int) -> int:
    """Pages that must stay free after a sequence is admitted: one per sequence already running, at most 8.

    Each running sequence will soon cross a page border. Without the reserve the newcomer's pages are taken
    back a few steps later and its whole prefill is lost. With nothing running the reserve is 0.
    """
    return min(MAX_RESERVED_PAGES, num_running)


def interleave_jobs(
    items: SequenceOf[TrainItem], row_budget: int, after_job: int | None = None
) -> tuple[TrainItem, ...]:
    """Take whole items, one job after the other in turn, until the next one does not fit.

    Jobs take turns in cyclic order of their ids, items of one job keep their order. The walk ends at the
    first item that does not fit instead of trying a smaller one, so that a long item is never overtaken for ever.

    Args:
        items: what the jobs want computed.
        row_budget: most rows of the answer together.
        after_job: the job that had the last turn in an earlier step; the turn after it begins. None = the lowest id.
    """
    queues: dict[int, deque[TrainItem]] = {}
    for item in items:
        queues.setdefault(item.job_id, deque()).append(item)
    turns = deque(sorted(queues, key=lambda job: (after_job is not None and job <= after_job, job)))
    taken: list[TrainItem] = []
    while turns and queues[turns[0]][0].num_rows <= row_budget:
        job = turns.popleft()
        item = queues[job].popleft()
        taken.append(item)
        row_budget -= item.num_rows
        if queues[job]:
            turns.append(job)
    return tuple(taken)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRoom:
    """What of a step is still free, as seen by the policies for TRAIN and EVAL items."""

    config: EngineConfig
    cost: StepCostModel
    load: StepFeatures
    """What is planned already."""
    has_traffic: bool
    """A request is running or waiting."""
    rows_left: int
    """`max_rows` less the rows planned; negative when a lone item exceeds it."""
    steps_without: int = 0
    """Steps in a row in which this kind of work waited and got nothing."""
    after_job: int | None = None
    """See `interleave_jobs`."""

    @property
    def row_budget(self) -> int:
        """Most rows by the fixed limits."""
        return min(self.config.max_train_rows, self.rows_left)

    @property
    def budget(self) -> float | None:
        """Seconds the step may take, if that counts now."""
        return self.config.step_time_budget if self.has_traffic else None

    @property
    def is_overdue(self) -> bool:
        """True when the minimum progress is due."""
        return self.steps_without >= MAX_STEPS_WITHOUT_TRAINING

    def largest_that_fits(self, features_of: Callable[[int], StepFeatures], most: int) -> int | None:
        """Largest n in 0..most whose predicted step stays within the time budget.

        None when no budget counts or the model cannot tell: the fixed limits hold then. Bisection is right
        because the model's coefficients are >= 0: time grows with n.
        """
        if self.budget is None or self.cost.predict(features_of(max(0, most))) is None:
            return None
        low, high = 0, max(0, most)
        while low < high:
            middle = (low + high + 1) // 2
            seconds = self.cost.predict(features_of(middle))
            if seconds is not None and seconds <= self.budget:
                low = middle
            else:
                high = middle - 1
        return low


def training_share(
    items: SequenceOf[TrainItem], room: StepRoom, open_units: int = 0, limits: TrainLimits | None = None
) -> TrainShare:
    """Which TRAIN items start and how many backward units run, given what serving already has of the step.

    - The tape is chosen with the items: `tape_for`.
    - An open tape is finished before another is opened: items only when ``open_units == 0``.
    - No request running or waiting: up to `max_train_rows` rows, and every unit.
    - Traffic, no step time budget (or a cost model without data): up to `max_train_rows` rows and
      `backward_units_while_serving` units.
    - Traffic and a step time budget: what the cost model says still fits, forward before backward.
    - Minimum progress: after `MAX_STEPS_WITHOUT_TRAINING` steps with nothing, one item or one unit regardless.
    - The item whose turn it is, when it is too long for what is left, runs as the only one: at once when no
      serving row is in the step, or when only `max_train_rows` is in its way; else as minimum progress. So an item
      longer than `max_rows` does run, and the step exceeds `max_rows` by at most that item.

    Args:
        items: TRAIN items that wait.
        room: what of the step is free; its load is the serving rows.
        open_units: units left of the open tape; 0 = none is open.
        limits: what the engine knows of its tapes.
    """
    limits = limits or TrainLimits()
    chosen = () if open_units else _items_to_open(items, room)
    units = open_units or (limits.units_per_tape if chosen else 0)
    rows = sum(item.num_rows for item in chosen)
    tape = tape_for(rows, room, limits)
    tape_rows = unit_rows(tape, rows, room.config.train_window) if chosen else limits.open_tape_rows
    if chosen and tape == "replay":
        units *= -(-rows // room.config.train_window)
    if not room.has_traffic or units == 0:
        return TrainShare(chosen, units, tape, tape_rows)
    load = replace(room.load, train_rows=rows)
    allowed = room.largest_that_fits(lambda n: replace(load, backward_rows=n * tape_rows), units) if tape_rows else None
    if allowed is None:
        allowed = min(units, room.config.backward_units_while_serving)
    if allowed == 0 and not chosen and room.is_overdue:
        allowed = 1
    return TrainShare(chosen, allowed, tape, tape_rows)


def tape_for(rows: int, room: StepRoom, limits: TrainLimits) -> TapeKind:
    """The tape for a forward with so many TRAIN rows.

    What the settings name; with "auto" the graph tape, which is faster, unless it would take more than `train_memory`,
    or one of its units (a layer over all rows) alone would break the step time budget of the traffic.
    """
    config = room.config
    if config.tape != "auto":
        return config.tape
    if config.train_memory is not None and rows * limits.graph_row_bytes > config.train_memory:
        return "replay"
    if room.budget is None or rows <= config.train_window:
        return "graph"
    seconds = room.cost.predict(replace(room.load, backward_rows=rows))
    return "replay" if seconds is not None and seconds > room.budget else "graph"


def unit_rows(tape: TapeKind, rows: int, window: int) -> int:
    """Work of one unit of a tape of so many TRAIN rows, in rows going backward through one layer of a graph tape."""
    return rows if tape == "graph" else REPLAY_COST * min(window, rows)


def _items_to_open(items: SequenceOf[TrainItem], room: StepRoom) -> tuple[TrainItem, ...]:
    if not items:
        return ()
    fit = room.largest_that_fits(lambda n: replace(room.load, train_rows=n), room.row_budget)
    taken = interleave_jobs(items, room.row_budget if fit is None else fit, room.after_job)
    if taken:
        return taken
    first = _first_turn(items, room.after_job)
    only_its_limit = fit is None and first.num_rows <= room.rows_left
    serving_rows = room.load.prefill_rows + room.load.decode_rows
    return (first,) if room.is_overdue or only_its_limit or serving_rows == 0 else ()


def evaluation_share(items: SequenceOf[TrainItem], room: StepRoom) -> tuple[TrainItem, ...]:
    """EVAL items for what serving and training left of the step, in the order of their turns.

    Up to `max_train_rows` rows, and within the step time budget under traffic. The item whose turn it is, when
    too long for what is left, runs as the only EVAL item in a step that is empty otherwise, or as minimum
    progress, but never on top of a TRAIN item that already exceeds `max_rows`.

    Args:
        items: EVAL items that wait.
        room: what of the step is free; its load includes the TRAIN rows and backward units.
    """
    if not items or room.rows_left < 0:
        return ()
    load = room.load
    fit = room.largest_that_fits(lambda n: replace(load, prefill_rows=load.prefill_rows + n), room.row_budget)
    taken = interleave_jobs(items, room.row_budget if fit is None else fit, room.after_job)
    if taken:
        return taken
    step_is_empty = room.rows_left == room.config.max_rows
    return (_first_turn(items, room.after_job),) if room.is_overdue or step_is_empty else ()


def _first_turn(items: SequenceOf[TrainItem], after_job: int | None) -> TrainItem:
    return interleave_jobs(items, max(item.num_rows for item in items), after_job)[0]
