"""Work that must not stop the engine's steps: files are read, checked and written on threads of their own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar

from loquetier.errors import EngineStoppedError

log = logging.getLogger("loquetier.background")

T = TypeVar("T")
Result = Callable[[], T]
"""Gives what the work came to, or raises what it raised."""


class Background(Protocol):
    """Where such work is done."""

    def submit(self, work: Callable[[], T], done: Callable[[Result[T]], None]) -> None:
        """Do `work` somewhere; then call `done` with its result on the engine's thread, between two steps."""

    def clean_up(self, work: Callable[[], object]) -> None:
        """Do `work` somewhere, also when the end has begun: what it removes would stay behind otherwise."""

    def close(self) -> None:
        """End; what is under way finishes first, and all that is to be cleaned up. Nobody is told of results."""


class Inline:
    """For an engine without a loop: the work is done at once."""

    def submit(self, work: Callable[[], T], done: Callable[[Result[T]], None]) -> None:
        """See `Background`."""
        done(_result_of(work))

    def clean_up(self, work: Callable[[], object]) -> None:
        """See `Background`."""
        _log_error(_result_of(work))

    def close(self) -> None:
        """Nothing to end."""


class Threads:
    """A few worker threads that answer through the engine's loop.

    Args:
        post: has a call made on the engine's thread; may raise EngineStoppedError.
    """

    def __init__(self, post: Callable[[Callable[[], None]], Future[None]], num_threads: int = 2) -> None:
        self._post = post
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="loquetier-adapters")

    def submit(self, work: Callable[[], T], done: Callable[[Result[T]], None]) -> None:
        """See `Background`."""

        def run() -> None:
            if self._closing.is_set():
                return  # nobody is left who could use it
            result = _result_of(work)
            with suppress(EngineStoppedError):  # closed meanwhile
                self._post(lambda: done(result)).add_done_callback(_log_failure)

        self._pool.submit(run)

    def clean_up(self, work: Callable[[], object]) -> None:
        """See `Background`."""
        self._pool.submit(lambda: _log_error(_result_of(work)))

    def close(self) -> None:
        """See `Background`."""
        self._closing.set()
        # Without `cancel_futures`, which would drop what is to be cleaned up as well.
        self._pool.shutdown(wait=True)


def _result_of(work: Callable[[], T]) -> Result[T]:
    done: Future[T] = Future()
    try:
        done.set_result(work())
    except Exception as error:
        done.set_exception(error)
    return done.result


def _log_error(result: Result[object]) -> None:
    try:
        result()
    except Exception:
        log.exception("cleaning up failed")


def _log_failure(future: Future[None]) -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None and not isinstance(error, EngineStoppedError):
        log.error("what a background thread brought could not be taken in", exc_info=error)
