"""Shared and kept KV pages: examples, and a state machine whose fake cache remembers what each page really holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loquetier.config import EngineConfig
from loquetier.engine.blocks import BlockAllocator
from loquetier.engine.prefix import CacheSpace, PrefixCache
from loquetier.engine.rows import Sequence, SequenceStatus, StepPlan
from loquetier.engine.scheduler import Scheduler
from loquetier.errors import IntegrityError, OutOfKVMemoryError

PAGE = 4
ANNA, BERT = CacheSpace("anna"), CacheSpace("bert")


class FakeEngine:
    """Executes plans on a dict for a KV cache.

    What it writes for a token is all that the token's K and V depend on: version, space, and every token up to it. What
    it reads must be exactly that, whoever wrote it.
    """

    def __init__(self, num_pages: int = 32, **limits: object) -> None:
        config = EngineConfig(**{"max_rows": 32, "max_prefill_rows": 16, "page_size": PAGE, **limits})  # type: ignore[arg-type]
        self.allocator = BlockAllocator(num_pages, PAGE)
        self.scheduler = Scheduler(config, self.allocator, max_context=64)
        self.pages = self.scheduler.pages
        self.held: dict[tuple[int, int], tuple[object, ...]] = {}
        self.source: dict[int, tuple[str, CacheSpace]] = {}
        self.sequences: list[Sequence] = []
        self.prefilled = 0
        """PREFILL rows so far."""

    def add(
        self,
        tokens: list[int],
        generate: int = 1,
        version: str = "base",
        space: CacheSpace = ANNA,
        priority: int = 0,
        *,
        needs_logits: bool = False,
        shares: bool = True,
    ) -> Sequence:
        seq = Sequence(
            seq_id=len(self.sequences),
            tokens=list(tokens),
            prompt_len=len(tokens),
            max_total_len=len(tokens) + generate,
            priority=priority,
            needs_prompt_logits=needs_logits,
            cache_root=self.pages.root(version, space) if shares else None,
        )
        self.scheduler.add(seq)
        self.sequences.append(seq)
        self.source[seq.seq_id] = (version, space)
        return seq

    def step(self, planned: Callable[[], None] = lambda: None) -> StepPlan:
        plan = self.scheduler.schedule()
        planned()
        for chunk in plan.prefill:
            assert chunk.length >= 1, "without a row there are no logits"
            self.run(chunk.seq, chunk.start, chunk.length)
            self.prefilled += chunk.length
        for seq in plan.decode:
            self.run(seq, seq.num_computed, 1)
        self.scheduler.commit(plan)
        for seq in (*(c.seq for c in plan.prefill), *plan.decode):
            if seq.num_left == 0:
                seq.tokens.append(sum(seq.tokens) % 3)
                if len(seq.tokens) == seq.max_total_len:
                    self.scheduler.finish(seq)
        return plan

    def run(self, seq: Sequence, start: int, length: int) -> None:
        for at in range(start, start + length):
            page = seq.pages[at // PAGE]
            if at % PAGE == 0:  # a page is cleared before its first token
                self.held = {k: v for k, v in self.held.items() if k[0] != page}
            self.held[page, at % PAGE] = self.content(seq, at)
        for at in range(start + length):
            found = self.held.get((seq.pages[at // PAGE], at % PAGE))
            assert found == self.content(seq, at), f"sequence {seq.seq_id} reads another token's K and V"

    def content(self, seq: Sequence, at: int) -> tuple[object, ...]:
        return (*self.source[seq.seq_id], *seq.tokens[: at + 1])

    def drain(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self.step()
            self.scheduler.check_integrity()
        assert not self.scheduler.has_work
        assert self.pages.num_available == self.allocator.num_pages

    def answer(self, tokens: list[int], generate: int = 1, **options: object) -> Sequence:
        seq = self.add(tokens, generate, **options)  # type: ignore[arg-type]
        self.drain()
        return seq

    def found(self, tokens: list[int]) -> int:
        """Tokens that Anna would find; nothing changes."""
        root = self.pages.root("base", ANNA)
        seq = Sequence(-1, tokens, len(tokens), len(tokens) + 1, cache_root=root)
        return PAGE * len(self.pages.look_up(seq).pages)


PROMPT = list(range(10, 20))  # two full pages and a half


def test_pages_that_are_distrusted_are_not_offered_again_by_who_reads_them() -> None:
    """With async scheduling the writer's failure may come to light when a reader of its pages is already planned."""
    engine = FakeEngine()
    writer = engine.add(PROMPT, generate=20)
    while writer.num_left > 1:
        engine.step()
    reader = engine.add(PROMPT, generate=8)
    assert engine.found(PROMPT) == 8
    engine.step(lambda: engine.pages.distrust(writer))
    assert reader.num_cached == 8 and engine.found(PROMPT) == 0
    before = len(reader.tokens)
    while len(reader.tokens) < before + 5:  # another full page, which is offered
        engine.step()
    assert engine.found(PROMPT) == 0
    engine.drain()


