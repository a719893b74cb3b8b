"""Who goes first, who gives way and how much training fits. Pure functions: no state, no clock, no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from loquetier.config import EngineConfig
from loquetier.engine.cost import StepCostModel, StepFeatures
from loquetier.engine.rows import REPLAY_COST, Sequence, TapeKind, TrainItem, cut_rows

ALL_UNITS = 1 << 30
"""More units than any tape has."""
MAX_STEPS_WITHOUT_TRAINING = 8
"""Minimum progress: work that waits is given one unit (or one item) at least every ninth step, whatever the
step time budget says. Serving that uses up the whole budget would otherwise stop training for ever."""
MIN_WINDOW_ROWS = 64
"""Rows of a forward's window that runs as minimum progress: all layers on 64 rows are about the work of one unit."""
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
    open_forward: tuple[TrainItem, ...] = ()
    """Rows of the open replay tape whose forward is still to come, in row order. Its units wait for them."""
    can_replay: bool = True
    """False for a base that the replay tape cannot run: everything goes on graph tapes, in one step's forward."""
    graph_bytes: Callable[[int], int] | None = None
    """Bytes of `train_memory` that training takes with a graph tape of so many TRAIN rows, the jobs' state included;
    None = unknown, memory does not decide."""


@dataclass(frozen=True, slots=True)
class TrainShare:
    """What training gets of a step."""

    items: tuple[TrainItem, ...] = ()
    """Whole items that a tape is opened for, in the order of their turns."""
    rows: tuple[TrainItem, ...] = ()
    """The step's TRAIN rows in row order: all of `items`, their first rows, or the next rows of the open tape."""
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


def row_order(items: Iterable[TrainItem]) -> tuple[TrainItem, ...]:
    """Items as their rows lie in a step or on a tape: by slot, so that an adapter's rows are contiguous."""
    return tuple(sorted(items, key=lambda item: (item.slot, item.job_id, item.item_id)))


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
    def serving_rows(self) -> int:
        """Rows of requests in the step."""
        return self.load.prefill_rows + self.load.decode_rows

    def with_train(self, rows: Iterable[TrainItem]) -> StepFeatures:
        """The load and these TRAIN rows."""
        rows = tuple(rows)
        seen = sum(item.num_rows * item.start for item in rows)
        count = sum(item.num_rows for item in rows)
        return replace(self.load, train_rows=count, kv_tokens=self.load.kv_tokens + seen)

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
    """Which TRAIN rows run and how many backward units, given what serving already has of the step.

    - The tape is chosen with the items: `tape_for`.
    - An open tape is finished before another is opened: items only when nothing of it is left.
    - No request running or waiting: up to `max_train_rows` rows, and every unit.
    - Traffic, no step time budget (or a cost model without data): up to `max_train_rows` rows and
      `backward_units_while_serving` units.
    - Traffic and a step time budget: what the cost model says still fits, forward before backward.
    - Minimum progress: after `MAX_STEPS_WITHOUT_TRAINING` steps with nothing, one item (of a replay tape
      `MIN_WINDOW_ROWS` rows) or one unit regardless.
    - The replay tape's forward is spread over steps, by windows of rows within those limits; its units come after the
      last. With tape="auto" an item too long for a step with traffic goes on it.
    - On the graph tape the item whose turn it is, when it is too long for what is left, runs as the only one: at once
      when no serving row is in the step, or when only `max_train_rows` is in its way; else as minimum progress. So an
      item longer than `max_rows` does run, and the step exceeds `max_rows` by at most that item.

    Args:
        items: TRAIN items that wait.
        room: what of the step is free; its load is the serving rows.
        open_units: units left of the open tape; 0 = none is open, or it has none.
        limits: what the engine knows of its tapes.
    """
    limits = limits or TrainLimits()
    if open_units or limits.open_forward:
        todo, units = limits.open_forward, open_units
        share = TrainShare(rows=forward_window(todo, room), tape="replay", unit_rows=limits.open_tape_rows)
    else:
        share = _opened(items, room, limits)
        todo, units = row_order(share.items), _units_of(share, room, limits)
    if share.rows != todo:
        return share  # units begin when the forward is complete
    return replace(share, backward_units=_units_that_run(share, units, room))


