"""The engine's thread: runs steps while there is work, and other threads' calls between two steps."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from loquetier.engine.engine import Engine
from loquetier.errors import EngineStoppedError

T = TypeVar("T")
_Call = tuple[Callable[[], object], "Future[object]"]

log = logging.getLogger("loquetier.engine")


class EngineLoop:
    """Owns the one thread that touches the engine, and so all torch compute."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = False
        self._fatal: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loquetier-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False after `stop`, and when the loop died of an internal error."""
        return self._thread.is_alive() and not self._stopped

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Have `call` run on the engine's thread before its next step.

        Raises:
            EngineStoppedError: the loop has ended.
        """
        future: Future[T] = Future()
        with self._lock:  # nothing may be queued behind the stop mark, where nobody would answer it
            if self._stopped:
                raise EngineStoppedError("the runtime is closed" + (f": {self._fatal}" if self._fatal else ""))
            self._calls.put((call, future))  # type: ignore[arg-type]
        return future

    def call(self, call: Callable[[], T]) -> T:
        """`submit` and wait; errors come out as they were raised. Must not be used on the engine's own thread."""
        assert threading.current_thread() is not self._thread, "would wait for itself"
        return self.submit(call).result()

    def stop(self) -> None:
        """Finish the running step, then end: open requests and jobs get EngineStoppedError. Idempotent."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._engine.on_device:
                self._work()
        except BaseException as error:  # a bug of ours: say so to everybody who waits, instead of hanging them
            log.exception("the engine loop died")
            self._fatal = error
        finally:
            with self._lock:
                self._stopped = True
            self._refuse_rest()
            reason = "the runtime was closed" if self._fatal is None else f"the engine loop died: {self._fatal}"
            self._engine.close(EngineStoppedError(reason))

    def _work(self) -> None:
        while self._answer_calls(wait=not self._engine.has_work):
            if self._engine.has_work:
                self._engine.step()

    def _answer_calls(self, *, wait: bool) -> bool:
        """Run what is queued; with `wait`, wait for the first call. False when it is time to stop."""
        while wait or not self._calls.empty():
            item = self._calls.get()
            if item is None:
                return False
            _answer(item)
            wait = False
        return True

    def _refuse_rest(self) -> None:
        while not self._calls.empty():
            item = self._calls.get()
            if item is not None:
                item[1].set_exception(EngineStoppedError("the runtime is closed"))


def _answer(item: _Call) -> None:
    call, future = item
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