def test_a_second_prompt_computes_only_what_is_new() -> None:
    engine = FakeEngine()
    assert engine.answer(PROMPT).num_cached == 0
    assert engine.prefilled == 10
    assert engine.answer([*PROMPT[:9], 99]).num_cached == 8
    assert engine.prefilled == 12
    assert (engine.pages.num_queried, engine.pages.num_hit) == (20, 8)


def test_the_last_token_is_always_computed() -> None:
    engine = FakeEngine()
    engine.answer(PROMPT[:8])
    assert engine.answer(PROMPT[:8]).num_cached == 4


def test_an_answer_is_found_by_the_next_turn() -> None:
    engine = FakeEngine()
    first = engine.answer(PROMPT, generate=7)
    assert len(first.tokens) == 17
    assert engine.answer([*first.tokens, 5]).num_cached == 16


def test_the_first_token_decides_too() -> None:
    """Pages with equal tokens behind another beginning are other pages."""
    engine = FakeEngine()
    engine.answer(PROMPT)
    assert engine.answer([77, *PROMPT[1:]]).num_cached == 0
    assert engine.answer(PROMPT[4:]).num_cached == 0


@pytest.mark.parametrize(
    "other",
    [{"space": BERT}, {"space": CacheSpace("anna", "salt")}, {"version": "lora@1"}, {"shares": False}],
    ids=["another owner", "another salt", "another version", "no sharing"],
)
def test_nobody_else_finds_it(other: dict[str, object]) -> None:
    engine = FakeEngine()
    engine.answer(PROMPT)
    assert not engine.answer(PROMPT, **other).num_cached
    assert engine.prefilled == 20
    assert engine.answer(PROMPT).num_cached == 8


def test_owner_and_salt_cannot_be_shifted_into_each_other() -> None:
    pages = FakeEngine().pages
    roots = [pages.root("a", CacheSpace(o, s)) for o, s in (("x", "y"), ("xy", ""), ("", "xy"), ('x","y', ""))]
    assert len(set(roots)) == 4


def test_keys_differ_from_engine_to_engine() -> None:
    """Nobody can prepare two texts whose pages are taken for each other."""
    assert FakeEngine().pages.root("a", ANNA) != FakeEngine().pages.root("a", ANNA)


def test_prompt_logits_need_every_row_and_others_profit() -> None:
    engine = FakeEngine()
    engine.answer(PROMPT)
    assert engine.answer(PROMPT, needs_logits=True).num_cached == 0
    assert engine.prefilled == 20
    fresh = FakeEngine()
    fresh.answer(PROMPT, needs_logits=True)
    assert fresh.answer(PROMPT).num_cached == 8


def test_samples_of_one_prompt_share_its_prefill() -> None:
    engine = FakeEngine()
    seqs = [engine.add(PROMPT, generate=3) for _ in range(4)]
    assert [c.length for c in engine.step().prefill] == [10]
    plan = engine.step()
    assert [(c.start, c.length) for c in plan.prefill] == [(8, 2)] * 3 and plan.decode == (seqs[0],)
    assert len({tuple(seq.pages[:2]) for seq in seqs}) == 1 and len({seq.pages[2] for seq in seqs}) == 4
    engine.drain()
    assert engine.prefilled == 10 + 3 * 2


def test_followers_wait_for_a_long_prefill_and_not_for_an_aborted_one() -> None:
    engine = FakeEngine(max_prefill_rows=4)
    leader, follower = engine.add([*range(30)]), engine.add([*range(28), 7, 7])
    for _ in range(3):
        engine.step()
    assert follower.status is SequenceStatus.WAITING and leader.num_computed == 12
    engine.scheduler.abort(leader)
    assert [(c.seq, c.start) for c in engine.step().prefill] == [(follower, 12)]
    engine.drain()
    assert follower.num_cached == 12


def test_nobody_waits_for_a_sequence_that_comes_later() -> None:
    """Its prefill may be put off for long; whoever comes first does not wait with it."""
    engine = FakeEngine(max_prefill_rows=8)
    late = engine.add([*range(13)], priority=5)
    engine.step()
    early = engine.add([*range(13)], priority=0)
    assert [(c.seq, c.start, c.length) for c in engine.step().prefill] == [(late, 8, 5), (early, 8, 3)]
    engine.drain()


def test_kept_pages_give_way_to_whoever_needs_room() -> None:
    engine = FakeEngine(num_pages=4)
    engine.answer(PROMPT)
    assert engine.pages.num_kept == 2 and engine.allocator.num_free == 2
    big = engine.answer([*range(50, 65)])
    assert big.status is SequenceStatus.FINISHED and big.num_preemptions == 0
    assert engine.answer(PROMPT).num_cached == 0


def test_the_least_recently_used_end_goes_first() -> None:
    engine = FakeEngine(num_pages=6)
    engine.answer([*range(100, 109)])  # two full pages, older
    engine.answer(PROMPT[:9])  # two full pages
    engine.answer([*range(100, 109)])  # the older ones are used again
    engine.answer([*range(50, 62)])  # three pages: the two that are free, and one that was kept
    assert engine.found(PROMPT[:9]) == 4, "its last page was given up, its first one not"
    assert engine.found([*range(100, 109)]) == 8


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    engine = FakeEngine(num_pages=7)
    first, second = engine.add([*range(9)], generate=12), engine.add([*range(20, 29)], generate=6)
    engine.drain()
    assert second.num_preemptions == 1 and first.num_preemptions == 0
    assert second.num_cached == 0, "what it found of its own later is no saving for the one who asked"
    assert engine.prefilled < 9 + 9 + 9


