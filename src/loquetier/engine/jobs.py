"""The life of jobs and evaluations: start, pause, publish, evaluate, end. Engine thread only.

`Trainer` runs their rows; this decides what a finished optimizer step or evaluation means.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from loquetier.adapters.registry import AdapterRegistry
from loquetier.adapters.spec import AdapterSpec, resolve_modules
from loquetier.config import TrainingConfig
from loquetier.engine.admission import Admission, Ticket
from loquetier.engine.entry import Entrant, check_trainable, fill, ticket_of
from loquetier.engine.publisher import Publisher
from loquetier.engine.residency import Residency
from loquetier.engine.rows import TrainItem
from loquetier.engine.tally import JobTally
from loquetier.engine.trainer import JobListener, Trainer
from loquetier.errors import (
    ConfigError,
    JobStateError,
    LoquetierError,
    OutOfAdapterMemoryError,
    typed,
)
from loquetier.failpoints import FailPoint, no_fail_point
from loquetier.training import holds
from loquetier.training.data import Example, check_examples
from loquetier.training.ending import check_evaluation, divergence, improved_now, nothing_to_publish, reason_to_stop
from loquetier.training.job import EvalResult, EvalTask, FinetuneJob, JobImage, JobStatus, StepRecord
from loquetier.training.optimizer import check_ratio
from loquetier.training.states import resumed

log = logging.getLogger("loquetier.jobs")


@dataclass(slots=True)
class Jobs:
    """Every job and evaluation of an engine, and who is told about them."""

    trainer: Trainer
    registry: AdapterRegistry
    admission: Admission
    residency: Residency
    publisher: Publisher
    fail_point: FailPoint = no_fail_point
    tally: JobTally = field(default_factory=JobTally)
    _ids: count[int] = field(default_factory=lambda: count(1))
    _listeners: dict[int, JobListener] = field(default_factory=dict)
    serve_only: bool = False
    """The base's original weights are gone: no job can run."""
    _waiting: dict[int, FinetuneJob] = field(default_factory=dict)
    """Jobs without memory, by id: being validated, queued, or paused before they had any."""

    def after_backward(self) -> None:
        """Hand out finished evaluations; step, publish and end the jobs whose accumulation is complete."""
        for task, done in self.trainer.finished_evaluations():
            done(task.sums.result())
        for job, record in self.trainer.optimize():
            self._after_optimizer_step(job, record)
        self._release()

    def _after_optimizer_step(self, job: FinetuneJob, record: StepRecord) -> None:
        self.tally.steps += 1
        self.tally.tokens += record.num_tokens
        diverged = divergence(job)
        if diverged is None and job.is_published_now:
            self.publisher.publish_if_room(job)
        self._listeners[job.job_id](job, record)
        self.fail_point("job.after_step")
        if diverged is not None:
            self._end(job, JobStatus.FAILED, diverged)
        elif job.is_eval_due:
            self._evaluate_in_training(job)
        elif job.num_steps == job.total_steps:
            self._end(job, JobStatus.SUCCEEDED)

    def fail(self, plan_items: Iterable[TrainItem], error: LoquetierError) -> None:
        """A step broke: end the jobs and evaluations that took part in it or have rows on the open tape."""
        tape = self.trainer.tape
        self.trainer.tape = None
        ids = {item.job_id for item in (*plan_items, *(tape.items if tape else ()))}
        for job in self.trainer.jobs.values():
            if job.job_id in ids and not job.status.is_final:
                self._end(job, JobStatus.FAILED, error)
        for task_id in ids & self.trainer.evaluations.keys():
            self.trainer.evaluations.pop(task_id)[1](error)
        self._release()

    def close(self, error: LoquetierError) -> None:
        """End everything with `error`."""
        for job in list(self._waiting.values()):
            self._end(job, JobStatus.FAILED, error)
        everything = [TrainItem(i, 0, 0, -1) for i in (*self.trainer.jobs, *self.trainer.evaluations)]
        self.fail(everything, error)

    def start(
        self,
        name: str,
        spec: AdapterSpec,
        config: TrainingConfig,
        examples: tuple[Example, ...],
        eval_examples: tuple[Example, ...],
        listener: JobListener,
        start_from: str | None = None,
        *,
        saves: bool = False,
    ) -> FinetuneJob:
        """Queue a job, and begin it at once if there is memory: then its rows join the very next step.

        Args:
            name: the name that its published versions answer under; an adapter of this name is replaced by the first.
            start_from: continue from this served version's weights instead of fresh ones; its spec must have the
                same modules and ranks. The version stays in memory until the job has begun.
            saves: copies of it will be made for checkpoints.

        Raises:
            AdapterMismatchError, AdapterNotFoundError, ConfigError, DataError, OutOfAdapterMemoryError,
            OutOfTrainMemoryError: nothing has changed.
        """
        self._check_trainable(name)
        self.check_data(config, examples, eval_examples)
        job = FinetuneJob(next(self._ids), name, spec, config)
        entrant = Entrant(job=job, examples=examples, eval_examples=eval_examples, saves=saves, start_from=start_from)
        self._queue_up(entrant, listener)
        return job

    def reserve(self, name: str, spec: AdapterSpec, config: TrainingConfig, listener: JobListener) -> FinetuneJob:
        """A job whose data is still being read: `supply` or `refuse` it later. Raises as `start`."""
        self._check_trainable(name)
        check_ratio(config, resolve_modules(spec, self.trainer.base.targets))
        job = FinetuneJob(next(self._ids), name, spec, config)
        self._waiting[job.job_id], self._listeners[job.job_id] = job, listener
        listener(job, None)
        return job

    def supply(
        self,
        job: FinetuneJob,
        examples: tuple[Example, ...],
        eval_examples: tuple[Example, ...],
        listener: JobListener,
        *,
        start_from: str | None = None,
        image: JobImage | None = None,
        served: tuple[Tensor, int] | None = None,
        saves: bool = False,
    ) -> None:
        """The data of a reserved job, which `check_data` has passed; it queues, unless it was paused or has ended.

        Raises:
            As `start`; the job is as it was.
        """
        if not job.status.is_final:
            entrant = Entrant(
                job=job,
                examples=examples,
                eval_examples=eval_examples,
                saves=saves,
                start_from=start_from,
                image=image,
                catches_up=image is not None,
                served=served,
            )
            self._queue_up(entrant, listener)

    def refuse(self, job: FinetuneJob, error: LoquetierError) -> None:
        """A reserved job cannot run."""
        if not job.status.is_final:
            self._end(job, JobStatus.FAILED, error)

    def restore(self, image: JobImage, listener: JobListener) -> FinetuneJob:
        """Go on with a job that was taken out of another engine of the same base, when there is memory.

        Errors as `start`.
        """
        job = self._from_image(image, listener, is_checkpoint=False)
        if image.status is JobStatus.PAUSED and not job.status.is_final:
            self.set_status(job, JobStatus.PAUSED)
        return job

    def resume(self, image: JobImage, listener: JobListener, served: tuple[Tensor, int] | None = None) -> FinetuneJob:
        """Go on with a checkpoint, and make up for what its last step may still owe.

        That is: its publish (nothing is served after a restart), its evaluation, the job's end. `served`: weights of
        an earlier step that were served, and that step. Errors as `start`.
        """
        return self._from_image(image, listener, is_checkpoint=True, served=served)

    def _from_image(
        self,
        image: JobImage,
        listener: JobListener,
        *,
        is_checkpoint: bool,
        served: tuple[Tensor, int] | None = None,
    ) -> FinetuneJob:
        self._check_trainable(image.name)
        job = FinetuneJob(next(self._ids), image.name, image.spec, image.config)
        entrant = Entrant(
            job=job,
            examples=image.examples,
            eval_examples=image.eval_examples,
            saves=is_checkpoint,
            image=image,
            catches_up=is_checkpoint,
            served=served,
        )
        self._queue_up(entrant, listener)
        return job

    def check_data(
        self, config: TrainingConfig, examples: tuple[Example, ...], eval_examples: tuple[Example, ...]
    ) -> None:
        """Refuse data that cannot be trained on; on any thread. Raises ConfigError, DataError."""
        check_examples(examples, self.trainer.base.vocab_size)
        check_evaluation(config, len(eval_examples))
        if eval_examples:
            check_examples(eval_examples, self.trainer.base.vocab_size)

    def _queue_up(self, entrant: Entrant, listener: JobListener) -> None:
        job, ticket = entrant.job, ticket_of(self.admission, entrant, self._lost_source)
        self._waiting[job.job_id], self._listeners[job.job_id] = job, listener
        log.info("job %s needs, by estimate:\n%s", job.name, ticket.needs.estimate.table())
        if job.status is JobStatus.PAUSED:
            self.admission.park(ticket)
            return
        job.move(JobStatus.QUEUED)
        self.admission.enter(ticket)
        listener(job, None)
        self.admit()
        if job.status is JobStatus.QUEUED:
            log.info("job %s is queued at place %s: %s", job.name, job.position, job.reason)
        elif job.status is JobStatus.FAILED and job.error is not None:
            raise job.error

    def _lost_source(self, job: FinetuneJob, error: LoquetierError) -> None:
        if not job.status.is_final:
            self._end(job, JobStatus.FAILED, error)

    def tell(self, job: FinetuneJob) -> None:
        """Let who listens to a job look at it."""
        self._listeners[job.job_id](job, None)

    def admit(self) -> None:
        """Begin the first of the queue while there is memory for it. O(1) when none came back since the last look."""
        while (taken := self.admission.take()) is not None:
            self._begin(*taken)

    def _begin(self, ticket: Ticket, slot: int) -> None:
        job = ticket.job
        try:
            fill(ticket, self.trainer.arena, slot)
        except Exception as error:
            # Whatever went wrong (no memory for its moments, say): it is this job's trouble alone.
            log.exception("job %s could not begin", job.name)
            self.trainer.arena.free(slot)
            self.admission.release(job)
            self._end(job, JobStatus.FAILED, typed(error))
            return
        finally:
            if ticket.source is not None:
                self.residency.drop(ticket.source)
        del self._waiting[job.job_id]
        self.trainer.jobs[job.job_id] = job
        job.move(JobStatus.RUNNING)
        self._listeners[job.job_id](job, None)
        if ticket.catches_up:
            self._catch_up(job, ticket.served)
        if holds.obey(job):
            self._listeners[job.job_id](job, None)

    def _catch_up(self, job: FinetuneJob, served: tuple[Tensor, int] | None) -> None:
        """What the last step of a resumed job may still owe."""
        if served is not None:
            self.publish_weights(job, *served)
        # What the checkpoint holds is what publish="checkpoint" served last.
        if job.num_steps and (job.is_published_now or job.config.publish == "checkpoint"):
            self.publisher.publish_if_room(job)
        if job.num_steps and job.is_eval_due and job.history[-1].evaluation is None:
            self._evaluate_in_training(job)
            return
        reason = reason_to_stop(job.history, job.config)  # patience may have ended it before the break
        if reason is not None or job.num_steps == job.total_steps:
            self._end(job, JobStatus.SUCCEEDED, reason=reason)
        self._release()

    def _check_trainable(self, name: str) -> None:
        check_trainable(name, self.trainer.base.name, serve_only=self.serve_only)
        if self.find(name) is not None:
            raise ConfigError(f"a job is already training {name!r}; cancel it first, or choose another name")

    @property
    def open(self) -> list[FinetuneJob]:
        """Jobs that have not ended."""
        return [j for j in (*self._waiting.values(), *self.trainer.jobs.values()) if not j.status.is_final]

    def find(self, name: str) -> FinetuneJob | None:
        """The job that trains `name` and has not ended, if any."""
        return next((j for j in self.open if j.name == name), None)

    def set_status(self, job: FinetuneJob, status: JobStatus, reason: str | None = None) -> None:
        """Pause, resume (to RUNNING), cancel or detach; takes effect with the next step. Raises JobStateError."""
        if status.is_final:
            self._end(job, status, reason=reason)
            self._release()
            return
        before = job.status
        if holds.keep_paused(job, status):
            if holds.hand_over(job, status, reason):
                self._listeners[job.job_id](job, None)
            return
        if status is JobStatus.RUNNING and before is JobStatus.PAUSED:
            status = resumed(has_data=bool(job.examples), has_memory=job.has_memory)
        elif status is JobStatus.RUNNING:
            raise JobStateError(f"job {job.name!r} is {before.value} and cannot become running: it was not paused")
        job.move(status, reason)
        if before is JobStatus.QUEUED:
            self.admission.pause(job)
        elif status is JobStatus.QUEUED:
            self.admission.resume(job)
        self._listeners[job.job_id](job, None)

    def hold(self, job: FinetuneJob, key: str, reason: str) -> None:
        """Pause a job that cannot go on until `release_hold`, whatever its owner says meanwhile."""
        if holds.add(job, key, reason):
            self._listeners[job.job_id](job, None)

    def release_hold(self, job: FinetuneJob, key: str) -> None:
        """What `hold` told of is over: the job goes on, unless its owner has paused it or another hold stands."""
        if holds.drop(job, key):
            self._listeners[job.job_id](job, None)

    def evaluate(
        self, model: str, examples: tuple[Example, ...], done: Callable[[EvalResult | LoquetierError], None]
    ) -> None:
        """Run examples as EVAL rows on a served model; `done` gets the means.

        Raises:
            AdapterNotFoundError, DataError, OutOfAdapterMemoryError: nothing changed.
        """
        check_examples(examples, self.trainer.base.vocab_size)
        hold = self.residency.acquire(model)

        def finish(result: EvalResult | LoquetierError) -> None:
            self.residency.drop(hold)
            done(result)

        def begin() -> None:
            task = EvalTask(next(self._ids), hold.version.slot, examples)
            self.trainer.evaluations[task.task_id] = (task, finish)

        try:
            self.residency.start(hold, begin, finish)
        except BaseException:
            self.residency.drop(hold)
            raise

    def _evaluate_in_training(self, job: FinetuneJob) -> None:
        """Evaluate the weights in training; the job's next step waits for it."""
        task = EvalTask(next(self._ids), job.slot, job.eval_examples)
        job.evaluation = task

        def finish(result: EvalResult | LoquetierError) -> None:
            job.evaluation = None
            if job.status.is_final:
                return
            if isinstance(result, LoquetierError):
                self._end(job, JobStatus.FAILED, result)
                return
            job.attach_evaluation(result)
            if job.config.publish == "best" and improved_now(job.history) and not self._publish_best(job):
                return
            self._listeners[job.job_id](job, job.history[-1])
            self._after_evaluation(job)

        self.trainer.evaluations[task.task_id] = (task, finish)

    def _publish_best(self, job: FinetuneJob) -> bool:
        """Without room the job ends: its next steps would overwrite the best weights."""
        try:
            self.publisher.publish(job)
        except OutOfAdapterMemoryError as error:
            self._end(job, JobStatus.FAILED, error)
            return False
        return True

    def _after_evaluation(self, job: FinetuneJob) -> None:
        unusable = nothing_to_publish(job)
        if unusable is not None:
            self._end(job, JobStatus.FAILED, unusable)
            return
        reason = reason_to_stop(job.history, job.config)
        if reason is not None and job.config.publish != "best" and not job.is_published_now:
            self.publisher.publish_if_room(job)  # this turned out to be the last step
        if reason is not None or job.num_steps == job.total_steps:
            self._end(job, JobStatus.SUCCEEDED, reason=reason)

    def publish_weights(self, job: FinetuneJob, weights: Tensor, step: int) -> bool:
        """Serve weights of an earlier step of a job that has not ended: those of a checkpoint.

        Args:
            weights: flat master weights ``[num_elements]`` in slot layout, float32, on any device.

        Returns:
            False when they are not served: the job has ended, or there is no room (it is logged, and training goes on).
        """
        if job.job_id not in self.trainer.jobs or job.status.is_final:
            return False  # its last weights were published when it ended
        try:
            self.publisher.publish(job, weights, step)
        except OutOfAdapterMemoryError as error:
            log.warning("the checkpoint of step %d of %s is not published: %s", step, job.name, error)
            return False
        return True

    def _end(
        self, job: FinetuneJob, status: JobStatus, error: LoquetierError | None = None, reason: str | None = None
    ) -> None:
        self.fail_point("job.before_end")
        job.move(status, reason)
        self.tally.ended[status.value] += 1
        job.error = error
        self._listeners[job.job_id](job, None)
        if job.job_id in self._waiting:
            self.admission.forget(job)
            del self._waiting[job.job_id], self._listeners[job.job_id]

    def _release(self) -> None:
        """Give back the slots of ended jobs that no open tape and no evaluation still reads."""
        self.trainer.drop_dead_tape()
        in_tape = {item.job_id for item in self.trainer.tape.items} if self.trainer.tape else set()
        for job in [j for j in self.trainer.jobs.values() if j.status.is_final]:
            if job.job_id in in_tape or job.evaluation is not None:
                continue
            del self.trainer.jobs[job.job_id], self._listeners[job.job_id]
            if not self.publisher.take_slot(job):
                self.trainer.arena.free(job.slot)
            self.admission.release(job)
            job.drop_memory()
