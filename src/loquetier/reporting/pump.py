"""A thread that hands a job's events to its observers, so that none of them can hold up or fail the engine."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from loquetier.reporting.events import JobEvent, JobObserver, JobStart

log = logging.getLogger("loquetier.jobs")


class EventPump:
    """Events in, calls out, in order, on one daemon thread; with no observers it does nothing at all."""

    def __init__(self, observers: Sequence[JobObserver], name: str) -> None:
        self._observers = tuple(observers)
        self.errors: list[Exception] = []
        """What observers raised, in order."""
        self._queue: queue.SimpleQueue[JobStart | JobEvent | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True) if observers else None
        if self._thread is not None:
            self._thread.start()

    def begin(self, start: JobStart) -> None:
        """Queue the start. Never blocks."""
        self._put(start)

    def put(self, event: JobEvent) -> None:
        """Queue an event. Never blocks."""
        self._put(event)

    def close(self) -> None:
        """Queue the end: observers are closed after everything before it was delivered."""
        self._put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until everything was delivered after `close`; False when it was not within `timeout` seconds."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _put(self, item: JobStart | JobEvent | None) -> None:
        if self._thread is not None:  # nobody would ever take it out again
            self._queue.put(item)

    def _run(self) -> None:
        for item in iter(self._queue.get, None):
            for observer in self._observers:
                if isinstance(item, JobStart):
                    self._guarded(observer, observer.begin, item)
                else:
                    self._guarded(observer, observer.event, item)
        for observer in self._observers:
            self._guarded(observer, observer.close)

    def _guarded(self, observer: JobObserver, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception as error:
            log.exception("%s of a job failed; the job goes on", type(observer).__name__)
            self.errors.append(error)