def forward_window(left: tuple[TrainItem, ...], room: StepRoom) -> tuple[TrainItem, ...]:
    """The next rows of a replay tape's forward that this step takes, of those that are `left`; may be none.

    As many as `max_train_rows`, `max_rows` and, under traffic, the step time budget leave. When that is none:
    `MIN_WINDOW_ROWS` in a step without serving rows, or when the minimum progress is due.
    """
    total = sum(item.num_rows for item in left)
    most = max(0, min(total, room.row_budget))
    fit = room.largest_that_fits(lambda n: room.with_train(cut_rows(left, 0, n)), most)
    rows = most if fit is None else fit
    if rows == 0 and (room.is_overdue or room.serving_rows == 0):
        rows = MIN_WINDOW_ROWS
    return cut_rows(left, 0, rows)


def _opened(items: SequenceOf[TrainItem], room: StepRoom, limits: TrainLimits) -> TrainShare:
    """A new tape, without its units."""
    taken, tape = _items_to_open(items, room, limits)
    todo = row_order(taken)
    rows = forward_window(todo, room) if tape == "replay" else todo
    if not rows:
        return TrainShare()
    count = sum(item.num_rows for item in todo)
    if rows == todo:
        tape = tape_for(count, room, limits)  # no window was needed after all
    return TrainShare(taken, rows, 0, tape, unit_rows(tape, count, room.config.train_window))


def _units_of(share: TrainShare, room: StepRoom, limits: TrainLimits) -> int:
    rows = sum(item.num_rows for item in share.items)
    windows = -(-rows // room.config.train_window) if share.tape == "replay" else 1
    return limits.units_per_tape * windows if share.items else 0


def _units_that_run(share: TrainShare, units: int, room: StepRoom) -> int:
    if not room.has_traffic or units == 0:
        return units
    load, allowed = room.with_train(share.rows), None
    if share.unit_rows:
        allowed = room.largest_that_fits(lambda n: replace(load, backward_rows=n * share.unit_rows), units)
    if allowed is None:
        return min(units, room.config.backward_units_while_serving)
    return 1 if allowed == 0 and not share.rows and room.is_overdue else allowed


def tape_for(rows: int, room: StepRoom, limits: TrainLimits) -> TapeKind:
    """The tape for a forward with so many TRAIN rows.

    What the settings name; with "auto" the graph tape, which is faster, unless it would take more than `train_memory`,
    or one of its units (a layer over all rows) alone would break the step time budget of the traffic.
    """
    config = room.config
    if config.tape != "auto":
        return config.tape
    if not limits.can_replay:
        return "graph"
    limit = config.train_memory
    if limit is not None and limits.graph_bytes is not None and limits.graph_bytes(rows) > limit:
        return "replay"
    if room.budget is None or rows <= config.train_window:
        return "graph"
    seconds = room.cost.predict(replace(room.load, backward_rows=rows))
    return "replay" if seconds is not None and seconds > room.budget else "graph"


def unit_rows(tape: TapeKind, rows: int, window: int) -> int:
    """Work of one unit of a tape of so many TRAIN rows, in rows going backward through one layer of a graph tape."""
    return rows if tape == "graph" else REPLAY_COST * min(window, rows)


def _items_to_open(
    items: SequenceOf[TrainItem], room: StepRoom, limits: TrainLimits
) -> tuple[tuple[TrainItem, ...], TapeKind]:
    """Items for a new tape, which is to be cut into windows if it is a replay tape."""
    if not items:
        return (), "graph"
    config = room.config
    fit = room.largest_that_fits(lambda n: replace(room.load, train_rows=n), room.row_budget)
    most = room.row_budget if fit is None or config.tape == "replay" else fit
    taken = interleave_jobs(items, most, room.after_job)
    if taken:
        return taken, tape_for(sum(item.num_rows for item in taken), room, limits)
    first = _first_turn(items, room.after_job)
    if room.has_traffic and limits.can_replay and config.tape != "graph":
        return (first,), "replay"
    only_its_limit = fit is None and first.num_rows <= room.rows_left
    if room.is_overdue or only_its_limit or room.serving_rows == 0:
        return (first,), tape_for(first.num_rows, room, limits)
    return (), "graph"


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
