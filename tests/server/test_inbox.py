"""Groups of items, across threads: nothing is lost, nothing waits for ever, the interval is kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquetier.engine.request import TokenEvent
from loquetier.server.inbox import Inbox
from loquetier.server.pieces import LONGEST_INTERVAL, Part, apart, joined, stream_interval

FOREVER = 3600.0
"""Longer than any test: a group that waits for its interval's end would never come."""
DEADLINE = 60.0


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), DEADLINE))  # type: ignore[arg-type]


def test_the_first_item_is_taken_at_once_and_the_next_ones_gather() -> None:
    async def work() -> None:
        inbox: Inbox[int] = Inbox(lambda: FOREVER)
        inbox.put(1)
        assert await inbox.take() == [1]
        for item in (2, 3):
            assert inbox.put(item) == item - 1
        taking = asyncio.create_task(inbox.take())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not taking.done(), "its interval is not over"
        inbox.put(4, urgent=True)
        assert await taking == [2, 3, 4]

    run(work)


def test_an_urgent_item_that_came_before_the_pause_is_not_held() -> None:
    async def work() -> None:
        inbox: Inbox[int] = Inbox(lambda: FOREVER)
        inbox.put(1)
        assert await inbox.take() == [1]
        inbox.put(2, urgent=True)
        await asyncio.sleep(0)  # its wake-up is over
        assert await inbox.take() == [2]

    run(work)


def test_after_an_urgent_item_the_next_ones_gather_again() -> None:
    async def work() -> None:
        inbox: Inbox[int] = Inbox(lambda: FOREVER)
        inbox.put(1, urgent=True)
        assert await inbox.take() == [1]
        await asyncio.sleep(0)  # its wake-up is over
        inbox.put(2)
        taking = asyncio.create_task(inbox.take())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not taking.done(), "its interval is not over"
        inbox.put(3, urgent=True)
        assert await taking == [2, 3]

    run(work)


def test_the_first_item_is_taken_at_once_on_a_clock_that_has_just_started() -> None:
    async def work() -> None:
        asyncio.get_running_loop().time = lambda: 0.5  # type: ignore[method-assign]
        inbox: Inbox[int] = Inbox(lambda: FOREVER)
        inbox.put(1)
        taking = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        assert taking.done() and await taking == [1]

    asyncio.run(work())


def test_an_interval_ends() -> None:
    async def work() -> None:
        inbox: Inbox[int] = Inbox(lambda: 0.02)
        loop = asyncio.get_running_loop()
        inbox.put(1)
        await inbox.take()
        taken = loop.time()
        inbox.put(2)
        assert await inbox.take() == [2]
        # A loop's timers may be early by its clock's resolution.
        assert loop.time() - taken >= 0.02 - 1e-3

    run(work)


def test_after_a_quiet_interval_the_next_item_is_taken_at_once() -> None:
    async def work() -> None:
        waits = [0.0]
        inbox: Inbox[int] = Inbox(lambda: waits[0])
        taking = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        waits[0] = FOREVER  # not asked for again while this group waits for its first item
        inbox.put(1)
        assert await taking == [1]

    run(work)


def test_a_closed_loop_is_told_to_who_puts() -> None:
    async def work() -> Inbox[int]:
        inbox: Inbox[int] = Inbox(lambda: 0.0)
        taking = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        taking.cancel()
        return inbox

    inbox = asyncio.run(work())
    with pytest.raises(RuntimeError, match="closed"):
        inbox.put(1, urgent=True)


@pytest.mark.parametrize("interval", [0.0, 0.0005])
def test_nothing_is_lost_between_two_threads(interval: float) -> None:
    total = 20_000

    async def work() -> None:
        inbox: Inbox[int] = Inbox(lambda: interval)
        thread = threading.Thread(target=lambda: [inbox.put(i, urgent=i == total - 1) for i in range(total)])
        thread.start()
        found: list[int] = []
        while len(found) < total:
            group = await inbox.take()
            assert group
            found += group
        thread.join()
        assert found == list(range(total)) and inbox.take_now() == []

    run(work)


def test_the_interval_follows_the_load() -> None:
    assert [stream_interval(None, n) for n in (0, 1, 4)] == [0.0, 0.0, 0.0]
    assert stream_interval(None, 16) == pytest.approx(0.08)
    assert stream_interval(None, 1000) == LONGEST_INTERVAL
    assert stream_interval(0.0, 1000) == 0.0 and stream_interval(0.5, 1) == 0.5


EVENTS = st.lists(
    st.builds(
        lambda prompt, index, text, logprob: (prompt, TokenEvent(index, 7, text, logprob)),
        st.integers(0, 1),
        st.integers(0, 1),
        st.text("ab", max_size=3),
        st.sampled_from([None, None, -1.0]),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(EVENTS)
def test_joining_keeps_each_choice_s_text_and_log_probabilities(events: list[tuple[int, TokenEvent]]) -> None:
    found = joined(events)
    for key in {(p, e.index) for p, e in events}:
        before = [e for p, e in events if (p, e.index) == key]
        parts = [part for part in found if (part.prompt, part.event.index) == key]
        after = [part.event for part in parts]
        assert sum(part.num_tokens for part in parts) == len(before)
        assert "".join(e.text for e in after) == "".join(e.text for e in before)
        assert [e.logprob for e in after if e.logprob is not None] == [
            e.logprob for e in before if e.logprob is not None
        ]
        plain = [e.logprob is None for e in after]
        assert not any(a and b for a, b in pairwise(plain)), "two that could be one"


def test_the_last_event_ends_the_piece() -> None:
    first, last = TokenEvent(0, 5, "a"), TokenEvent(0, 6, "b", finish_reason="stop", stop_reason="END")
    assert joined([(0, first), (0, last)]) == [
        Part(0, TokenEvent(0, 6, "ab", finish_reason="stop", stop_reason="END"), num_tokens=2)
    ]


def test_an_end_without_a_token_is_none() -> None:
    events = [(1, TokenEvent(0, 5, "a")), (1, TokenEvent(0, None, "", finish_reason="abort"))]
    assert [part.num_tokens for part in apart(events)] == [1, 0]
    assert [part.num_tokens for part in joined(events)] == [1]
