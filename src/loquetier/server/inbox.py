"""What one thread hands to a task of an event loop, taken in groups so that a token does not cost a wake-up."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Items in order, for one task. Made on the event loop that runs the task.

    Args:
        interval: seconds between two groups, asked for at every group; 0 = each item as soon as it comes.
    """

    def __init__(self, interval: Callable[[], float]) -> None:
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()  # append and popleft are atomic
        self._wake = asyncio.Event()
        self._is_awaited = self._is_urgent = False
        self._last = -math.inf  # not 0: the clock of a machine that has just started is less than an interval
        """When the last group was taken."""

    def put(self, item: T, *, urgent: bool = False) -> int:
        """Add an item; how many wait now. One thread at a time. `urgent`: its group is taken at once.

        Raises:
            RuntimeError: the event loop is closed.
        """
        self._items.append(item)
        self._is_urgent |= urgent
        if self._is_awaited or urgent:
            self._is_awaited = False
            self._loop.call_soon_threadsafe(self._wake.set)
        return len(self._items)

    async def take(self) -> list[T]:
        """The next group: never empty, and at least an interval after the last one unless an item is urgent."""
        await self._pause()
        while not self._items:
            self._wake.clear()
            self._is_awaited = True
            if self._items:  # it came before the flag did
                break
            await self._wake.wait()
        self._last = self._loop.time()
        return self.take_now()

    def take_now(self) -> list[T]:
        """What is there; may be empty."""
        self._is_awaited = self._is_urgent = False
        return [self._items.popleft() for _ in range(len(self._items))]

    async def _pause(self) -> None:
        """Let items gather for the rest of the interval."""
        left = self._last + self._interval() - self._loop.time()
        if left <= 0:
            return
        self._wake.clear()
        timer = self._loop.call_later(left, self._wake.set)
        try:
            if not self._is_urgent:  # it came before the clear
                await self._wake.wait()
        finally:
            timer.cancel()
