"""Jobs that run in this process: started, taken up again after a restart, and let go at its end. Any thread."""

from __future__ import annotations

import sqlite3
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from loquetier.errors import DataError, EngineStoppedError, JobStateError, ServeOnlyError, typed
from loquetier.finetuning import FinetuneHandle
from loquetier.runtime import Runtime
from loquetier.server.file_check import FileChecker
from loquetier.server.jobs.bell import Bell
from loquetier.server.jobs.keeper import Keeper
from loquetier.server.jobs.patience import ClosingError, Patience
from loquetier.server.jobs.recorder import Recorder
from loquetier.server.jobs.settings import resolve, resolved, total_steps
from loquetier.server.jobs.shelf import Shelf
from loquetier.server.store.jobs import EventRow, JobRow
from loquetier.server.store.store import Store
from loquetier.training.job import JobStatus

log = structlog.get_logger("loquetier.server.jobs")

SERVE_ONLY = "this server cannot train: it was started with --serve-only; the job goes on under one without it"


@dataclass(slots=True)
class RunningJobs:
    """The engine's handles by job, and the threads that start jobs."""

    runtime: Runtime
    store: Store
    checker: FileChecker
    bell: Bell
    patience: Patience
    shelf: Shelf
    locks: dict[str, threading.RLock] = field(default_factory=lambda: defaultdict(threading.RLock))
    """One change of a job at a time."""
    _handles: dict[str, FinetuneHandle] = field(default_factory=dict)
    _launching: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)
    _restarted: set[str] = field(default_factory=set)
    """Jobs of an earlier life that have not come back yet."""
    _starting: set[str] = field(default_factory=set)
    _started: set[str] = field(default_factory=set)
    """Jobs whose start in this process is over, well or badly."""

    def launch(self, job_id: str, *, is_restart: bool) -> None:
        """Start a job on a thread of its own: its files may have to be looked at first."""
        with self._launching:
            if job_id in self._starting:
                return  # paused and resumed while its files were being looked at
            self._starting.add(job_id)
            thread = threading.Thread(target=self._run, args=(job_id, is_restart), name=f"start-{job_id}", daemon=True)
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()

    def _run(self, job_id: str, is_restart: bool) -> None:
        job = self.store.jobs.find(job_id)
        assert job is not None
        try:
            self._start(job, is_restart)
        except (ClosingError, EngineStoppedError):
            log.warning("job_waits_for_the_next_start", job=job_id)
        except ServeOnlyError as error:  # of an earlier life, which could train: that is no reason to end it
            log.warning("job_waits_for_the_next_start", job=job_id, problem=str(error))
            with suppress(ClosingError):
                self.patience.write(lambda c: self.store.jobs.update(c, job_id, status="queued", reason=SERVE_ONLY))
            self.bell.ring(job_id)
        except Exception as error:
            log.warning("job_cannot_start", job=job_id, problem=str(error))
            recorder = self._recorder(job, is_restart)
            try:
                recorder.fail(typed(error))
            except ClosingError:
                return
            self._forget(job_id)
        finally:
            self._starting.discard(job_id)
            self._started.add(job_id)

    def _start(self, job: JobRow, is_restart: bool) -> None:
        names = f"training file: {job.training_file}"
        names += f" and validation file: {job.validation_file}" if job.validation_file else ""
        self.patience.write(lambda c: tell(self.store, c, job.id, f"Validating {names}", once="validating"))
        self.bell.ring(job.id)
        counts = [self._examples(job, name) for name in ("training_file", "validation_file")]
        with self.locks[job.id]:
            self._begin(job.id, counts[0], is_restart)

    def _examples(self, job: JobRow, param: str) -> int:
        """How many examples a file of the job has, once that is known. Raises DataError, ClosingError."""
        file_id: str | None = getattr(job, param)
        if file_id is None:
            return 0
        if not self.checker.wait(file_id):
            raise ClosingError("the server is closing")
        file = self.store.files.any(file_id)
        prefix = "eval_data: " if param == "validation_file" else ""
        if file is None or (file.is_deleted and not job.settings.get("is_resolved")):
            raise DataError(f"{prefix}{file_id} was deleted before the job began")
        if file.status == "error":
            raise DataError(f"{prefix}{file.status_details}")
        assert file.num_examples is not None
        return file.num_examples

    def _begin(self, job_id: str, num_examples: int, is_restart: bool) -> None:
        """Hand the job to the engine, which checks the data once more and queues it."""
        job = self.store.jobs.find(job_id)
        assert job is not None
        if job.is_final:
            return
        settings = job.settings if job.settings.get("is_resolved") else resolve(job.settings, num_examples)
        ready = resolved(settings)
        place = self.store.data_dir.jobs / job_id
        # What a kill has left is older than what this life makes, and so are its numbers.
        num_left = sum(1 for _ in (place / "checkpoints").glob("step-*"))
        # Twice: publishes may be made up for. A number that this life gives away is never given to other weights.
        first = self._reserve(job, settings, num_left + 2 * total_steps(ready, num_examples) + 8)
        last = first + num_left - 1
        self.runtime.port.call(lambda engine: engine.registry.number_after(job.model, last)).result()
        evals = job.validation_file
        recorder = self._recorder(replace(job, settings=settings), is_restart, range(first, last + 1))
        try:
            handle = self.runtime.finetune(
                job.model,
                self.store.files.path(job.training_file),
                spec=ready.spec,
                training=ready.training,
                eval_data=None if evals is None else self.store.files.path(evals),
                output_dir=place / "files",
                report_to=[recorder],
                checkpoint_dir=place / "checkpoints",
                checkpoint_every=ready.checkpoint_every,
                resume=True,
                hold_checkpoints=True,
                validate_in_background=True,
            )
        except BaseException:
            recorder.attach(None)
            raise
        self._handles[job_id] = handle
        recorder.attach(handle)
        if job.wants_pause:  # told while its file was being looked at
            with suppress(JobStateError):
                handle.pause()

    def _reserve(self, job: JobRow, settings: dict[str, Any], num_versions: int) -> int:
        """Note the job's settings and keep numbers for its versions; the first of them."""

        def change(c: sqlite3.Connection) -> int:
            self.store.jobs.update(c, job.id, settings=settings)
            return self.store.adapters.reserve(c, job.model, num_versions)

        return self.patience.write(change)

    def _recorder(self, job: JobRow, is_restart: bool, numbers: range = range(0)) -> Recorder:
        keeper = Keeper(self.store, self.patience, self.shelf)
        return Recorder(job, self.store, self.patience, keeper, self.bell, self._forget, is_restart, numbers)

    def _forget(self, job_id: str) -> None:
        self._handles.pop(job_id, None)
        self.bell.ring(job_id)

    def handle(self, job_id: str) -> FinetuneHandle | None:
        """Of a job that runs in this process."""
        return self._handles.get(job_id)

    @property
    def num_running(self) -> int:
        """Jobs that the engine has."""
        return len(self._handles)

    def recover(self) -> None:
        """Start again what was under way when the process before this one ended; paused jobs stay paused."""
        found = [job for job in self.store.jobs.open() if not job.wants_pause]
        self._restarted |= {job.id for job in found}
        for job in found:
            self.launch(job.id, is_restart=True)

    @property
    def num_coming_back(self) -> int:
        """Jobs of an earlier life whose data is still being read, or whose rows do not tell yet that it was."""
        self._restarted -= {job_id for job_id in self._restarted if self._is_back(job_id)}
        return len(self._restarted)

    def _is_back(self, job_id: str) -> bool:
        handle = self._handles.get(job_id)
        if job_id not in self._started or (handle is not None and handle.status is JobStatus.VALIDATING_FILES):
            return False
        row = self.store.jobs.find(job_id)  # the recorder is a little behind the engine
        return handle is None or row is None or row.status != JobStatus.VALIDATING_FILES.value

    def close(self) -> None:
        """After the engine has stopped: what was recorded is on the disk when this returns."""
        self.patience.closing.set()
        for thread in self._threads:
            thread.join()
        for handle in list(self._handles.values()):
            handle.join()


def tell(store: Store, c: sqlite3.Connection, job_id: str, message: str, once: str | None = None) -> None:
    """An event without data."""
    store.jobs.tell(c, EventRow(job_id=job_id, once=once, message=message))