def test_the_pages_of_a_failed_sequence_are_not_found_again() -> None:
    engine = FakeEngine()
    engine.answer(PROMPT)
    bad = engine.add(PROMPT, generate=9)
    engine.step()
    assert bad.num_cached == 8
    engine.scheduler.abort(bad, has_failed=True)
    assert engine.pages.num_kept == 0 and engine.allocator.num_free == engine.allocator.num_pages
    assert engine.answer(PROMPT).num_cached == 0


def test_switched_off_nothing_is_kept() -> None:
    engine = FakeEngine(prefix_cache=False)
    engine.answer(PROMPT)
    assert engine.answer(PROMPT).num_cached is None
    assert engine.pages.num_kept == 0 and engine.allocator.num_free == engine.allocator.num_pages


def test_growing_beyond_the_cache_takes_nothing() -> None:
    pages = PrefixCache(BlockAllocator(2, PAGE))
    seq = Sequence(seq_id=0, tokens=[1] * 12, prompt_len=12, max_total_len=12)
    with pytest.raises(OutOfKVMemoryError, match="3 KV pages asked for, 2 of 2 are available"):
        pages.grow(seq, 12)
    assert seq.pages == [] and pages.num_available == 2


def test_books_that_do_not_add_up_are_noticed() -> None:
    engine = FakeEngine()
    seq = engine.add(PROMPT, generate=5)
    engine.step()
    taken = seq.pages.pop()
    with pytest.raises(IntegrityError, match="other readers than are counted"):
        engine.pages.check_integrity([seq])
    seq.pages += [taken, taken]
    with pytest.raises(IntegrityError, match="holds a page twice"):
        engine.pages.check_integrity([seq])


class PrefixMachine(RuleBasedStateMachine):
    """Prompts with common beginnings, of several owners and versions, on a cache too small for them."""

    @initialize(
        num_pages=st.integers(4, 14),
        max_prefill_rows=st.sampled_from([12, 5, 1]),
        max_sequences=st.sampled_from([6, 3, 1]),
    )
    def start(self, num_pages: int, max_prefill_rows: int, max_sequences: int) -> None:
        self.engine = FakeEngine(num_pages, max_prefill_rows=max_prefill_rows, max_sequences=max_sequences)

    @rule(
        requests=st.lists(
            st.tuples(
                st.lists(st.integers(0, 1), max_size=4),
                st.lists(st.integers(0, 2), min_size=1, max_size=5),
                st.integers(1, 12),
                st.sampled_from(["base", "base", "lora@1", "lora@2"]),
                st.sampled_from([ANNA, ANNA, BERT]),
                st.integers(0, 1),
                st.sampled_from([False, False, False, True]),
            ),
            min_size=1,
            max_size=4,
        ),
        n=st.integers(1, 3),
    )
    def add(self, requests: list[tuple[list[int], list[int], int, str, CacheSpace, int, bool]], n: int) -> None:
        for blocks, rest, *options in requests:
            for _ in range(n):
                self.put([t for block in blocks for t in [block] * PAGE] + rest, *options)

    def put(
        self, tokens: list[int], generate: int, version: str, space: CacheSpace, priority: int, needs_logits: bool
    ) -> None:
        if -(-(len(tokens) + generate) // PAGE) <= self.engine.allocator.num_pages:
            self.engine.add(tokens, generate, version, space, priority, needs_logits=needs_logits)

    @precondition(lambda self: any(s.status is SequenceStatus.FINISHED for s in self.engine.sequences))
    @rule(data=st.data(), more=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def ask_on(self, data: st.DataObject, more: list[int]) -> None:
        """The next turn of a conversation."""
        finished = [s for s in self.engine.sequences if s.status is SequenceStatus.FINISHED]
        old = data.draw(st.sampled_from(finished))
        self.put([*old.tokens, *more][:40], 4, *self.engine.source[old.seq_id], 0, False)

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(data=st.data(), has_failed=st.booleans(), is_planned=st.booleans())
    def abort(self, data: st.DataObject, has_failed: bool, is_planned: bool) -> None:
        scheduler = self.engine.scheduler
        if is_planned:  # its rows never run
            scheduler.schedule()
        choices = [*scheduler.waiting, *scheduler.running]
        scheduler.abort(data.draw(st.sampled_from(choices)), has_failed=has_failed)

    @rule(steps=st.integers(1, 12))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.engine.scheduler.check_integrity()

    @invariant()
    def books_add_up(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.drain()
        event("found" if self.engine.pages.num_hit else "never found")
        event("preempted" if any(seq.num_preemptions for seq in self.engine.sequences) else "never preempted")


PrefixMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestPrefixMachine = PrefixMachine.TestCase
