"""What a caller holds of a fine-tuning job: its state, its history, pause, resume, cancel, wait."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from loquetier.engine.engine import Engine
from loquetier.engine.loop import EngineLoop
from loquetier.errors import LoquetierError
from loquetier.training.checkpoint_dir import Resumed
from loquetier.training.job import FinetuneJob, JobStatus, StepRecord

log = logging.getLogger("loquetier.jobs")


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job."""

    kind: Literal["step", "evaluation", "status"]
    job_name: str
    status: JobStatus
    record: StepRecord | None = None
    """The step's record (kind "step"), or the same with its evaluation filled in (kind "evaluation")."""
    error: LoquetierError | None = None
    """Why it failed."""


JobCallback = Callable[[JobEvent], None]


class FinetuneHandle:
    """A job, seen from outside the engine's thread."""

    def __init__(self, engine: Engine, loop: EngineLoop, callbacks: Sequence[JobCallback]) -> None:
        self._engine, self._loop = engine, loop
        self._job: FinetuneJob | None = None
        self._ended = threading.Event()
        self._events: queue.SimpleQueue[JobEvent | None] = queue.SimpleQueue()
        self.callbacks = tuple(callbacks)
        self.callback_errors: list[Exception] = []
        """What callbacks raised; a callback can never fail a job."""
        self.resumed: Resumed | None = None
        """The checkpoint that the job went on from, if it did."""
        self.checkpoint_errors: list[Exception] = []
        """Why checkpoints could not be written (disk full, ...); the one before stays, and the job goes on."""
        if self.callbacks:
            threading.Thread(target=self._run_callbacks, name="loquetier-callbacks", daemon=True).start()

    def attach(self, job: FinetuneJob) -> None:
        """Tie the handle to its job; done by the runtime."""
        self._job = job

    def discard(self) -> None:
        """The job could not be started: end the callback thread."""
        self._end()

    def listen(self, job: FinetuneJob, record: StepRecord | None) -> None:
        """The engine's listener: queues an event, never blocks."""
        kind: Literal["step", "evaluation", "status"] = "status"
        if record is not None:
            kind = "step" if record.evaluation is None else "evaluation"
        if self.callbacks:
            self._events.put(JobEvent(kind, job.name, job.status, record, job.error))
        if job.status.is_final:
            self._end()

    def _end(self) -> None:
        if self.callbacks:
            self._events.put(None)
        self._ended.set()

    def _run_callbacks(self) -> None:
        for event in iter(self._events.get, None):
            for callback in self.callbacks:
                try:
                    callback(event)
                except Exception as error:
                    log.exception("a callback of job %s failed", event.job_name)
                    self.callback_errors.append(error)

    @property
    def job(self) -> FinetuneJob:
        """The engine's own object: read it, change it only through this handle."""
        assert self._job is not None
        return self._job

    @property
    def name(self) -> str:
        """The name under which its published versions answer."""
        return self.job.name

    @property
    def status(self) -> JobStatus:
        """Where it is now."""
        return self.job.status

    @property
    def history(self) -> tuple[StepRecord, ...]:
        """One record per optimizer step done."""
        return tuple(self.job.history)

    @property
    def total_steps(self) -> int:
        """Optimizer steps it will make."""
        return self.job.total_steps

    def pause(self) -> None:
        """Stop after what is in the current step; the optimizer's state is kept. Raises JobStateError."""
        self._loop.call(lambda: self._engine.jobs.set_status(self.job, JobStatus.PAUSED))

    def resume(self) -> None:
        """Go on where `pause` stopped. Raises JobStateError."""
        self._loop.call(lambda: self._engine.jobs.set_status(self.job, JobStatus.RUNNING))

    def cancel(self) -> None:
        """End within one step; versions published so far keep answering. Raises JobStateError."""
        self._loop.call(lambda: self._engine.jobs.set_status(self.job, JobStatus.CANCELLED))

    def wait(self, timeout: float | None = None) -> tuple[StepRecord, ...]:
        """Wait for the end and return the history.

        Raises:
            TimeoutError: not ended after `timeout` seconds. LoquetierError: the job failed, and this is why.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"job {self.name!r} is still {self.status.value} after {timeout} s")
        if self.job.status is JobStatus.FAILED:
            assert self.job.error is not None
            raise self.job.error
        return self.history


def poll_steps(handle: FinetuneHandle, seconds: float = 0.2) -> Iterator[StepRecord]:
    """Records as they come, until the job ends (for progress displays)."""
    seen = 0
    while True:
        ended = handle._ended.wait(seconds)
        yield from handle.history[seen:]
        seen = len(handle.history)
        if ended:
            return
