"""What a caller holds of a fine-tuning job: its state, its history, pause, resume, cancel, wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from loquetier.engine.engine import Engine
from loquetier.engine.loop import EngineLoop
from loquetier.errors import EngineStoppedError, LoquetierError
from loquetier.reporting.callbacks import as_observer
from loquetier.reporting.events import JobCallback, JobEvent, JobObserver, JobStart
from loquetier.reporting.files import JobFiles
from loquetier.reporting.pump import EventPump
from loquetier.storage import StorageWait
from loquetier.training.checkpoint_dir import Resumed
from loquetier.training.ending import BestEvaluation, best_evaluation, is_last_step
from loquetier.training.job import FinetuneJob, JobImage, JobStatus, StepRecord
from loquetier.training.memory import MemoryEstimate

__all__ = ["FinetuneHandle", "JobCallback", "JobEvent", "JobObserver", "poll_steps"]

log = logging.getLogger("loquetier.jobs")


class FinetuneHandle:
    """A job, seen from outside the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        loop: EngineLoop,
        callbacks: Sequence[JobCallback | object] = (),
        reporters: Sequence[JobObserver] = (),
        output_dir: Path | None = None,
        resumed_job: str | None = None,
    ) -> None:
        """Open the job's files and start the threads that tell of it.

        `resumed_job`: the job's name if it may go on from a checkpoint; files that it left in `output_dir` go on too.

        Raises:
            ConfigError: a callback is no callback, or `output_dir` cannot be used. Nothing is left behind.
        """
        self._engine, self._loop = engine, loop
        self._job: FinetuneJob | None = None
        self._has_begun = False
        self._ended = threading.Event()
        self.callbacks = tuple(callbacks)
        self.resumed: Resumed | None = None
        """The checkpoint that the job went on from, if it did."""
        self.checkpoint_errors: list[Exception] = []
        """Why checkpoints could not be written (disk full, ...); the one before stays, and the job goes on."""
        self.checkpoint_at: Callable[[int], Path | None] = lambda step: None
        """The checkpoint of a step, if there is one now; set where the job's checkpoints are opened."""
        self.let_go: Callable[[int], None] = lambda step: None
        """With `hold_checkpoints`: those up to this step may be removed. Set where the job's checkpoints are opened."""
        observers = [*(as_observer(callback, self._stop) for callback in self.callbacks), *reporters]
        self._storage_waits: list[StorageWait] = []
        self._files_wait = None if output_dir is None else self.storage_wait("files", output_dir)
        self._files = None
        if output_dir is not None and self._files_wait is not None:
            self._files = JobFiles(output_dir, resumed_job, engine.jobs.fail_point, self._files_wait.run)
        self._pump = EventPump(observers, "loquetier-callbacks")
        # On a thread of their own, which runs nothing of the caller's: `wait` may wait for it.
        self._file_pump = EventPump([self._files] if self._files else [], "loquetier-job-files")

    def storage_wait(self, key: str, directory: Path) -> StorageWait:
        """What runs writes into `directory` and holds the job while the disk is full; done by the runtime."""
        jobs = self._engine.jobs
        wait = StorageWait(
            directory,
            lambda reason: self.on_engine(lambda: jobs.hold(self.job, key, reason)),
            lambda: self.on_engine(lambda: jobs.release_hold(self.job, key)),
        )
        self._storage_waits.append(wait)
        return wait

    def on_engine(self, call: Callable[[], None]) -> None:
        """Have `call` run on the engine's thread, soon; never waits."""
        with suppress(EngineStoppedError):  # a closed runtime has ended the job itself
            self._loop.submit(call)

    @property
    def callback_errors(self) -> list[Exception]:
        """What callbacks and reporters raised; none of it can fail a job."""
        return self._pump.errors

    @property
    def file_errors(self) -> list[Exception]:
        """Why lines of the job's files are missing, if any are."""
        return self._file_pump.errors

    def _attach(self, job: FinetuneJob) -> None:
        """The job's first word: from here on the handle is its. Observers begin when its data is known."""
        self._job = job
        if job.examples and not self._has_begun:
            self._has_begun = True
            self._begin(job)

    def _begin(self, job: FinetuneJob) -> None:
        cut = [e.num_cut for e in (*job.examples, *job.eval_examples) if e.num_cut]
        start = JobStart(
            job.name,
            job.config,
            job.spec,
            job.total_steps,
            len(job.examples),
            len(job.eval_examples),
            None if self._files is None else self._files.directory,
            tuple(job.history),
            bool(job.history) and job.is_eval_due and job.history[-1].evaluation is None,
            len(cut),
            sum(cut),
        )
        for pump in (self._pump, self._file_pump):
            pump.begin(start)

    def discard(self) -> None:
        """The job could not be started: end the threads and remove the files."""
        self._end()
        self._file_pump.join()
        if self._files is not None:
            self._files.remove()

    def listen(self, job: FinetuneJob, record: StepRecord | None) -> None:
        """The engine's listener: queues events, never blocks."""
        self._attach(job)
        if record is None:
            self._put(JobEvent("status", job.name, job.status, None, job.error, job.reason))
        elif record.evaluation is not None:
            is_last = is_last_step(job)
            self._put(JobEvent("evaluation", job.name, job.status, record, is_last_step=is_last))
        else:
            if record.skipped:
                log.warning("job %s: step skipped: %s", job.name, record.reason)
                self._put(JobEvent("warning", job.name, job.status, record, reason=record.reason))
            due, is_last = job.is_eval_due, is_last_step(job)
            self._put(JobEvent("step", job.name, job.status, record, None, record.reason, due, is_last))
        if job.status.is_final:
            if self._files_wait is not None and job.status is not JobStatus.SUCCEEDED:
                self._files_wait.give_up()
            self._end()

    def checkpoint_saved(self, image: JobImage, path: Path) -> None:
        """A checkpoint is on the disk; called on the thread that wrote it."""
        if not image.history:
            return
        step = len(image.history)
        self._put(JobEvent("checkpoint", image.name, image.status, image.history[-1], checkpoint=path))
        if image.config.publish == "checkpoint":
            with suppress(EngineStoppedError):  # closed meanwhile: nothing is served any more
                self._loop.submit(lambda: self._engine.jobs.publish_weights(self.job, image.master, step))

    def _put(self, event: JobEvent) -> None:
        for pump in (self._pump, self._file_pump):
            pump.put(event)

    def _end(self) -> None:
        for pump in (self._pump, self._file_pump):
            pump.close()
        self._ended.set()

    def _stop(self) -> None:
        """A callback set `control.should_training_stop`."""

        def cancel() -> None:
            if not self.job.status.is_final:
                reason = "a callback set control.should_training_stop"
                self._engine.jobs.set_status(self.job, JobStatus.CANCELLED, reason)

        self.on_engine(cancel)

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
    def reason(self) -> str | None:
        """Why it is in its state, where that does not say it: what it waits for, why it is paused or ended early."""
        return self.job.reason

    @property
    def error(self) -> LoquetierError | None:
        """Why it failed; None unless it did."""
        return self.job.error

    @property
    def position(self) -> int | None:
        """1-based place in the queue; None when it is not queued."""
        return self.job.position

    @property
    def estimate(self) -> MemoryEstimate | None:
        """What it needs, by estimate; None while its data is not known."""
        return self.job.estimate

    @property
    def best(self) -> BestEvaluation | None:
        """Its best evaluation so far, and where its weights are; None before the first."""
        best = best_evaluation(self.history)
        if best is None:
            return None
        return replace(best, checkpoint=self.checkpoint_at(best.step), version=self.job.versions.get(best.step))

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
        """Go on where `pause` stopped. Raises JobStateError.

        A job that is held because the disk is full tries to write at once, and goes on when it could.
        """
        for wait in self._storage_waits:
            wait.try_now()
        self._loop.call(lambda: self._engine.jobs.set_status(self.job, JobStatus.RUNNING))

    def cancel(self) -> None:
        """End within one step; versions published so far keep answering. Raises JobStateError."""
        self._loop.call(lambda: self._engine.jobs.set_status(self.job, JobStatus.CANCELLED))

    def wait(self, timeout: float | None = None) -> tuple[StepRecord, ...]:
        """Wait for the end, the job's files included, and return the history.

        Raises:
            TimeoutError: not ended after `timeout` seconds. LoquetierError: the job failed, and this is why.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._ended.wait(timeout):
            raise TimeoutError(f"job {self.name!r} is still {self.status.value} after {timeout} s")
        if not self._file_pump.join(None if deadline is None else max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"job {self.name!r} has ended, but its files are still being written after {timeout} s")
        if self.job.status is JobStatus.FAILED:
            assert self.job.error is not None
            raise self.job.error
        return self.history

    def wait_files(self) -> None:
        """After the end: wait until the job's files are written."""
        self._file_pump.join()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until its observers were told of the end; False when they were not within `timeout` seconds.

        Must not be called by an observer.
        """
        return self._pump.join(timeout) and self._file_pump.join(timeout)


def poll_steps(handle: FinetuneHandle, seconds: float = 0.2) -> Iterator[StepRecord]:
    """Records as they come, until the job ends (for progress displays)."""
    seen = 0
    while True:
        ended = handle._ended.wait(seconds)
        yield from handle.history[seen:]
        seen = len(handle.history)
        if ended:
            return
