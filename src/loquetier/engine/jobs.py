"""The life of jobs and evaluations: start, pause, publish, evaluate, end. Engine thread only.

`Trainer` runs their rows; this decides what a finished optimizer step or evaluation means.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

from torch import Tensor

from loquetier.adapters.arena import num_elements
from loquetier.adapters.init import initialize_slot
from loquetier.adapters.registry import AdapterRegistry, check_name
from loquetier.adapters.spec import LoraSpec, ModulePlan, resolve_modules
from loquetier.config import TrainingConfig
from loquetier.engine.rows import TrainItem
from loquetier.engine.trainer import JobListener, Trainer
from loquetier.errors import ConfigError, LoquetierError, OutOfAdapterMemoryError
from loquetier.failpoints import FailPoint, no_fail_point
from loquetier.training.data import Example, check_examples
from loquetier.training.ending import (
    check_evaluation,
    divergence,
    improved_now,
    nothing_to_publish,
    reason_to_stop,
)
from loquetier.training.job import EvalResult, EvalTask, FinetuneJob, JobImage, JobStatus, StepRecord
from loquetier.training.optimizer import AdapterOptimizer

log = logging.getLogger("loquetier.jobs")


@dataclass(slots=True)
class Jobs:
    """Every job and evaluation of an engine, and who is told about them."""

    trainer: Trainer
    registry: AdapterRegistry
    fail_point: FailPoint = no_fail_point
    publishes: int = 0
    publish_seconds: float = 0.0
    """Time spent publishing, over all publishes."""
    longest_publish: float = 0.0
    """Seconds of the slowest one."""
    publish_bytes: int = 0
    """Bytes of weights copied, over all publishes."""
    template_fingerprint: str | None = None
    """Of the base's chat template and tokenizer, under which every job here trains; set by who has the tokenizer."""
    _ids: count[int] = field(default_factory=lambda: count(1))
    _listeners: dict[int, JobListener] = field(default_factory=dict)
    _unpublished: set[int] = field(default_factory=set)
    """Jobs whose newest weights found no room to be published."""

    def after_backward(self) -> None:
        """Hand out finished evaluations; step, publish and end the jobs whose accumulation is complete."""
        for task, done in self.trainer.finished_evaluations():
            done(task.sums.result())
        for job, record in self.trainer.optimize():
            self._after_optimizer_step(job, record)
        self._release()

    def _after_optimizer_step(self, job: FinetuneJob, record: StepRecord) -> None:
        diverged = divergence(job)
        if diverged is None and job.is_published_now:
            self._publish_if_room(job)
        self._listeners[job.job_id](job, record)
        self.fail_point("job.after_step")
        if diverged is not None:
            self._end(job, JobStatus.FAILED, diverged)
        elif job.is_eval_due:
            self._evaluate_in_training(job)
        elif job.num_steps == job.total_steps:
            self._end(job, JobStatus.SUCCEEDED)

    def _publish_if_room(self, job: FinetuneJob) -> None:
        try:
            self._publish(job)
        except OutOfAdapterMemoryError as error:
            # Training goes on and the old version keeps serving. The last weights are never lost: when the job
            # ends, its own slot becomes the version (see `_release`).
            log.warning("step %d of %s is not published: %s", job.num_steps, job.name, error)
            self._unpublished.add(job.job_id)

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
        everything = [TrainItem(i, 0, 0, -1) for i in (*self.trainer.jobs, *self.trainer.evaluations)]
        self.fail(everything, error)

    def start(
        self,
        name: str,
        spec: LoraSpec,
        config: TrainingConfig,
        examples: tuple[Example, ...],
        eval_examples: tuple[Example, ...],
        listener: JobListener,
        start_from: str | None = None,
    ) -> FinetuneJob:
        """Begin training; the job's rows join the very next step.

        Args:
            name: the name that its published versions answer under; an adapter of this name is replaced by the first.
            start_from: continue from this served version's weights instead of fresh ones; its spec must have the
                same modules and ranks.

        Raises:
            AdapterMismatchError, AdapterNotFoundError, ConfigError, DataError, OutOfAdapterMemoryError: nothing has
                changed.
        """
        self._check_trainable(name)
        check_examples(examples, self.trainer.base.vocab_size)
        check_evaluation(config, len(eval_examples))
        if eval_examples:
            check_examples(eval_examples, self.trainer.base.vocab_size)
        modules = resolve_modules(spec, self.trainer.base.targets)
        slot = self._fresh_slot(modules, config.seed) if start_from is None else self._copied_slot(modules, start_from)
        with self._freed_on_error(slot):
            optimizer = AdapterOptimizer(self.trainer.arena.flat(slot), modules, config)
            job = FinetuneJob(next(self._ids), name, spec, config, examples, eval_examples, slot, optimizer)
        return self._enter(job, listener)

    @contextmanager
    def _freed_on_error(self, slot: int) -> Iterator[None]:
        """Whatever goes wrong while a job is made (no memory for its moments, say), its slot is given back."""
        try:
            yield
        except BaseException:
            self.trainer.arena.free(slot)
            raise

    def _enter(self, job: FinetuneJob, listener: JobListener) -> FinetuneJob:
        self.trainer.jobs[job.job_id] = job
        self._listeners[job.job_id] = listener
        return job

    def restore(self, image: JobImage, listener: JobListener) -> FinetuneJob:
        """Go on with a job that was taken out of another engine of the same base. Errors as `start`."""
        self._check_trainable(image.name)
        modules = resolve_modules(image.spec, self.trainer.base.targets)
        slot = self._allocate_for_training(modules)
        with self._freed_on_error(slot):
            optimizer = AdapterOptimizer(self.trainer.arena.flat(slot), modules, image.config)
            job = FinetuneJob(
                next(self._ids),
                image.name,
                image.spec,
                image.config,
                image.examples,
                image.eval_examples,
                slot,
                optimizer,
            )
            job.restore(image)
        return self._enter(job, listener)

    def resume(self, image: JobImage, listener: JobListener, served: tuple[Tensor, int] | None = None) -> FinetuneJob:
        """`restore` a checkpoint and run it, and make up for what its last step may still owe.

        That is: its publish (nothing is served after a restart), its evaluation, the job's end. `served`: weights of
        an earlier step that were served, and that step. Errors as `start`.
        """
        job = self.restore(replace(image, status=JobStatus.RUNNING), listener)
        if served is not None:
            self.publish_weights(job, *served)
        # What the checkpoint holds is what publish="checkpoint" served last.
        if job.num_steps and (job.is_published_now or job.config.publish == "checkpoint"):
            self._publish_if_room(job)
        if job.num_steps and job.is_eval_due and job.history[-1].evaluation is None:
            self._evaluate_in_training(job)
        else:
            job.reason = reason_to_stop(job.history, job.config)  # patience may have ended it before the break
            if job.reason is not None or job.num_steps == job.total_steps:
                self._end(job, JobStatus.SUCCEEDED)
        self._release()
        return job

    def _fresh_slot(self, modules: tuple[ModulePlan, ...], seed: int) -> int:
        slot = self._allocate_for_training(modules)
        with self._freed_on_error(slot):
            initialize_slot(self.trainer.arena.factors[slot], modules, seed)
        return slot

    def _copied_slot(self, modules: tuple[ModulePlan, ...], model: str) -> int:
        source = self._same_layout(model, modules)
        # In use while it is copied: making room may give up versions that are only kept.
        version = self.registry.acquire(model)
        try:
            slot = self._allocate_for_training(modules)
            with self._freed_on_error(slot):
                self.trainer.arena.flat(slot).copy_(self.trainer.arena.flat(source))
        finally:
            self.registry.release(version)
        return slot

    def _allocate_for_training(self, modules: tuple[ModulePlan, ...]) -> int:
        """A slot to train in, if there is room for the first publish beside it."""
        arena = self.trainer.arena
        slot = arena.allocate(modules)
        while arena.free_bytes < arena.slot_bytes(slot) and arena.reclaim():
            pass
        if arena.free_bytes < arena.slot_bytes(slot):
            needed, free = 2 * arena.slot_bytes(slot), arena.free_bytes + arena.slot_bytes(slot)
            arena.free(slot)
            raise OutOfAdapterMemoryError(
                f"training needs {needed} bytes, one slot to train in and one to publish to; the arena has {free} of "
                f"{arena.total_bytes} bytes free. Unload an adapter or raise adapter_memory."
            )
        return slot

    def _check_trainable(self, name: str) -> None:
        check_name(name)
        if name == self.trainer.base.name:
            raise ConfigError(f"{name!r} is the base's name; choose another for the adapter")
        if self.find(name) is not None:
            raise ConfigError(f"a job is already training {name!r}; cancel it first, or choose another name")

    def find(self, name: str) -> FinetuneJob | None:
        """The job that trains `name` and has not ended, if any."""
        return next((j for j in self.trainer.jobs.values() if j.name == name and not j.status.is_final), None)

    def _same_layout(self, model: str, modules: tuple[ModulePlan, ...]) -> int:
        slot = self.registry.resolve(model).slot
        held = self.trainer.arena.modules(slot) if slot >= 0 else ()
        if held != modules:
            raise ConfigError(
                f"start_from={model!r}: its modules, ranks or scales ({len(held)} modules, {num_elements(held)} "
                f"weights) differ from the job's ({len(modules)} modules, {num_elements(modules)} weights); "
                "use the same LoraSpec"
            )
        return slot

    def set_status(self, job: FinetuneJob, status: JobStatus) -> None:
        """Pause, resume, cancel or detach; takes effect with the next step. Raises JobStateError."""
        if status.is_final:
            self._end(job, status)
            self._release()
        else:
            job.move(status)
            self._listeners[job.job_id](job, None)

    def evaluate(
        self, model: str, examples: tuple[Example, ...], done: Callable[[EvalResult | LoquetierError], None]
    ) -> None:
        """Run examples as EVAL rows on a served model; `done` gets the means.

        Raises:
            AdapterNotFoundError, DataError: nothing changed.
        """
        check_examples(examples, self.trainer.base.vocab_size)
        version = self.registry.acquire(model)

        def finish(result: EvalResult | LoquetierError) -> None:
            self.registry.release(version)
            done(result)

        task = EvalTask(next(self._ids), version.slot, examples)
        self.trainer.evaluations[task.task_id] = (task, finish)

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
            self._publish(job)
        except OutOfAdapterMemoryError as error:
            self._end(job, JobStatus.FAILED, error)
            return False
        return True

    def _after_evaluation(self, job: FinetuneJob) -> None:
        unusable = nothing_to_publish(job)
        if unusable is not None:
            self._end(job, JobStatus.FAILED, unusable)
            return
        job.reason = reason_to_stop(job.history, job.config)
        if job.reason is not None and job.config.publish != "best" and not job.is_published_now:
            self._publish_if_room(job)  # this turned out to be the last step
        if job.reason is not None or job.num_steps == job.total_steps:
            self._end(job, JobStatus.SUCCEEDED)

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
            self._publish(job, weights, step)
        except OutOfAdapterMemoryError as error:
            log.warning("the checkpoint of step %d of %s is not published: %s", step, job.name, error)
            return False
        return True

    def _publish(self, job: FinetuneJob, weights: Tensor | None = None, step: int | None = None) -> None:
        """A new served version of the weights in training, or of those given: one copy between two steps, then the
        name moves."""
        self.fail_point("job.before_publish")
        started = time.perf_counter()
        slot = self.trainer.arena.allocate(self.trainer.arena.modules(job.slot), zeroed=False)
        self.trainer.arena.flat(slot).copy_(self.trainer.arena.flat(job.slot) if weights is None else weights)
        version = self.registry.publish(job.name, slot, job.spec, self.template_fingerprint)
        job.versions[job.num_steps if step is None else step] = version.number
        if weights is None:
            self._unpublished.discard(job.job_id)
        seconds = time.perf_counter() - started
        self.publishes += 1
        self.publish_seconds += seconds
        self.longest_publish = max(self.longest_publish, seconds)
        self.publish_bytes += self.trainer.arena.slot_bytes(slot)

    def _end(self, job: FinetuneJob, status: JobStatus, error: LoquetierError | None = None) -> None:
        self.fail_point("job.before_end")
        job.move(status)
        job.error = error
        self._listeners[job.job_id](job, None)

    def _release(self) -> None:
        """Give back the slots of ended jobs that no open tape and no evaluation still reads."""
        self.trainer.drop_dead_tape()
        in_tape = {item.job_id for item in self.trainer.tape.items} if self.trainer.tape else set()
        for job in [j for j in self.trainer.jobs.values() if j.status.is_final]:
            if job.job_id in in_tape or job.evaluation is not None:
                continue
            del self.trainer.jobs[job.job_id], self._listeners[job.job_id]
            if job.status is JobStatus.SUCCEEDED and job.job_id in self._unpublished:
                version = self.registry.publish(job.name, job.slot, job.spec, self.template_fingerprint)
                job.versions[job.num_steps] = version.number
            else:
                self.trainer.arena.free(job.slot)
            self._unpublished.discard(job.job_id)
