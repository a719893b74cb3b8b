"""What the next step works on. Pure Python: no torch, no clock.

There is no prefill phase and no decode phase: a sequence is a list of tokens of which the first `num_computed`
are in the KV cache, and a step lets each catch up by some rows. Training takes what is left.

One rule says which kind a sequence's rows are: a sequence that was RUNNING when the step was planned and has
exactly one token left gets a DECODE row (the last token of a prompt whose earlier chunks are computed counts);
everything else, a one-token prompt fresh from the waiting queue included, is a PREFILL chunk. Either way the
chunk or row that ends at the last known token is the one whose logits are sampled.

A sequence's life: `add` -> WAITING -> (schedule) RUNNING <-> WAITING (preempted) -> `finish` or `abort`.
Each step: ``plan = schedule(...)``, run it, ``commit(plan)``, and only then append sampled tokens. A step may be
planned while the device computes the one before: that one's tokens are `num_pending`, and count like known ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from loquetier.config import EngineConfig
from loquetier.engine.blocks import BlockAllocator
from loquetier.engine.cost import StepCostModel, plan_features
from loquetier.engine.policy import (
    StepRoom,
    TrainLimits,
    admission_order,
    evaluation_share,
    preemption_victim,
    reserved_pages,
    row_order,
    training_share,
)
from loquetier.engine.prefix import PrefixCache
from loquetier.engine.rows import PrefillChunk, Sequence, SequenceStatus, StepPlan, TrainItem
from loquetier.errors import ContextLengthError, IntegrityError, OutOfKVMemoryError


class _OrderedSequences:
    """Sequences in admission order. Order keys never change, so a sorted list is enough."""

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, seq: Sequence) -> bool:
        at = self._find(seq)
        return at < len(self._items) and self._items[at] is seq

    def first(self) -> Sequence:
        return self._items[0]

    def add(self, seq: Sequence) -> None:
        insort(self._items, seq, key=admission_order)

    def remove(self, seq: Sequence) -> None:
        if seq not in self:
            raise IntegrityError(f"sequence {seq.seq_id} ({seq.status.value}) is not where its status says")
        del self._items[self._find(seq)]

    def _find(self, seq: Sequence) -> int:
        return bisect_left(self._items, admission_order(seq), key=admission_order)


@dataclass(slots=True)
class _Draft:
    """A plan for serving rows in the making: a preemption may still take a row out again."""

    max_rows: int
    max_prefill_rows: int
    decode: dict[int, Sequence] = field(default_factory=dict)
    prefill: dict[int, PrefillChunk] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def prefill_rows_left(self) -> int:
        """PREFILL rows that the step still takes."""
        used = sum(chunk.length for chunk in self.prefill.values()) if self.prefill else 0
        return min(self.max_prefill_rows - used, self.max_rows - used - len(self.decode))

    def add_chunk(self, seq: Sequence, length: int) -> None:
        self.prefill[seq.seq_id] = PrefillChunk(seq, seq.num_computed, length)

    def drop(self, seq: Sequence) -> None:
        self.decode.pop(seq.seq_id, None)
        self.prefill.pop(seq.seq_id, None)
        self.preempted.append(seq)


@dataclass(slots=True)
class _Turn:
    """What fairness remembers of one kind of items from step to step."""

    steps_without: int = 0
    last_job: int | None = None

    def record(self, wanted: bool, got_some: bool, items: tuple[TrainItem, ...]) -> None:
        if items:
            self.last_job = items[-1].job_id
        self.steps_without = self.steps_without + 1 if wanted and not (items or got_some) else 0


class Scheduler:
    """Owns the queues of sequences and the pages they hold; decides what each step does.

    Args:
        config: limits of a step. At most ``min(max_sequences, max_rows)`` sequences run at once, so that
            every running sequence always finds a row.
        allocator: KV pages. Only the scheduler takes from it while it lives.
        max_context: longest sequence in tokens.
        cost: model of step time, which the engine feeds with `observe`; a new one if None.
    """

    def __init__(
        self, config: EngineConfig, allocator: BlockAllocator, max_context: int, cost: StepCostModel | None = None
    ) -> None:
        self._config = config
        self._allocator = allocator
        self.pages = PrefixCache(allocator, config.prefix_cache)
        """Who reads which page, and what is kept in pages that nobody reads."""
        self._max_context = max_context
        self.cost = cost if cost is not None else StepCostModel()
        """Learns step times; the engine calls ``cost.observe(plan_features(plan, backward_rows), seconds)``."""
        self._max_running = min(config.max_sequences, config.max_rows)
        self._waiting = _OrderedSequences()
        self._running = _OrderedSequences()
        self._open_plan: StepPlan | None = None
        self.num_preemptions = 0
        """Since the engine began."""
        self._train_turn = _Turn()
        self._eval_turn = _Turn()

    @property
    def has_work(self) -> bool:
        """True while any sequence is waiting or running."""
        return bool(len(self._waiting) + len(self._running))

    @property
    def num_waiting(self) -> int:
        """Sequences without KV pages."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with KV pages."""
        return len(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Waiting sequences in admission order."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Running sequences in admission order."""
        return tuple(self._running)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            ContextLengthError: ``max_total_len`` is longer than the context.
            OutOfKVMemoryError: it could not fit the KV cache even alone.
            IntegrityError: it is not new, or has no token, or more than ``max_total_len``.
        """
        self.check(seq)
        self._waiting.add(seq)

    def check(self, seq: Sequence) -> None:
        """Whether `add` would take it. Raises as `add`."""
        if seq.status is not SequenceStatus.WAITING or seq.pages or seq.num_computed or seq in self._waiting:
            raise IntegrityError(f"add: sequence {seq.seq_id} is not new")
        if not 1 <= len(seq.tokens) <= seq.max_total_len:
            raise IntegrityError(f"add: sequence {seq.seq_id} has {len(seq.tokens)} of 1..{seq.max_total_len} tokens")
        if seq.max_total_len > self._max_context:
            raise ContextLengthError(
                f"prompt ({seq.prompt_len} tokens) plus max_tokens is {seq.max_total_len} tokens, the context is "
                f"{self._max_context}: shorten the prompt or lower max_tokens"
            )
        needed = self._allocator.pages_needed(seq.max_total_len)
        if needed > self._allocator.num_pages:
            raise OutOfKVMemoryError(self._never_fits(seq, needed))

    def finish(self, seq: Sequence) -> None:
        """End a sequence that is RUNNING, or was preempted while its last token was computed, and free its pages.

        Raises:
            IntegrityError: it is not running here.
        """
        was_preempted = seq.status is SequenceStatus.WAITING and seq.num_preemptions > 0
        if seq.status is not SequenceStatus.RUNNING and not was_preempted:
            raise IntegrityError(f"finish: sequence {seq.seq_id} is {seq.status.value}, not running")
        (self._waiting if was_preempted else self._running).remove(seq)
        self._release(seq, SequenceStatus.FINISHED)

    def abort(self, seq: Sequence, *, has_failed: bool = False) -> None:
        """End a sequence wherever it is and free its pages; those of one that failed are not kept for others.

        One that is finished or aborted already stays as it is: a client may leave just after its last token.
        """
        if has_failed:
            self.pages.distrust(seq)
        if seq.status is SequenceStatus.RUNNING:
            self._running.remove(seq)
        elif seq.status is SequenceStatus.WAITING:
            self._waiting.remove(seq)
        else:
            return
        self._release(seq, SequenceStatus.ABORTED)

    def schedule(
        self,
        train: SequenceOf[TrainItem] = (),
        evaluate: SequenceOf[TrainItem] = (),
        open_units: int = 0,
        limits: TrainLimits | None = None,
    ) -> StepPlan:
        """Plan one step: decode, running prefills, new sequences, then training.

        Allocates the pages that the planned rows write, moves sequences between the queues, and leaves
        ``num_computed`` alone until `commit`. A plan that is not committed is simply forgotten by the next call.

        Args:
            train: TRAIN items that wait. They start only when no tape is open.
            evaluate: EVAL items that wait.
            open_units: backward units left of the open tape; with 0 and no `limits.open_forward` none is open.
            limits: what the engine knows of its tapes.

        Returns:
            The plan. Serving rows never exceed `max_rows`; see `policy.training_share` for the one way in which
            a lone long item makes the whole step exceed it. DECODE and PREFILL are ordered by (slot, seq_id), items
            by (slot, job_id, item_id).
        """
        draft = _Draft(self._config.max_rows, self._config.max_prefill_rows)
        self._plan_decode(draft)
        self._continue_prefills(draft)
        self._admit(draft)
        self._open_plan = self._with_training(draft, train, evaluate, open_units, limits or TrainLimits())
        return self._open_plan

    def commit(self, plan: StepPlan) -> None:
        """Record that the plan's rows ran: advance ``num_computed`` of its sequences by the rows they got.

        Call it before appending sampled tokens. Sequences that were finished or aborted since planning are left
        alone; their pages are gone.

        Raises:
            IntegrityError: `plan` is not the latest plan or was committed before.
        """
        if plan is not self._open_plan:
            raise IntegrityError("commit: this is not the latest plan, or it was committed before")
        self._open_plan = None
        for chunk in plan.prefill:
            if chunk.seq.status is SequenceStatus.RUNNING:
                chunk.seq.num_computed = chunk.start + chunk.length
                self.pages.offer(chunk.seq)
        for seq in plan.decode:
            if seq.status is SequenceStatus.RUNNING:
                seq.num_computed += 1
                self.pages.offer(seq)

    def check_integrity(self) -> None:
        """Check queues, statuses and pages against each other.

        Raises:
            IntegrityError: they do not add up.
        """
        everyone = [*self._waiting, *self._running]
        if len({seq.seq_id for seq in everyone}) != len(everyone):
            raise IntegrityError("a sequence is in two places")
        for seq in self._waiting:
            if seq.status is not SequenceStatus.WAITING or seq.pages or seq.num_computed:
                raise IntegrityError(f"waiting sequence {seq.seq_id}: {seq.status.value}, {len(seq.pages)} pages")
        for seq in self._running:
            least, most = (
                self._allocator.pages_needed(n) for n in (seq.num_computed, len(seq.tokens) + seq.num_pending)
            )
            if seq.status is not SequenceStatus.RUNNING or not least <= len(seq.pages) <= most:
                raise IntegrityError(
                    f"running sequence {seq.seq_id}: {seq.status.value}, {len(seq.pages)} pages, not {least}..{most}"
                )
        if len(self._running) > self._max_running:
            raise IntegrityError(f"{len(self._running)} sequences run, the limit is {self._max_running}")
        self.pages.check_integrity(self._running)

    # --- the phases of schedule() ---

    def _plan_decode(self, draft: _Draft) -> None:
        for seq in tuple(self._running):
            # An earlier sequence of this very loop may have preempted this one.
            wants_row = seq.status is SequenceStatus.RUNNING and seq.num_left == 1 and seq.may_go_on
            if wants_row and self._make_room(seq, draft):
                self.pages.grow(seq, seq.num_computed + 1)
                draft.decode[seq.seq_id] = seq
            elif wants_row:
                self._preempt(seq, draft)

    def _continue_prefills(self, draft: _Draft) -> None:
        for seq in tuple(self._running):
            if seq.status is not SequenceStatus.RUNNING or seq.num_left < 2:
                continue
            if draft.prefill_rows_left == 0:
                return
            # With no room even after preempting all later ones it keeps what is computed and waits: whoever
            # comes earlier may still take its pages, and it is first one day.
            if self._make_room(seq, draft):
                length = min(seq.num_left, draft.prefill_rows_left, self._tokens_that_fit(seq))
                self.pages.grow(seq, seq.num_computed + length)
                draft.add_chunk(seq, length)

    def _admit(self, draft: _Draft) -> None:
        if draft.preempted:
            return  # The cache is full: a newcomer would be preempted next, and no victim comes back in its own step.
        while len(self._waiting) and len(self._running) < self._max_running and draft.prefill_rows_left > 0:
            seq = self._waiting.first()
            # All its known tokens must fit, though only its first chunk's pages are taken now: the rest stays free
            # for it because a running prefill goes on before anyone is admitted, and takes every row that is left.
            # The first that does not fit ends admission: nobody overtakes it.
            prefix = self.pages.look_up(seq)
            if prefix.is_awaited:
                return
            missing = self._allocator.pages_needed(len(seq.tokens)) - len(prefix.pages)
            if missing + reserved_pages(len(self._running)) > self.pages.num_available - prefix.num_idle:
                return
            self._waiting.remove(seq)
            seq.status = SequenceStatus.RUNNING
            self._running.add(seq)
            self.pages.take(seq, prefix)
            length = min(seq.num_left, draft.prefill_rows_left)
            self.pages.grow(seq, seq.num_computed + length)
            draft.add_chunk(seq, length)

    def _with_training(
        self,
        draft: _Draft,
        train: SequenceOf[TrainItem],
        evaluate: SequenceOf[TrainItem],
        open_units: int,
        limits: TrainLimits,
    ) -> StepPlan:
        plan = StepPlan(
            prefill=tuple(sorted(draft.prefill.values(), key=lambda chunk: (chunk.seq.slot, chunk.seq.seq_id))),
            decode=tuple(sorted(draft.decode.values(), key=lambda seq: (seq.slot, seq.seq_id))),
            preempted=tuple(draft.preempted),
        )
        share = training_share(train, self._room(plan, 0, self._train_turn), open_units, limits)
        wanted = bool(train or open_units or limits.open_forward)
        self._train_turn.record(wanted, bool(share.backward_units or share.rows), share.items)
        plan = replace(
            plan,
            train=share.rows,
            opened=row_order(share.items),
            backward_units=share.backward_units,
            tape=share.tape,
        )
        items = evaluation_share(evaluate, self._room(plan, share.backward_units * share.unit_rows, self._eval_turn))
        self._eval_turn.record(bool(evaluate), False, items)
        return replace(plan, evaluate=row_order(items))

    # --- pages ---

    def _tokens_that_fit(self, seq: Sequence) -> int:
        """Tokens beyond ``num_computed`` for which there are pages: its own and the available ones."""
        return (len(seq.pages) + self.pages.num_available) * self._allocator.page_size - seq.num_computed

    def _make_room(self, seq: Sequence, draft: _Draft) -> bool:
        """Preempt sequences after `seq` until one more token of it fits; False when there is none left to preempt."""
        while self._tokens_that_fit(seq) < 1:
            victim = preemption_victim(self._running)
            if victim is seq:
                return False
            self._preempt(victim, draft)
        return True

    def _preempt(self, seq: Sequence, draft: _Draft) -> None:
        self._running.remove(seq)
        self._release(seq, SequenceStatus.WAITING)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.add(seq)
        draft.drop(seq)

    def _release(self, seq: Sequence, status: SequenceStatus) -> None:
        self.pages.release(seq)
        seq.status = status

    def _room(self, plan: StepPlan, backward_rows: int, turn: _Turn) -> StepRoom:
        return StepRoom(
            config=self._config,
            cost=self.cost,
            load=plan_features(plan, backward_rows),
            has_traffic=self.has_work,
            rows_left=self._config.max_rows - plan.num_rows,
            steps_without=turn.steps_without,
            after_job=turn.last_job,
        )

    def _never_fits(self, seq: Sequence, needed: int) -> str:
        total = self._allocator.num_pages
        memory = self._config.kv_memory
        size = f" (about {needed * memory // total} of {memory} bytes)" if memory is not None else ""
        return (
            f"{seq.max_total_len} tokens need {needed} KV pages of {self._allocator.page_size} tokens, the cache has "
            f"{total}{size}: shorten the prompt, lower max_tokens, or start with more kv_memory"
        )
