"""The policies are pure functions: fairness between jobs, who gives way, how much training fits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquetier.config import EngineConfig
from loquetier.engine.cost import MIN_SEEN, StepCostModel, StepFeatures
from loquetier.engine.policy import (
    MAX_STEPS_WITHOUT_TRAINING,
    MIN_WINDOW_ROWS,
    StepRoom,
    TrainLimits,
    admission_order,
    evaluation_share,
    interleave_jobs,
    preemption_victim,
    reserved_pages,
    tape_for,
    training_share,
)
from loquetier.engine.rows import REPLAY_COST, Sequence, TrainItem, cut_rows
from loquetier.errors import ConfigError


def items_of(job: int, *rows: int) -> list[TrainItem]:
    return [TrainItem(job, i, n, slot=job) for i, n in enumerate(rows)]


def ids(items: tuple[TrainItem, ...]) -> list[tuple[int, int]]:
    return [(item.job_id, item.item_id) for item in items]


def sequence(seq_id: int, priority: int = 0) -> Sequence:
    return Sequence(seq_id=seq_id, tokens=[1], prompt_len=1, max_total_len=2, priority=priority)


def linear_cost() -> StepCostModel:
    """1 ms per step, 1 ms per decode row, 1 ms per 10 prefill or train rows, 1 ms per 100 backward rows."""
    model = StepCostModel()
    for _ in range(40 * MIN_SEEN):
        for f, seconds in (
            (StepFeatures(decode_rows=9), 0.010),
            (StepFeatures(decode_rows=1), 0.002),
            (StepFeatures(prefill_rows=90), 0.010),
            (StepFeatures(train_rows=90), 0.010),
            (StepFeatures(backward_rows=900), 0.010),
        ):
            model.observe(f, seconds)
    return model


COST = linear_cost()


def room(
    *,
    budget: float | None = None,
    cost: StepCostModel | None = None,
    decode: int = 4,
    traffic: bool = True,
    max_rows: int = 200,
    max_train_rows: int = 100,
    steps_without: int = 0,
    **more: Any,
) -> StepRoom:
    config = EngineConfig(
        max_rows=max_rows,
        max_train_rows=max_train_rows,
        backward_units_while_serving=3,
        step_time_budget=budget,
        **more,
    )
    return StepRoom(
        config=config,
        cost=cost or StepCostModel(),
        load=StepFeatures(decode_rows=decode),
        has_traffic=traffic,
        rows_left=max_rows - decode,
        steps_without=steps_without,
    )


def test_jobs_take_turns() -> None:
    items = items_of(1, 10, 10, 10) + items_of(2, 10, 10)
    assert ids(interleave_jobs(items, 100)) == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2)]
    assert ids(interleave_jobs(items, 25)) == [(1, 0), (2, 0)]


def test_turns_go_on_where_they_stopped() -> None:
    items = items_of(1, 10, 10) + items_of(2, 10) + items_of(3, 10)
    assert ids(interleave_jobs(items, 20, after_job=1)) == [(2, 0), (3, 0)]
    assert ids(interleave_jobs(items, 20, after_job=3)) == [(1, 0), (2, 0)]
    assert ids(interleave_jobs(items, 20, after_job=7)) == [(1, 0), (2, 0)]


def test_no_job_is_passed_over_when_others_come_and_go() -> None:
    """With one item per step, and jobs 1 and 2 absent in turn, job 3 still gets its turn."""
    last, served = None, []
    for step in range(6):
        present = items_of(2 - step % 2, 10) + items_of(3, 10)
        (taken,) = interleave_jobs(present, 10, last)
        last = taken.job_id
        served.append(last)
    assert served.count(3) >= 2


def test_a_long_item_is_not_overtaken() -> None:
    assert ids(interleave_jobs(items_of(1, 10) + items_of(2, 50) + items_of(3, 10), 40)) == [(1, 0)]


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), max_size=30),
    st.integers(-5, 300),
    st.none() | st.integers(0, 5),
)
def test_interleaving_is_fair_and_within_budget(
    wanted: list[tuple[int, int]], row_budget: int, after_job: int | None
) -> None:
    items = [TrainItem(job, i, n, slot=0) for i, (job, n) in enumerate(wanted)]
    taken = interleave_jobs(items, row_budget, after_job)
    assert sum(item.num_rows for item in taken) <= max(0, row_budget)
    for job in {item.job_id for item in items}:
        mine = [item for item in taken if item.job_id == job]
        assert mine == [item for item in items if item.job_id == job][: len(mine)]
    # No job is two turns ahead of one that still has items.
    turns = {item.job_id: sum(t.job_id == item.job_id for t in taken) for item in items}
    for job, count in turns.items():
        if count < sum(item.job_id == job for item in items):
            assert max(turns.values()) <= count + 1


def test_order_is_priority_then_arrival_and_the_last_gives_way() -> None:
    seqs = [sequence(3), sequence(1, priority=1), sequence(2), sequence(4, priority=-1)]
    assert [s.seq_id for s in sorted(seqs, key=admission_order)] == [4, 2, 3, 1]
    assert preemption_victim(seqs).seq_id == 1


def test_reserve_grows_with_the_running_up_to_a_cap() -> None:
    assert [reserved_pages(n) for n in (0, 1, 8, 100)] == [0, 1, 8, 8]


def test_without_traffic_training_takes_everything() -> None:
    share = training_share(
        items_of(1, 40, 40, 40), room(traffic=False, decode=0), limits=TrainLimits(units_per_tape=30)
    )
    assert ids(share.items) == [(1, 0), (1, 1)]
    assert share.backward_units == 30
    assert training_share([], room(traffic=False, decode=0), open_units=17).backward_units == 17


def test_under_traffic_the_fixed_limits_hold() -> None:
    share = training_share(items_of(1, 40, 40, 40), room(), limits=TrainLimits(units_per_tape=30))
    assert len(share.items) == 2 and share.backward_units == 3
    assert training_share([], room(), open_units=2).backward_units == 2


def test_no_second_tape_while_one_is_open() -> None:
    assert training_share(items_of(1, 10), room(), open_units=1).items == ()


def test_nothing_wanted_nothing_given() -> None:
    assert training_share([], room()) == training_share([], room(traffic=False, decode=0))
    assert training_share([], room()).backward_units == 0


def test_an_item_above_the_train_limit_runs_alone() -> None:
    share = training_share(items_of(1, 150, 10), room())
    assert ids(share.items) == [(1, 0)]


@pytest.mark.parametrize(("tape", "can_replay"), [("graph", True), ("auto", False)])
def test_without_windows_an_item_above_max_rows_waits_for_a_quiet_step_but_not_for_ever(
    tape: str, can_replay: bool
) -> None:
    items, limits = items_of(1, 500, 10), TrainLimits(can_replay=can_replay)
    assert training_share(items, room(tape=tape), limits=limits).items == ()
    for due in (room(tape=tape, traffic=False, decode=0), room(tape=tape, steps_without=MAX_STEPS_WITHOUT_TRAINING)):
        share = training_share(items, due, limits=limits)
        assert ids(share.items) == [(1, 0)] and share.rows == share.items and share.tape == "graph"


def test_a_time_budget_without_data_means_the_fixed_limits() -> None:
    share = training_share(items_of(1, 40, 40, 40), room(budget=1e-6), limits=TrainLimits(units_per_tape=30))
    assert len(share.items) == 2 and share.backward_units == 3


def test_training_rows_fill_the_time_budget() -> None:
    # 1 ms + 4 decode rows = 5 ms; 5 more ms hold 50 train rows, so two items of 20 (and 1 ms of backward: 100
    # rows = 2 units of the new tape's 40 rows). The 0.1 ms of slack is for the model's fit.
    share = training_share(
        items_of(1, 20, 20, 20), room(budget=0.0101, cost=COST), limits=TrainLimits(units_per_tape=30)
    )
    assert len(share.items) == 2
    assert share.backward_units == 2


def test_units_of_an_open_tape_fill_the_time_budget_beyond_the_fixed_limit() -> None:
    # 5 ms left hold 500 backward rows: 10 units of 50 rows, where the fixed limit is 3.
    limits = TrainLimits(open_tape_rows=50)
    assert training_share([], room(budget=0.0101, cost=COST), open_units=30, limits=limits).backward_units == 10
    assert training_share([], room(budget=0.0101, cost=COST), open_units=4, limits=limits).backward_units == 4


def test_a_full_step_gives_training_nothing_until_it_is_overdue() -> None:
    limits = TrainLimits(open_tape_rows=50)
    for steps in range(MAX_STEPS_WITHOUT_TRAINING + 1):
        tight = room(budget=0.004, cost=COST, steps_without=steps)
        expected = int(steps == MAX_STEPS_WITHOUT_TRAINING)
        assert training_share([], tight, open_units=30, limits=limits).backward_units == expected
        assert len(training_share(items_of(1, 20, 20), tight).items) == expected


def test_evaluation_fills_what_is_left() -> None:
    assert len(evaluation_share(items_of(1, 40, 40, 40), room())) == 2
    assert evaluation_share(items_of(1, 150), room()) == ()
    assert len(evaluation_share(items_of(1, 150, 10), room(decode=0, traffic=False))) == 1
    assert len(evaluation_share(items_of(1, 20, 20, 20), room(budget=0.0101, cost=COST))) == 2
    assert len(evaluation_share(items_of(1, 150), room(steps_without=MAX_STEPS_WITHOUT_TRAINING))) == 1


def test_evaluation_never_joins_a_step_that_is_too_long_already() -> None:
    assert evaluation_share(items_of(1, 5), room(decode=201, steps_without=MAX_STEPS_WITHOUT_TRAINING)) == ()


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan")])
def test_step_time_budget_is_validated(bad: float) -> None:
    with pytest.raises(ConfigError, match="step_time_budget"):
        EngineConfig(step_time_budget=bad)


# --- windows of a replay tape's forward ---


def test_rows_of_items_laid_end_to_end_are_cut_anywhere() -> None:
    items = (TrainItem(1, 0, 10, slot=0), TrainItem(1, 1, 5, slot=0), TrainItem(2, 0, 7, slot=1))
    assert cut_rows(items, 0, 22) == items
    assert cut_rows(items, 4, 12) == (TrainItem(1, 0, 6, 0, start=4), TrainItem(1, 1, 2, 0, start=0))
    assert cut_rows(cut_rows(items, 4, 22), 8, 12) == (TrainItem(1, 1, 3, 0, start=2), TrainItem(2, 0, 1, 1, start=0))
    assert cut_rows(items, 15, 15) == () == cut_rows((), 0, 5)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.lists(st.integers(1, 40), min_size=1))
def test_windows_in_a_row_are_every_row_once(rows: list[int], widths: list[int]) -> None:
    left: tuple[TrainItem, ...] = tuple(TrainItem(1, i, n, slot=0) for i, n in enumerate(rows))
    seen: list[tuple[int, int]] = []
    for width in itertools.cycle(widths):
        window = cut_rows(left, 0, width)
        seen += [(item.item_id, row) for item in window for row in range(item.start, item.start + item.num_rows)]
        left = cut_rows(left, width, sum(item.num_rows for item in left))
        if not left:
            break
    assert seen == [(i, row) for i, n in enumerate(rows) for row in range(n)]


def test_a_replay_tapes_forward_is_spread_by_the_row_limit() -> None:
    limits = TrainLimits(units_per_tape=30)
    for traffic in (True, False):
        share = training_share(
            items_of(1, 250, 10), room(tape="replay", traffic=traffic, decode=4 * traffic), limits=limits
        )
        assert (ids(share.items), share.tape) == ([(1, 0)], "replay")
        assert share.rows == (TrainItem(1, 0, 100, slot=1),) and share.backward_units == 0
    left = cut_rows(share.items, 200, 250)
    share = training_share(items_of(1, 10), room(tape="replay"), 30, TrainLimits(open_forward=left, open_tape_rows=100))
    assert (share.items, share.rows, share.backward_units) == ((), left, 3)


def test_a_replay_tapes_forward_fills_the_time_budget() -> None:
    # 5 ms are left, 50 rows. Rows of an example that follow others cost what they attend to, too.
    tight = room(budget=0.0101, cost=COST, tape="replay")
    assert sum(i.num_rows for i in training_share(items_of(1, 30, 30, 30), tight).rows) == 50
    slow = StepCostModel()
    for _ in range(40 * MIN_SEEN):
        slow.observe(StepFeatures(decode_rows=4, train_rows=10, kv_tokens=1000), 0.011)
        slow.observe(StepFeatures(decode_rows=4, train_rows=10, kv_tokens=0), 0.001)
        slow.observe(StepFeatures(decode_rows=1), 0.001)
    far = TrainLimits(open_forward=(TrainItem(1, 0, 90, 1, start=300),), open_tape_rows=8)
    near = TrainLimits(open_forward=(TrainItem(1, 0, 90, 1, start=30),), open_tape_rows=8)
    counts = [
        sum(i.num_rows for i in training_share([], room(budget=0.0111, cost=slow, tape="replay"), 3, limits).rows)
        for limits in (far, near)
    ]
    assert counts[0] < 5 < 20 < counts[1]


def test_auto_windows_what_a_step_with_traffic_cannot_hold() -> None:
    items = items_of(1, 500)
    share = training_share(items, room())
    assert (share.tape, sum(i.num_rows for i in share.rows), share.backward_units) == ("replay", 100, 0)
    share = training_share(items, room(budget=0.0101, cost=COST))
    assert (share.tape, sum(i.num_rows for i in share.rows)) == ("replay", 50)
    # Nobody waits for a quiet step: the graph tape, whole, is faster.
    share = training_share(items, room(traffic=False, decode=0))
    assert (share.tape, share.rows) == ("graph", share.items)
    # It fits: no windows, no second forward.
    assert training_share(items_of(1, 40), room(budget=0.0101, cost=COST)).tape == "graph"


def test_minimum_progress_is_a_small_window() -> None:
    for steps in (MAX_STEPS_WITHOUT_TRAINING - 1, MAX_STEPS_WITHOUT_TRAINING):
        full = room(budget=0.004, cost=COST, steps_without=steps, tape="replay")
        due = steps == MAX_STEPS_WITHOUT_TRAINING
        share = training_share(items_of(1, 500), full)
        assert sum(i.num_rows for i in share.rows) == MIN_WINDOW_ROWS * due and bool(share.items) == due
        limits = TrainLimits(open_forward=tuple(items_of(1, 500)), open_tape_rows=50)
        assert sum(i.num_rows for i in training_share([], full, 30, limits).rows) == MIN_WINDOW_ROWS * due
    # More serving rows than the step has room for: the same.
    crowded = room(decode=200, steps_without=MAX_STEPS_WITHOUT_TRAINING)
    assert sum(i.num_rows for i in training_share(items_of(1, 500), crowded).rows) == MIN_WINDOW_ROWS


# --- the tape ---

LAYERS = TrainLimits(units_per_tape=30, graph_bytes=lambda rows: rows * 1 << 20)


def test_the_tape_that_the_settings_name() -> None:
    assert tape_for(10**6, room(tape="graph", train_memory=1 << 20), LAYERS) == "graph"
    assert tape_for(1, room(tape="replay"), LAYERS) == "replay"
    cannot = TrainLimits(units_per_tape=30, graph_bytes=lambda rows: rows << 20, can_replay=False)
    assert tape_for(10**6, room(train_memory=1 << 20), cannot) == "graph"


def test_auto_is_graph_while_it_fits_train_memory() -> None:
    tight = room(train_memory=40 << 20)
    assert [tape_for(rows, tight, LAYERS) for rows in (0, 1, 40, 41)] == ["graph", "graph", "graph", "replay"]
    assert tape_for(10**6, tight, TrainLimits()) == "graph"  # bytes unknown
    assert tape_for(10**6, room(), LAYERS) == "graph"  # no limit given


def test_auto_is_replay_when_one_graph_unit_breaks_the_time_budget() -> None:
    # 10 us per backward row beside 4 decode rows (5 ms): 10.1 ms hold about 500 rows of one layer.
    fast = room(budget=0.0101, cost=COST, train_window=100)
    assert [tape_for(rows, fast, LAYERS) for rows in (90, 400, 600)] == ["graph", "graph", "replay"]
    # Without traffic, without data, or when a window would be no shorter than the tape, the graph tape is the better.
    assert tape_for(600, room(budget=0.0101, cost=COST, train_window=100, traffic=False), LAYERS) == "graph"
    assert tape_for(600, room(budget=0.0101, train_window=100), LAYERS) == "graph"
    assert tape_for(600, room(budget=0.0101, cost=COST, train_window=600), LAYERS) == "graph"


@pytest.mark.parametrize(("window", "windows"), [(1, 60), (29, 3), (30, 2), (59, 2), (60, 1), (512, 1)])
def test_a_replay_tape_has_a_unit_per_layer_and_window(window: int, windows: int) -> None:
    quiet = room(tape="replay", train_window=window, traffic=False, decode=0)
    share = training_share(items_of(1, 40, 20), quiet, limits=LAYERS)
    assert (share.tape, share.backward_units) == ("replay", 30 * windows)
    assert share.unit_rows == REPLAY_COST * min(window, 60)


def test_replay_units_fill_the_time_budget() -> None:
    # As with the graph tape above: 0.1 ms each of 10 rows' window replayed (20 rows' work): 0.2 ms a unit.
    limits = TrainLimits(open_tape_rows=20)
    share = training_share([], room(budget=0.0101, cost=COST), open_units=90, limits=limits)
    assert share.backward_units == 25 and share.unit_rows == 20
