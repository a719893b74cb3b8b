"""Wakes the streams of a job's events when there are new ones."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass(slots=True)
class Bell:
    """Rung by any thread, heard on the event loop."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _heard: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = field(
        default_factory=lambda: defaultdict(set)
    )

    @contextmanager
    def listening(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set at each ring; event loop only."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._heard[job_id].add(entry)
        try:
            yield entry[1]
        finally:
            with self._lock:
                self._heard[job_id].discard(entry)
                if not self._heard[job_id]:
                    del self._heard[job_id]

    def ring(self, job_id: str | None = None) -> None:
        """There is something new of a job; None: of all."""
        with self._lock:
            entries = [e for name, found in self._heard.items() if job_id in (None, name) for e in found]
        for loop, event in entries:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(event.set)
