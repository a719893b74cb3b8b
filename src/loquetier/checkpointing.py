"""A job's checkpoints while it runs: copied on the engine's thread between two tapes, written on another one."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from loquetier.adapters.spec import AdapterSpec, ModulePlan, resolve_modules
from loquetier.config import TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.engine.trainer import JobListener
from loquetier.errors import CheckpointError
from loquetier.finetuning import FinetuneHandle
from loquetier.storage import StorageWait, check_room
from loquetier.training.checkpoint import JobIdentity, checkpoint_bytes, read_checkpoint, write_checkpoint
from loquetier.training.checkpoint_dir import CheckpointConfig, CheckpointDirectory
from loquetier.training.checkpoint_state import DataDigest
from loquetier.training.ending import best_evaluation, improved_now
from loquetier.training.example import Example
from loquetier.training.job import FinetuneJob, JobImage, JobStatus, StepRecord

log = logging.getLogger("loquetier.jobs")


class CheckpointSaver:
    """Stands between a job and its listener, and saves the job every so many steps, at its end, and when asked to.

    No checkpoint is left out: a job that is faster than the disk waits before its next step (`FinetuneJob.is_ahead`).

    Args:
        directory: open; closed here when the job has ended.
        held: the image that the job goes on from, which is on the disk already.
        inner: who else is told. Of the job's end it is told when the last checkpoint is on the disk.
        errors: what failed writes raised; a failed write costs a checkpoint, never the job.
        saved: told of each checkpoint that is on the disk, on the thread that wrote it.
        served: weights that were served before a break and are not those of `held`, and their step.
        storage: runs the writes, and holds the job while the disk is full.
        on_engine: runs a call on the engine's thread, soon.
    """

    def __init__(
        self,
        engine: Engine,
        directory: CheckpointDirectory,
        identity: JobIdentity,
        held: JobImage | None,
        inner: JobListener,
        errors: list[Exception],
        saved: Callable[[JobImage, Path], None],
        storage: StorageWait,
        on_engine: Callable[[Callable[[], None]], None],
        served: tuple[Tensor, int] | None = None,
    ) -> None:
        self._on_engine = on_engine
        self._directory, self._identity, self._inner = directory, identity, inner
        self._saved, self.served = saved, served
        self._base_name, self._fail_point = engine.base.name, engine.jobs.fail_point
        self._modules: tuple[ModulePlan, ...] = resolve_modules(identity.spec, engine.base.targets)
        self._place = _place(held) if held else None
        self._writer = _Writer(self._write, errors, storage)

    def listen(self, job: FinetuneJob, record: StepRecord | None) -> None:
        """The job's listener; engine thread only."""
        if job.status.is_final:
            # A failed job's state may be the reason of its failure: the last periodic checkpoint is the good one.
            is_kept = job.has_memory and job.status in (JobStatus.SUCCEEDED, JobStatus.CANCELLED)
            # Who cancels wants an end now, and what failed has none to wait for; a success is worth waiting for room.
            is_patient = job.status is JobStatus.SUCCEEDED
            self._writer.finish(job.image() if is_kept else None, lambda: self._ended(job), is_patient=is_patient)
            return
        self._inner(job, record)
        # After a skipped step the job may be on its way to divergence: what was saved before stays the last good one.
        is_complete = (
            record is not None and not record.skipped and (record.evaluation is not None or not job.is_eval_due)
        )
        is_last = job.num_steps == job.total_steps
        is_best = record is not None and record.evaluation is not None and improved_now(job.history)
        is_due = is_complete and job.num_steps % self._directory.config.every == 0
        if (is_due or is_best) and not is_last:
            self.save(job)

    def save(self, job: FinetuneJob) -> None:
        """One more checkpoint, of a job that goes on or is about to be closed; engine thread only."""

        def look() -> None:
            job.is_ahead = self._writer.is_full

        self._writer.put(job.image(), lambda: self._on_engine(look))
        look()

    @property
    def is_open(self) -> bool:
        """False when the job has ended and its last checkpoint is written."""
        return self._writer.is_alive

    def close(self) -> None:
        """Wait until everything is written; only when the job has ended, or could not be started."""
        self._writer.finish(None, self._directory.close, is_patient=False)
        self._writer.join()

    def _ended(self, job: FinetuneJob) -> None:
        self._directory.close()
        self._inner(job, None)

    def _write(self, image: JobImage) -> None:
        """OSError where it fails; nothing is left behind then."""
        if _place(image) == self._place:
            return  # closed, or ended, right after a checkpoint

        def write(path: Path) -> None:
            write_checkpoint(
                path,
                image,
                self._modules,
                base_name=self._base_name,
                base_fingerprint=self._identity.base_fingerprint,
                data=self._identity.data,
                fail_point=self._fail_point,
                template_fingerprint=self._identity.template_fingerprint,
            )

        best = best_evaluation(image.history)
        path = self._directory.add(len(image.history), write, best.step if best else None)
        self._place = _place(image)
        self._saved(image, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewJob:
    """What a job is, before it has a slot."""

    name: str
    spec: AdapterSpec
    config: TrainingConfig
    examples: tuple[Example, ...]
    eval_examples: tuple[Example, ...]


def open_checkpoints(
    engine: Engine, handle: FinetuneHandle, config: CheckpointConfig, job: NewJob
) -> tuple[CheckpointSaver, JobImage | None]:
    """The saver of a job that is about to start, and the image to go on from, if there is one and it is wanted.

    Raises:
        ConfigError: the directory is in use, holds checkpoints nobody asked for, or those of another job.
        CheckpointError: all checkpoints are damaged, or the directory cannot be written.
        AdapterError: the spec does not fit the base.
    """
    identity = JobIdentity(
        name=job.name,
        spec=job.spec,
        config=job.config,
        data=DataDigest.of(job.examples, job.eval_examples),
        base_fingerprint=engine.base.fingerprint,
        template_fingerprint=engine.jobs.publisher.template_fingerprint,
    )
    try:
        directory = CheckpointDirectory(config, engine.jobs.fail_point)
    except OSError as error:
        raise CheckpointError(f"cannot use checkpoint_dir={str(config.directory)!r}: {error.strerror}") from error
    try:
        _check_storage(directory, job, resolve_modules(job.spec, engine.base.targets))
        found = directory.newest(engine.base.targets, identity, job.examples, job.eval_examples)
        image, handle.resumed = found or (None, None)
        served = None if image is None else _best_weights(engine, directory, identity, image)
        errors, saved = handle.checkpoint_errors, handle.checkpoint_saved
        storage = handle.storage_wait("checkpoints", directory.path)
        ears = (handle.listen, errors, saved)
        saver = CheckpointSaver(engine, directory, identity, image, *ears, storage, handle.on_engine, served)
        handle.checkpoint_at, handle.let_go = directory.at_step, directory.let_go
    except BaseException:
        directory.close()
        raise
    return saver, image


def _best_weights(
    engine: Engine, directory: CheckpointDirectory, identity: JobIdentity, image: JobImage
) -> tuple[Tensor, int] | None:
    """With publish="best", what was served before the break: the weights of the best evaluation, and its step."""
    best = best_evaluation(image.history)
    if image.config.publish != "best" or best is None:
        return None
    if best.step == len(image.history):
        return image.master, best.step
    path = directory.at_step(best.step)
    try:
        if path is None:
            raise CheckpointError(f"checkpoint_dir={str(directory.path)!r} has no checkpoint of step {best.step}")
        found, _ = read_checkpoint(path, engine.base.targets, identity, image.examples, image.eval_examples)
    except CheckpointError as error:
        log.warning("job %s: the best weights so far cannot be served again: %s", identity.name, error)
        return None
    return found.master, best.step


def _check_storage(directory: CheckpointDirectory, job: NewJob, modules: tuple[ModulePlan, ...]) -> None:
    per_step = job.config.batch_size * job.config.gradient_accumulation_steps
    steps = job.config.max_steps or job.config.num_epochs * -(-len(job.examples) // per_step)
    # A new one is complete before the oldest goes.
    most = min(directory.config.keep + 1, steps // directory.config.every + 1)
    count = max(1, most - len(directory.checkpoints()))
    check_checkpoints_fit(directory.path, job.name, modules, count, steps)


def check_checkpoints_fit(
    directory: Path, name: str, modules: tuple[ModulePlan, ...], count: int = 1, steps: int = 1
) -> None:
    """Whether there is room for so many checkpoints of a job, the last of them after `steps`.

    Raises:
        InsufficientStorageError: there is not, with the numbers.
    """
    what = f"{count} checkpoints of job {name!r}"
    check_room(directory, count * checkpoint_bytes(modules, steps), what, "lower checkpoints_to_keep or r")


def _place(image: JobImage) -> tuple[object, ...]:
    """Where a job is: two images of one job at one place are the same."""
    return (image.history, image.num_draws, image.todo)


class _Writer:
    """One thread, which writes every image that it is given, in order."""

    def __init__(self, write: Callable[[JobImage], None], errors: list[Exception], storage: StorageWait) -> None:
        self._write, self._errors, self._storage = write, errors, storage
        self._changed = threading.Condition()
        self._waiting: deque[tuple[JobImage, Callable[[], None]]] = deque()
        """Oldest first; the first one is being written. Each with who is told when it was, well or badly."""
        self._at_end: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="loquetier-checkpoints", daemon=True)
        self._thread.start()

    def put(self, image: JobImage, done: Callable[[], None] = lambda: None) -> None:
        """Write `image` soon; never waits."""
        with self._changed:
            self._waiting.append((image, done))
            self._changed.notify()

    @property
    def is_full(self) -> bool:
        """One image is being written and another one waits: who makes them shall wait too. Any thread."""
        return len(self._waiting) >= 2

    def finish(self, image: JobImage | None, at_end: Callable[[], None], *, is_patient: bool) -> None:
        """Write what waits, and then `image` if given, then call `at_end` and end.

        Where the disk is full: when there is room, or, not `is_patient`, after one more try.
        """
        if not is_patient:
            self._storage.give_up()
        with self._changed:
            if image is not None:
                self._waiting.append((image, lambda: None))
            self._at_end = self._at_end or at_end
            self._changed.notify()

    @property
    def is_alive(self) -> bool:
        """True until the end was reached."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for the thread's end; call `finish` first."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._at_end is not None)
                at_end = None if self._waiting else self._at_end
            if at_end is not None:
                at_end()
                return
            image, done = self._waiting[0]
            try:
                # Weights, gradient and two moments, and some text.
                self._storage.run(partial(self._write, image), 4 * image.master.nbytes + (1 << 16))
            except Exception as error:  # told, and the job goes on
                log.exception("a checkpoint of job %s could not be written", image.name)
                self._errors.append(error)
            self._waiting.popleft()
            done()
