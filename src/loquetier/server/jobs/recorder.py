"""Writes down what a job does, in order, as it does it: events, checkpoints, status, end. On the job's own thread.

A resumed job comes past steps that were told before; their events are told once (`EventRow.once`). What a kill cut off
between a checkpoint and its event is made up for from the checkpoint's history.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from loquetier.errors import DataError, EngineStoppedError, LoquetierError
from loquetier.finetuning import FinetuneHandle
from loquetier.reporting.events import JobEvent, JobStart
from loquetier.reporting.files import RESULTS_FILE
from loquetier.server.jobs.bell import Bell
from loquetier.server.jobs.keeper import Keeper
from loquetier.server.jobs.patience import ClosingError, Patience
from loquetier.server.jobs.shape import step_message, step_metrics
from loquetier.server.store.datadir import remove_durably
from loquetier.server.store.jobs import EventRow, JobRow
from loquetier.server.store.store import Store
from loquetier.training.job import JobStatus, StepRecord

log = structlog.get_logger("loquetier.server.jobs")


@dataclass(slots=True)
class Recorder:
    """One life of one job; a `JobObserver`."""

    job: JobRow
    store: Store
    patience: Patience
    keeper: Keeper
    bell: Bell
    ended: Callable[[str], None]
    """Told when the end is on the disk."""
    is_restart: bool
    numbers: range = range(0)
    """Of versions that an earlier life left as checkpoints: below all that this one publishes."""
    _handle: FinetuneHandle | None = None
    _attached: threading.Event = field(default_factory=threading.Event)
    _total_steps: int = 0
    _waiting: StepRecord | None = None
    """A step whose event waits for the evaluation of the same step."""
    _is_published: bool = False
    _is_held: bool = False

    def attach(self, handle: FinetuneHandle | None) -> None:
        """The job that is recorded; None when it could not be started. Until then events wait."""
        self._handle = handle
        self._attached.set()

    # --- JobObserver ---

    def begin(self, start: JobStart) -> None:
        """The data is good."""
        self._attached.wait()
        if self._handle is None:
            return
        self._total_steps = start.total_steps
        done = list(start.history)
        if start.is_evaluation_due:
            self._waiting = done.pop()

        def change(c: sqlite3.Connection) -> None:
            self._tell(c, "Files validated, moving job to queued state", once="validated")
            self._tell_cut(c, start)
            for record in done:
                self._tell_step(c, record)
            if self.is_restart:
                text = f"The server was restarted; the job goes on after step {len(start.history)}"
                self._tell(c, text, data={"step": len(start.history)})

        try:
            self._write(change)
            self._keep_what_a_kill_cut_off(start.history)
            self._handle.let_go(len(start.history))
        except ClosingError:
            log.warning("not_recorded", job=self.job.id, kind="begin")

    def _tell_cut(self, c: sqlite3.Connection, start: JobStart) -> None:
        """Examples longer than the job takes: their owner may have meant all of them."""
        if start.num_truncated:
            total, limit = start.num_examples + start.num_eval_examples, start.config.max_seq_len
            text = f"{start.num_truncated} of {total} examples are longer than max_seq_len={limit} and were cut"
            data = {"truncated_examples": start.num_truncated, "cut_tokens": start.num_cut_tokens}
            self._tell(c, text, level="warn", once="truncated", data=data)

    def _keep_what_a_kill_cut_off(self, history: tuple[StepRecord, ...]) -> None:
        """Checkpoints that are on the disk and had not become models before the process was killed."""
        assert self._handle is not None
        # In the order of their steps: what comes before a kept one was kept too, and may have been deleted.
        kept = max((version.step or 0 for version in self.store.adapters.versions(self.job.model)), default=0)
        left = [record for record in history[kept:] if self._handle.checkpoint_at(record.step) is not None]
        for record, number in zip(left, self.numbers, strict=False):  # checkpoints of one step are one version
            self._keep(record, number)

    def event(self, event: JobEvent) -> None:
        """Something happened. Raises only what is a bug of ours."""
        self._attached.wait()
        if self._handle is None or isinstance(event.error, EngineStoppedError):
            return  # not started; or the process ends, and the job goes on in the next one
        try:
            self._record(event)
        except ClosingError:
            log.warning("not_recorded", job=self.job.id, kind=event.kind)

    def close(self) -> None:
        """Nothing more will come."""

    # --- what is written ---

    def _record(self, event: JobEvent) -> None:
        record = event.record
        if event.kind == "step" and record is not None:
            if event.is_evaluation_due:
                self._waiting = record
            else:
                self._write(lambda c: self._tell_step(c, record))
        elif event.kind == "evaluation" and record is not None:
            self._waiting = None
            self._write(lambda c: self._tell_step(c, record))
        elif event.kind == "warning" and record is not None:
            text = f"Step {record.step} was skipped: {event.reason}"
            self._write(lambda c: self._tell(c, text, level="warn", once=f"skip-{record.step}"))
        elif event.kind == "checkpoint" and record is not None:
            assert self._handle is not None
            self._keep(record)
            self._handle.let_go(record.step)
        elif event.kind == "status":
            self._status(event)

    def _status(self, event: JobEvent) -> None:
        if event.status.is_final:
            if self._waiting is not None:  # ended before its evaluation was done
                record, self._waiting = self._waiting, None
                self._write(lambda c: self._tell_step(c, record))
            self._end(event)
            return
        held = event.reason if event.status is JobStatus.PAUSED and event.reason else None

        def change(c: sqlite3.Connection) -> None:
            if event.status is JobStatus.RUNNING:
                self._tell(c, "Fine-tuning job started", once="started")
            if held and not self._is_held:
                self._tell(c, f"The job is paused: {held}", level="warn", data={"code": "insufficient_storage"})
            elif self._is_held and not held:
                self._tell(c, "There is room again; the job goes on")
            self._mirror(c, event.reason)

        self._write(change)
        self._is_held = held is not None

    def _mirror(self, c: sqlite3.Connection, reason: str | None) -> None:
        """The row's status is the engine's now, not that of an event which may be old."""
        assert self._handle is not None
        status = self._handle.status
        if not status.is_final:
            self.store.jobs.update(c, self.job.id, status=status.value, reason=reason)

    def _tell_step(self, c: sqlite3.Connection, record: StepRecord) -> None:
        assert self._handle is not None
        data = step_metrics(record, self._total_steps)
        text = step_message(record, self._total_steps)
        self._tell(c, text, once=f"step-{record.step}", data=data, is_metrics=True)
        if not self._is_published and self._handle.job.versions:
            self._is_published = True
            self.store.jobs.complete(c, self.job.id, is_published=1)

    def _tell(
        self,
        c: sqlite3.Connection,
        message: str,
        *,
        level: Any = "info",
        once: str | None = None,
        data: dict[str, Any] | None = None,
        is_metrics: bool = False,
    ) -> None:
        kind: Any = "metrics" if is_metrics else "message"
        row = EventRow(job_id=self.job.id, once=once, level=level, type=kind, message=message, data=data)
        self.store.jobs.tell(c, row)

    def _write(self, change: Callable[[sqlite3.Connection], None]) -> None:
        self.patience.write(change)
        self.bell.ring(self.job.id)

    def _keep(self, record: StepRecord, number: int | None = None) -> None:
        """The newest checkpoint of a step, as a model; `number`: of its version, where this life has not served it."""
        handle = self._handle
        assert handle is not None
        path = handle.checkpoint_at(record.step)
        if path is None:  # it could not be written
            log.warning("checkpoint_missing", job=self.job.id, step=record.step)
            return
        best = handle.best
        is_live = handle.job.config.publish != "best" or (best is not None and best.step == record.step)
        number = handle.job.versions.get(record.step, number)
        self.keeper.keep_checkpoint(self.job, path, record, handle.job.spec, number, live=is_live)
        self.bell.ring(self.job.id)

    # --- the end ---

    def _end(self, event: JobEvent) -> None:
        handle = self._handle
        assert handle is not None
        history = handle.history
        tokens = sum(record.num_tokens for record in history)
        if event.status is JobStatus.SUCCEEDED:
            self._succeed(handle, history, tokens)
        elif event.status is JobStatus.FAILED:
            self.fail(event.error or LoquetierError("unknown"), tokens)
        else:
            self._write(lambda c: self._cancelled(c, tokens, event.reason))
        self.ended(self.job.id)
        self.bell.ring(self.job.id)
        handle.wait_files()  # nobody writes there any more
        remove_durably(self.store.data_dir.jobs / self.job.id)
        self.store.files.tidy()
        log.info("job_ended", job=self.job.id, status=event.status.value, steps=len(history))

    def _succeed(self, handle: FinetuneHandle, history: tuple[StepRecord, ...], tokens: int) -> None:
        store, job = self.store, self.job
        self._keep(history[-1])  # a kill may have come between the last checkpoint and its event
        best = handle.best
        if handle.job.config.publish == "best" and best is not None:
            self._keep(history[best.step - 1])
        handle.wait_files()
        file = self.keeper.place_results(job, store.data_dir.jobs / job.id / "files" / RESULTS_FILE)

        def change(c: sqlite3.Connection) -> None:
            if not store.jobs.update(
                c, job.id, status="succeeded", reason=handle.reason, finished_at=int(store.wall()),
                fine_tuned_model=job.model, result_files=[file.id], trained_tokens=tokens, is_published=1,
            ):  # fmt: skip
                return  # its owner has cancelled it at the last moment
            store.files.add(c, file)
            self._tell(c, f"New fine-tuned model created: {job.model}", once="created-model")
            self._tell(c, "The job has successfully completed", once="completed")

        store.fail_point("finish.before_commit")
        self._write(change)
        store.fail_point("finish.after_commit")

    def fail(self, error: LoquetierError, tokens: int | None = None) -> None:
        """The job has failed, durably."""
        problem = problem_of(error, self.store, self.job)

        def change(c: sqlite3.Connection) -> None:
            if self.store.jobs.update(
                c, self.job.id, status="failed", finished_at=int(self.store.wall()), error=problem, reason=None,
                trained_tokens=tokens,
            ):  # fmt: skip
                self._tell(c, f"The job failed. {problem['message']}", level="error", data={"code": problem["code"]})
            self.store.adapters.forget_unborn(c, self.job.id)

        self._write(change)

    def _cancelled(self, c: sqlite3.Connection, tokens: int, reason: str | None) -> None:
        """By its owner, who has been answered already, or by a callback."""
        now = int(self.store.wall())
        if self.store.jobs.update(c, self.job.id, status="cancelled", finished_at=now, reason=reason):
            self._tell(c, "The job was cancelled")
        self.store.jobs.complete(c, self.job.id, trained_tokens=tokens)
        self.store.adapters.forget_unborn(c, self.job.id)


def problem_of(error: LoquetierError, store: Store, job: JobRow) -> dict[str, Any]:
    """A job's `error` object: no paths of this machine in it."""
    text = str(error)
    for file_id in (job.training_file, job.validation_file):
        if file_id is not None:
            text = text.replace(str(store.files.path(file_id)), file_id)
    text = text.replace(str(store.data_dir.root), "the data directory")
    param = None
    if isinstance(error, DataError):
        param = "validation_file" if text.startswith("eval_data: ") else "training_file"
        text = "The job failed due to an invalid " + param.replace("_", " ") + ". " + text.removeprefix("eval_data: ")
    code = error.code if error.status < 500 or error.code in _OWN_CODES else "server_error"
    return {"code": code, "message": text[:2000], "param": param}


_OWN_CODES = frozenset({"training_diverged", "insufficient_storage", "insufficient_adapter_memory"})
"""Of 5xx errors, those that tell the owner of a job something."""
