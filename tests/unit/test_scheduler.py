"""The scheduler, driven by an engine of plain dictionaries: examples, and a state machine with a tiny cache."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loquetier.config import EngineConfig
from loquetier.engine.blocks import BlockAllocator
from loquetier.engine.cost import StepCostModel, StepFeatures
from loquetier.engine.policy import MAX_STEPS_WITHOUT_TRAINING, MIN_WINDOW_ROWS, TrainLimits, admission_order
from loquetier.engine.rows import Sequence, SequenceStatus, StepPlan, TrainItem, cut_rows
from loquetier.engine.scheduler import Scheduler
from loquetier.errors import ContextLengthError, IntegrityError, OutOfKVMemoryError

PAGE = 4
UNITS_PER_TAPE = 6


def rows_of(items: tuple[TrainItem, ...]) -> int:
    return sum(item.num_rows for item in items)


class FakeEngine:
    """Executes plans on a dict for a KV cache, and checks of each plan all that the real engine relies on."""

    def __init__(
        self, num_pages: int, cost: StepCostModel | None = None, max_context: int = 64, **limits: object
    ) -> None:
        self.config = EngineConfig(**{"max_rows": 32, "max_prefill_rows": 8, "max_train_rows": 16, **limits})  # type: ignore[arg-type]
        self.allocator = BlockAllocator(num_pages, PAGE)
        self.scheduler = Scheduler(self.config, self.allocator, max_context, cost)
        self.cache: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.sequences: list[Sequence] = []
        self.train: list[TrainItem] = []
        self.evaluate: list[TrainItem] = []
        self.open_units = 0
        self.forward: tuple[TrainItem, ...] = ()
        """Rows of the open tape whose forward is to come."""

    def add(self, prompt: int, generate: int = 1, priority: int = 0, slot: int = -1) -> Sequence:
        seq_id = len(self.sequences)
        seq = Sequence(
            seq_id=seq_id,
            tokens=[seq_id * 1000 + i for i in range(prompt)],
            prompt_len=prompt,
            max_total_len=prompt + generate,
            priority=priority,
            slot=slot,
        )
        self.scheduler.add(seq)
        self.sequences.append(seq)
        return seq

    def plan(self) -> StepPlan:
        limits = TrainLimits(
            units_per_tape=UNITS_PER_TAPE, open_tape_rows=8 * bool(self.open_units), open_forward=self.forward
        )
        return self.scheduler.schedule(self.train, self.evaluate, self.open_units, limits)

    def step(self) -> StepPlan:
        waiting_before = self.scheduler.waiting
        running_before = set(self.scheduler.running)
        plan = self.plan()
        self.check_plan(plan)
        self.check_nobody_was_overtaken(waiting_before)
        for seq in plan.decode:
            assert seq in running_before
        self.execute(plan)
        return plan

    def execute(self, plan: StepPlan) -> None:
        """Write K and V where the page tables say, read back the whole context, sample, finish."""
        spans = [(c.seq, c.start, c.length) for c in plan.prefill] + [(s, s.num_computed, 1) for s in plan.decode]
        for seq, start, length in spans:
            for position in range(start, start + length):
                self.cache[self.place(seq, position)] = (seq.seq_id, position, seq.tokens[position])
        for seq, start, length in spans:
            for position in range(start + length):
                assert self.cache[self.place(seq, position)] == (seq.seq_id, position, seq.tokens[position])
        self.scheduler.commit(plan)
        for seq, _, _ in spans:
            if seq.num_left == 0:
                seq.tokens.append(seq.seq_id * 1000 + len(seq.tokens))
                if len(seq.tokens) == seq.max_total_len:
                    self.scheduler.finish(seq)
        self.train = [item for item in self.train if item not in plan.opened]
        self.evaluate = [item for item in self.evaluate if item not in plan.evaluate]
        if plan.opened:
            self.open_units, self.forward = UNITS_PER_TAPE, plan.opened
        self.forward = cut_rows(self.forward, rows_of(plan.train), rows_of(self.forward))
        self.open_units -= min(self.open_units, plan.backward_units)

    @staticmethod
    def place(seq: Sequence, position: int) -> tuple[int, int]:
        return seq.pages[position // PAGE], position % PAGE

    def check_plan(self, plan: StepPlan) -> None:
        serving = [c.seq for c in plan.prefill] + list(plan.decode)
        assert len(serving) == len(set(serving)), "one kind of rows per sequence"
        for seq in serving:
            assert seq.status is SequenceStatus.RUNNING
            assert seq not in plan.preempted
        for chunk in plan.prefill:
            assert chunk.start == chunk.seq.num_computed and 1 <= chunk.length <= chunk.seq.num_left
            # Pages for the chunk and no more.
            assert len(chunk.seq.pages) == self.allocator.pages_needed(chunk.start + chunk.length)
        for seq in plan.decode:
            assert seq.num_left == 1
            assert len(seq.pages) == self.allocator.pages_needed(len(seq.tokens))
        assert sum(c.length for c in plan.prefill) <= self.config.max_prefill_rows
        serving_rows = sum(c.length for c in plan.prefill) + len(plan.decode)
        assert serving_rows <= self.config.max_rows
        self.check_training(plan, serving_rows)
        for order in (
            [(i.slot, i.job_id, i.item_id) for i in plan.opened],
            [(c.seq.slot, c.seq.seq_id) for c in plan.prefill],
            [(s.slot, s.seq_id) for s in plan.decode],
            [(i.slot, i.job_id, i.item_id) for i in plan.train],
            [(i.slot, i.job_id, i.item_id) for i in plan.evaluate],
        ):
            assert order == sorted(order)
        for victim in plan.preempted:
            assert all(admission_order(seq) < admission_order(victim) for seq in self.scheduler.running)
        # Someone who can move does move.
        assert serving_rows or not any(seq.num_left for seq in self.scheduler.running)
        assert serving_rows or not self.scheduler.has_work

    def check_training(self, plan: StepPlan, serving_rows: int) -> None:
        assert not (plan.opened and self.open_units), "one open tape"
        assert set(plan.opened) <= set(self.train) and set(plan.evaluate) <= set(self.evaluate)
        todo = plan.opened or self.forward
        assert plan.train == cut_rows(todo, 0, rows_of(plan.train)), "the tape's next rows and no others"
        if plan.opened:
            assert plan.train, "no tape is opened for nothing"
            assert plan.train == plan.opened or plan.tape == "replay"
        for items in (plan.train, plan.evaluate):
            assert len(items) <= 1 or rows_of(items) <= self.config.max_train_rows
        if plan.num_rows > self.config.max_rows:  # only because one lone item, or the least window, was due
            lone = [items[0] for items in (plan.train, plan.evaluate) if len(items) == 1]
            assert any(plan.num_rows - item.num_rows <= self.config.max_rows for item in lone)
        if plan.train != todo and rows_of(plan.train) > self.config.max_train_rows:
            assert rows_of(plan.train) == MIN_WINDOW_ROWS
        complete = plan.train == todo
        available = (self.open_units or UNITS_PER_TAPE * bool(plan.opened)) if complete else 0
        assert 0 <= plan.backward_units <= available
        if not self.scheduler.has_work:
            assert plan.backward_units == available
            assert plan.train or self.open_units or not self.train
        elif self.config.step_time_budget is None:
            assert plan.backward_units == min(available, self.config.backward_units_while_serving)

    def check_nobody_was_overtaken(self, waiting_before: tuple[Sequence, ...]) -> None:
        """Whoever was admitted was at the head of the line."""
        left = [seq.status is SequenceStatus.WAITING for seq in waiting_before]
        assert left == sorted(left)

    def drain(self) -> int:
        """Steps until nothing is left to serve. Each step moves the first sequence, and a preempted one starts over
        only when an earlier one moved on by a page, so the bound is generous and finite."""
        bound = 50 + 20 * sum(seq.max_total_len for seq in self.sequences)
        for steps in range(bound):
            if not self.scheduler.has_work:
                return steps
            self.step()
            self.scheduler.check_integrity()
        raise AssertionError(f"not drained after {bound} steps")


def seq_ids(seqs: tuple[Sequence, ...]) -> list[int]:
    return [seq.seq_id for seq in seqs]


def test_prompt_then_decode_then_finished() -> None:
    engine = FakeEngine(8)
    seq = engine.add(prompt=5, generate=3)
    plan = engine.step()
    assert [(c.start, c.length) for c in plan.prefill] == [(0, 5)] and not plan.decode
    assert seq_ids(engine.step().decode) == [0]
    engine.step()
    assert seq.status is SequenceStatus.FINISHED and not engine.scheduler.has_work
    assert engine.allocator.num_free == 8
    assert engine.plan().is_empty


def test_long_prompt_advances_by_chunks_and_ends_as_a_decode_row() -> None:
    engine = FakeEngine(16)
    engine.add(prompt=17, generate=2)
    chunks = []
    for _ in range(2):
        (chunk,) = engine.step().prefill
        chunks.append((chunk.start, chunk.length, len(chunk.seq.pages)))
    assert chunks == [(0, 8, 2), (8, 8, 4)]
    assert seq_ids(engine.step().decode) == [0]  # one token left of a running sequence: a DECODE row


def test_one_token_prompt_is_a_prefill_chunk() -> None:
    engine = FakeEngine(4)
    engine.add(prompt=1, generate=2)
    plan = engine.step()
    assert [(c.start, c.length) for c in plan.prefill] == [(0, 1)] and not plan.decode


def test_decode_rows_come_before_prefill_rows() -> None:
    engine = FakeEngine(16, max_rows=4, max_prefill_rows=4)
    for _ in range(3):
        engine.add(prompt=1, generate=8)
    engine.step()
    engine.add(prompt=9)
    plan = engine.step()
    assert len(plan.decode) == 3
    assert [(c.seq.seq_id, c.length) for c in plan.prefill] == [(3, 1)]


def test_running_prefill_goes_before_new_sequences() -> None:
    engine = FakeEngine(32)
    engine.add(prompt=12)
    engine.step()
    engine.add(prompt=12, priority=-1)
    plan = engine.step()
    assert [(c.seq.seq_id, c.start, c.length) for c in plan.prefill] == [(0, 8, 4), (1, 0, 4)]


def test_rows_are_ordered_by_slot() -> None:
    engine = FakeEngine(32, max_prefill_rows=16)
    for slot in (2, -1, 0, -1):
        engine.add(prompt=2, generate=3, slot=slot)
    assert [c.seq.seq_id for c in engine.step().prefill] == [1, 3, 2, 0]
    assert seq_ids(engine.step().decode) == [1, 3, 2, 0]


def test_last_sequence_is_preempted_and_comes_back() -> None:
    # Two sequences of one page each in a cache of 3: the second page of seq 0 takes the last free one, and then
    # seq 1, which needs its second page in the same step, preempts itself.
    engine = FakeEngine(3)
    first, second = engine.add(prompt=3, generate=6), engine.add(prompt=3, generate=6)
    engine.step()
    engine.step()
    plan = engine.step()
    assert seq_ids(plan.decode) == [0] and seq_ids(plan.preempted) == [1]
    assert second.status is SequenceStatus.WAITING and second.num_computed == 0 and second.pages == []
    assert second.num_preemptions == 1 and second.num_generated == 2
    assert engine.scheduler.waiting == (second,)
    engine.drain()
    assert first.num_preemptions == 0
    assert second.tokens == [1000 + i for i in range(9)]


def test_the_reserve_keeps_a_newcomer_out_rather_than_preempting_it_soon() -> None:
    engine = FakeEngine(2)
    first, second = engine.add(prompt=4, generate=3), engine.add(prompt=1, generate=3)
    engine.step()
    assert engine.scheduler.running == (first,) and engine.scheduler.waiting == (second,)
    engine.drain()
    assert second.num_preemptions == 0


def test_priority_decides_who_gives_way() -> None:
    engine = FakeEngine(4)
    late = engine.add(prompt=3, generate=10, priority=5)
    engine.step()
    early = engine.add(prompt=3, generate=10, priority=0)
    engine.drain()
    assert late.num_preemptions >= 1 and early.num_preemptions == 0


def test_a_preemption_takes_planned_rows_out_again() -> None:
    """A running prefill without a free page takes the pages of a later sequence whose DECODE row is planned."""
    engine = FakeEngine(5, max_prefill_rows=4)
    late = engine.add(prompt=4, generate=13, priority=1)
    while len(late.tokens) < 8:
        engine.step()
    early = engine.add(prompt=8, generate=4)  # 2 pages + 1 in reserve, beside the 2 of `late`
    engine.step()
    assert early.num_computed == 4 and len(late.tokens) == 9
    engine.allocator.allocate(engine.allocator.num_free - 1)  # somebody else's, so that pages run out just now
    plan = engine.plan()
    assert plan.preempted == (late,) and plan.decode == ()
    assert [(c.seq, c.start, c.length) for c in plan.prefill] == [(early, 4, 4)]


def test_a_long_prompt_keeps_the_pages_it_was_admitted_for() -> None:
    engine = FakeEngine(6, max_prefill_rows=4)
    first = engine.add(prompt=20, generate=1)  # 5 pages, of which the first chunk takes 1
    engine.step()
    blocked = engine.add(prompt=8, generate=1)
    small = engine.add(prompt=1, generate=1)
    for _ in range(3):
        engine.step()
    assert engine.scheduler.waiting == (blocked, small)  # and nobody overtakes the head of the line
    assert len(first.pages) == 4 and first.num_left == 4
    engine.drain()
    assert first.num_preemptions == 0


def test_no_sequence_is_admitted_in_a_step_that_preempted() -> None:
    engine = FakeEngine(6)
    early, late = engine.add(prompt=4, generate=12), engine.add(prompt=12, generate=8, priority=1)
    engine.step()
    small = engine.add(prompt=1)  # before `late` in order, and 2 pages with the reserve
    plan = engine.step()
    while not plan.preempted:
        plan = engine.step()
    assert plan.preempted == (late,) and plan.decode == (early,)
    assert not plan.prefill and engine.allocator.num_free == 3
    assert [c.seq for c in engine.step().prefill] == [small]


def test_at_most_max_sequences_and_max_rows_run() -> None:
    engine = FakeEngine(64, max_sequences=3)
    few_rows = FakeEngine(64, max_rows=2)
    for _ in range(5):
        engine.add(prompt=1, generate=4)
        few_rows.add(prompt=1, generate=4)
    engine.step()
    few_rows.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (3, 2)
    assert few_rows.scheduler.num_running == 2
    few_rows.drain()


def test_impossible_sequences_are_refused() -> None:
    engine = FakeEngine(4, kv_memory=4 << 20)
    with pytest.raises(
        OutOfKVMemoryError, match=r"17 tokens need 5 KV pages .* has 4 \(about 5242880 of 4194304 bytes\)"
    ):
        engine.add(prompt=10, generate=7)
    with pytest.raises(ContextLengthError, match="65 tokens, the context is 64"):
        engine.add(prompt=60, generate=5)
    engine.add(prompt=10, generate=6)
    assert engine.scheduler.num_waiting == 1


def test_misuse_is_loud() -> None:
    engine = FakeEngine(8)
    seq = engine.add(prompt=3, generate=3)
    with pytest.raises(IntegrityError, match="not new"):
        engine.scheduler.add(seq)
    with pytest.raises(IntegrityError, match="waiting, not running"):
        engine.scheduler.finish(seq)
    stale = engine.plan()
    plan = engine.plan()
    with pytest.raises(IntegrityError, match="latest plan"):
        engine.scheduler.commit(stale)
    engine.scheduler.commit(plan)
    with pytest.raises(IntegrityError, match="latest plan"):
        engine.scheduler.commit(plan)
    stranger = Sequence(seq_id=77, tokens=[1], prompt_len=1, max_total_len=2)
    with pytest.raises(IntegrityError, match="not where its status says"):
        engine.scheduler.abort(stranger)


def test_a_forgotten_plan_costs_nothing() -> None:
    """The engine failed in the middle of a step: the same rows are planned again."""
    engine = FakeEngine(8)
    engine.add(prompt=12, generate=2)
    lost = engine.plan()
    engine.scheduler.check_integrity()
    again = engine.plan()
    assert [(c.start, c.length) for c in lost.prefill] == [(c.start, c.length) for c in again.prefill] == [(0, 8)]
    engine.execute(again)
    engine.drain()


def test_abort_between_plan_and_commit() -> None:
    engine = FakeEngine(8)
    seq = engine.add(prompt=3, generate=3)
    plan = engine.plan()
    engine.scheduler.abort(seq)
    engine.scheduler.commit(plan)
    assert seq.status is SequenceStatus.ABORTED and seq.num_computed == 0
    engine.scheduler.abort(seq)  # again: nothing to do
    assert engine.allocator.num_free == 8


@pytest.mark.parametrize("damage", ["lost page", "status", "twice"])
def test_integrity_check_finds_damage(damage: str) -> None:
    engine = FakeEngine(8)
    seq = engine.add(prompt=6, generate=3)
    engine.step()
    if damage == "lost page":
        seq.pages.pop()
    elif damage == "status":
        seq.status = SequenceStatus.WAITING
    else:
        engine.scheduler._waiting.add(seq)
    with pytest.raises(IntegrityError):
        engine.scheduler.check_integrity()


def test_training_shares_the_step_and_its_backward_is_spread_over_steps() -> None:
    engine = FakeEngine(16, backward_units_while_serving=2)
    engine.add(prompt=2, generate=20)
    engine.train = [TrainItem(1, i, 6, slot=3) for i in range(3)]
    plans = [engine.step() for _ in range(4)]
    assert [len(p.train) for p in plans] == [2, 0, 0, 1]  # 6 units at 2 a step, then the next tape
    assert [p.backward_units for p in plans] == [2, 2, 2, 2]


def test_jobs_take_turns_from_step_to_step() -> None:
    engine = FakeEngine(4)
    engine.train = [TrainItem(job, i, 16, slot=0) for job in (1, 2, 3) for i in range(2)]
    engine.evaluate = [TrainItem(job, i, 12, slot=0) for job in (1, 2) for i in range(2)]
    plans = [engine.step() for _ in range(6)]
    assert [plan.train[0].job_id for plan in plans] == [1, 2, 3, 1, 2, 3]
    assert [plan.evaluate[0].job_id for plan in plans[:4]] == [1, 2, 1, 2]


def test_training_alone_takes_everything() -> None:
    engine = FakeEngine(4)
    engine.train = [TrainItem(job, i, 6, slot=job) for job in (2, 1) for i in range(2)]
    plan = engine.step()
    assert [(i.job_id, i.item_id) for i in plan.train] == [(1, 0), (2, 0)]
    assert plan.backward_units == UNITS_PER_TAPE
    assert engine.scheduler.schedule().is_empty


def test_items_longer_than_the_limits_run_alone() -> None:
    engine = FakeEngine(4)
    engine.train = [TrainItem(1, 0, 20, slot=0), TrainItem(1, 1, 99, slot=0), TrainItem(1, 2, 3, slot=0)]
    assert [[i.item_id for i in engine.step().train] for _ in range(3)] == [[0], [1], [2]]


def test_a_step_time_budget_never_stops_training_for_ever() -> None:
    cost = StepCostModel()
    for _ in range(20):  # a machine that is always over the budget
        cost.observe(StepFeatures(prefill_rows=1, decode_rows=1, train_rows=1, backward_rows=1, kv_tokens=9), 1.0)
    engine = FakeEngine(16, cost=cost, step_time_budget=0.01)
    engine.add(prompt=1, generate=60)
    engine.train = [TrainItem(1, 0, 6, slot=0)]
    plans = [engine.step() for _ in range(3 * (MAX_STEPS_WITHOUT_TRAINING + 1))]
    busy = [i for i, p in enumerate(plans) if p.train or p.backward_units]
    assert [b - a for a, b in pairwise(busy)] == [MAX_STEPS_WITHOUT_TRAINING + 1] * 2
    assert len(plans[busy[0]].train) == 1 and plans[busy[1]].backward_units == 1


def test_a_long_forward_never_starves_either() -> None:
    """Without units, too: nothing but lm_head is trained."""
    cost = StepCostModel()
    for _ in range(20):
        cost.observe(StepFeatures(prefill_rows=1, decode_rows=1, train_rows=1, backward_rows=1, kv_tokens=9), 1.0)
    engine = FakeEngine(16, cost=cost, step_time_budget=0.01, tape="replay")
    engine.add(prompt=1, generate=60)
    engine.forward = (TrainItem(1, 0, 2 * MIN_WINDOW_ROWS, slot=0),)
    plans = [engine.step() for _ in range(2 * (MAX_STEPS_WITHOUT_TRAINING + 1))]
    busy = [i for i, p in enumerate(plans) if p.train]
    assert busy == [MAX_STEPS_WITHOUT_TRAINING, 2 * MAX_STEPS_WITHOUT_TRAINING + 1] and not engine.forward


def test_scheduling_imports_no_torch() -> None:
    code = "import sys, loquetier.engine.scheduler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("seed", range(20))
def test_heavy_traffic_on_a_tiny_cache_ends(seed: int) -> None:
    """Preemption is the rule here, not the exception; arrivals, aborts and training go on meanwhile."""
    rng = random.Random(seed)
    engine = FakeEngine(rng.randint(8, 12), max_rows=rng.choice([4, 32]), max_prefill_rows=rng.choice([3, 8]))
    for i in range(30):
        engine.add(rng.randint(1, 8), rng.randint(1, 24), priority=rng.randint(0, 1), slot=rng.randint(-1, 2))
        engine.train.append(TrainItem(rng.randint(1, 3), i, rng.randint(1, 40), slot=0))
        engine.evaluate.append(TrainItem(rng.randint(1, 3), i, rng.randint(1, 40), slot=0))
        for _ in range(rng.randint(0, 8)):
            engine.step()
            engine.scheduler.check_integrity()
        if rng.random() < 0.1 and engine.scheduler.has_work:
            engine.scheduler.abort(rng.choice([*engine.scheduler.waiting, *engine.scheduler.running]))
    engine.drain()
    assert (
        sum(seq.num_preemptions for seq in engine.sequences) >= 1
    )  # the seeds are fixed: this says they do their work
    assert engine.allocator.num_free == engine.allocator.num_pages
    for seq in engine.sequences:
        if seq.status is SequenceStatus.FINISHED:
            assert seq.tokens == [seq.seq_id * 1000 + i for i in range(seq.max_total_len)]


class SchedulerMachine(RuleBasedStateMachine):
    """Random traffic, aborts and training on a cache so small that preemption is common."""

    @initialize(
        num_pages=st.integers(4, 12),
        max_rows=st.sampled_from([24, 7, 2]),
        max_prefill_rows=st.sampled_from([12, 5, 1]),
        max_sequences=st.sampled_from([6, 3, 2, 1]),
        budget=st.sampled_from([None, 0.005, 0.05]),
    )
    def start(
        self, num_pages: int, max_rows: int, max_prefill_rows: int, max_sequences: int, budget: float | None
    ) -> None:
        self.engine = FakeEngine(
            num_pages,
            max_rows=max_rows,
            max_prefill_rows=max_prefill_rows,
            max_sequences=max_sequences,
            step_time_budget=budget,
        )
        self.items = 0

    @rule(
        requests=st.lists(
            st.tuples(st.integers(1, 20), st.integers(1, 24), st.integers(0, 1), st.integers(-1, 2)),
            min_size=1,
            max_size=5,
        )
    )
    def add(self, requests: list[tuple[int, int, int, int]]) -> None:
        for prompt, generate, priority, slot in requests:
            if -(-(prompt + generate) // PAGE) > self.engine.allocator.num_pages:
                with pytest.raises(OutOfKVMemoryError):
                    self.engine.add(prompt, generate, priority, slot)
            else:
                self.engine.add(prompt, generate, priority, slot)

    @rule(job=st.integers(1, 3), rows=st.integers(1, 30), training=st.booleans())
    def add_item(self, job: int, rows: int, training: bool) -> None:
        self.items += 1
        item = TrainItem(job, self.items, rows, slot=job % 2)
        (self.engine.train if training else self.engine.evaluate).append(item)

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        scheduler = self.engine.scheduler
        scheduler.abort(data.draw(st.sampled_from([*scheduler.waiting, *scheduler.running])))

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(data=st.data())
    def abort_between_plan_and_commit(self, data: st.DataObject) -> None:
        scheduler = self.engine.scheduler
        plan = self.engine.plan()
        scheduler.abort(data.draw(st.sampled_from([*scheduler.waiting, *scheduler.running])))
        scheduler.check_integrity()
        # The rows did not run: what is committed next is a fresh plan.
        assert plan is not self.engine.step()

    @rule(steps=st.integers(1, 12))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            plan = self.engine.step()
            self.engine.scheduler.check_integrity()
            backward_rows = 8 * plan.backward_units
            features = StepFeatures(decode_rows=len(plan.decode), backward_rows=backward_rows)
            self.engine.scheduler.cost.observe(features, 0.001 * (1 + len(plan.decode)) + 1e-4 * backward_rows)

    @invariant()
    def books_add_up(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.drain()
        event("preempted" if any(seq.num_preemptions for seq in self.engine.sequences) else "never preempted")
        assert all(s.status in (SequenceStatus.FINISHED, SequenceStatus.ABORTED) for s in self.engine.sequences)
        # With no traffic each step opens a tape or evaluates: all items get done.
        for _ in range(2 * self.items + 20):
            self.engine.step()
        assert not self.engine.train and not self.engine.evaluate
        assert not self.engine.open_units and not self.engine.forward


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
