"""The engine: one loop over steps in which every adapter's tokens, served or trained, share the base's forward.

Everything here runs on one thread; `loquetier.runtime` owns that thread and hands work in between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from loquetier.adapters.arena import Arena, num_elements
from loquetier.adapters.init import initialize_slot
from loquetier.adapters.registry import AdapterRegistry, AdapterVersion, check_name
from loquetier.adapters.spec import LoraSpec, ModulePlan, resolve_modules
from loquetier.base.model import Base
from loquetier.config import EngineConfig, SamplingParams, TrainingConfig
from loquetier.engine.batch import build_batch
from loquetier.engine.blocks import BlockAllocator
from loquetier.engine.cost import plan_features
from loquetier.engine.policy import TrainLimits
from loquetier.engine.request import Request, TokenEvent
from loquetier.engine.rows import StepPlan
from loquetier.engine.scheduler import Scheduler
from loquetier.engine.serving import Serving
from loquetier.engine.trainer import JobListener, Trainer
from loquetier.errors import (
    ConfigError,
    EngineError,
    IntegrityError,
    LoquetierError,
    OutOfAdapterMemoryError,
    OutOfKVMemoryError,
)
from loquetier.training.data import Example, check_examples
from loquetier.training.job import EvalResult, EvalTask, FinetuneJob, JobImage, JobStatus, StepRecord
from loquetier.training.optimizer import AdapterOptimizer


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did, for metrics."""

    train_rows: int
    eval_rows: int
    prefill_rows: int
    decode_rows: int
    backward_units: int
    seconds: float


@dataclass(slots=True)
class Totals:
    """Rows since the engine began."""

    steps: int = 0
    train_rows: int = 0
    eval_rows: int = 0
    prefill_rows: int = 0
    decode_rows: int = 0
    backward_units: int = 0
    mixed_steps: int = 0
    """Steps whose forward held both rows in training and rows being served."""
    publishes: int = 0
    publish_seconds: float = 0.0

    def add(self, report: StepReport) -> None:
        """Count one step."""
        self.steps += 1
        for name in ("train_rows", "eval_rows", "prefill_rows", "decode_rows", "backward_units"):
            setattr(self, name, getattr(self, name) + getattr(report, name))
        self.mixed_steps += bool(report.train_rows and (report.prefill_rows or report.decode_rows))


class Engine:
    """Many adapters on one base, served and trained in the same forwards.

    Args:
        base: the base after surgery.
        config: resolved settings (no "auto", no None budgets).
    """

    def __init__(self, base: Base, config: EngineConfig) -> None:
        assert config.kv_memory is not None and config.adapter_memory is not None, "resolve() the config first"
        self.base, self.config = base, config
        self.max_context = min(base.loaded.max_context, config.max_context or base.loaded.max_context)
        page_bytes = base.page_bytes(config.page_size)
        num_pages = min(config.kv_memory // page_bytes, _most_useful_pages(config, self.max_context))
        if num_pages < 1:
            raise OutOfKVMemoryError(
                f"kv_memory={config.kv_memory} bytes is less than one page of {page_bytes} bytes; raise it"
            )
        self.cache = base.new_cache(num_pages, config.page_size)
        self.arena = Arena(config.adapter_memory, base.dtype, base.device)
        self.registry = AdapterRegistry(base.name, self.arena.free)
        self.allocator = BlockAllocator(num_pages, config.page_size)
        self.scheduler = Scheduler(config, self.allocator, self.max_context)
        head_module = next((t.index for t in base.targets if t.layer is None), None)
        self.serving = Serving(base, self.scheduler, self.registry, self.max_context, head_module)
        self.trainer = Trainer(base, self.arena, head_module)
        self.totals = Totals()
        self._job_ids = count(1)
        self._listeners: dict[int, JobListener] = {}

    # --- the step ---

    @property
    def has_work(self) -> bool:
        """A step would do something."""
        return self.scheduler.has_work or self.trainer.has_work

    def step(self) -> StepReport:
        """One pass of the loop: schedule, forward, sample and loss, backward, optimize, commit."""
        started = time.perf_counter()
        plan = self._schedule()
        try:
            report = self._execute(plan, started)
        except IntegrityError:
            raise  # our own books are wrong: nothing can be trusted to go on
        except (RuntimeError, MemoryError, LoquetierError) as error:  # torch raises RuntimeError, out of memory too
            self._fail(plan, error)
            report = StepReport(0, 0, 0, 0, 0, time.perf_counter() - started)
        self.totals.add(report)
        return report

    def _schedule(self) -> StepPlan:
        trainer = self.trainer
        limits = TrainLimits(
            units_per_tape=self.base.num_layers, open_tape_rows=trainer.tape.num_train if trainer.tape else 0
        )
        return self.scheduler.schedule(trainer.train_items(), trainer.eval_items(), trainer.open_units, limits)

    def _execute(self, plan: StepPlan, started: float) -> StepReport:
        trainer, serving = self.trainer, self.serving
        sampled = batch = None
        if plan.num_rows:
            cuts = trainer.open_tape(plan)
            batch = build_batch(plan, trainer.example_of, self.arena.factors, trainer.grads(), self.cache, cuts)
            hidden_MD = self.base.hidden(batch.ids_M, batch.positions_M, batch.step)
            sampled = serving.sample(batch, hidden_MD)
            trainer.losses(batch, hidden_MD)
        backward_rows = trainer.backward(plan.backward_units)
        self._optimize()
        seconds = time.perf_counter() - started
        self.scheduler.cost.observe(plan_features(plan, backward_rows), seconds)
        self.scheduler.commit(plan)
        if batch is not None:
            serving.deliver(batch, sampled)
        return _report(plan, backward_rows, seconds)

    def _optimize(self) -> None:
        for task, done in self.trainer.finished_evaluations():
            done(task.sums.result())
        for job, outcome in self.trainer.optimize():
            if isinstance(outcome, LoquetierError):
                self._end_job(job, JobStatus.FAILED, outcome)
                continue
            self._after_optimizer_step(job, outcome)
        self._release_jobs()

    def _after_optimizer_step(self, job: FinetuneJob, record: StepRecord) -> None:
        if job.is_published_now:
            try:
                self._publish(job)
            except OutOfAdapterMemoryError as error:  # the old version keeps serving; only this job ends
                self._end_job(job, JobStatus.FAILED, error)
                return
        self._listeners[job.job_id](job, record)
        if job.is_eval_due:
            self._evaluate_job(job)
        elif job.num_steps == job.total_steps:
            self._end_job(job, JobStatus.SUCCEEDED)

    def _fail(self, plan: StepPlan, cause: Exception) -> None:
        """A step broke: end what took part in it, keep everything else. Its KV rows are freed with it."""
        error = cause if isinstance(cause, LoquetierError) else EngineError(f"{type(cause).__name__}: {cause}")
        taking_part = {c.seq.seq_id for c in plan.prefill} | {s.seq_id for s in plan.decode}
        for seq_id in taking_part:
            choice = self.serving.choices.get(seq_id)
            if choice is not None:
                self.serving.end(choice, error)
        items = (*plan.train, *(self.trainer.tape.items if self.trainer.tape else ()))
        self.trainer.tape = None
        for job in self.trainer.jobs.values():
            if any(item.job_id == job.job_id for item in items) and not job.status.is_final:
                self._end_job(job, JobStatus.FAILED, error)
        for task_id in {item.job_id for item in plan.evaluate} & self.trainer.evaluations.keys():
            self.trainer.evaluations.pop(task_id)[1](error)
        self._release_jobs()

    # --- requests ---

    def add_request(
        self,
        prompt: list[int],
        model: str,
        params: SamplingParams,
        sink: Callable[[TokenEvent], None],
        priority: int = 0,
    ) -> Request:
        """Queue a request; events go to `sink`. See `Serving.add` for the errors."""
        return self.serving.add(prompt, model, params, sink, priority)

    def abort_request(self, request_id: int) -> None:
        """End a request before the next step; its pages are free at once."""
        self.serving.abort(request_id)

    # --- adapters ---

    def load_adapter(
        self, name: str, spec: LoraSpec, modules: tuple[ModulePlan, ...], factors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> AdapterVersion:
        """Put an adapter's factors (A ``[r, in]``, B ``[out, r]`` by path) into a slot and serve it as `name`.

        Raises:
            AdapterExistsError, ConfigError, OutOfAdapterMemoryError: nothing changed.
        """
        self._check_free(name)
        slot = self.arena.allocate(modules)
        for module in modules:
            a_RK, b_NR = factors[module.target.path]
            view = self.arena.factors[slot][module.target.index]
            view.a_RK.copy_(a_RK)
            view.b_RN.copy_(b_NR.T)
        return self.registry.add(name, slot, spec)

    def _check_free(self, name: str) -> None:
        check_name(name)
        if name == self.base.name or name in self.registry.names:
            self.registry.add(name, -2, LoraSpec())  # raises AdapterExistsError with its message

    def unload_adapter(self, name: str) -> AdapterVersion:
        """The name stops answering at once; memory is freed when the last request on it has ended."""
        return self.registry.remove(name)

    def adapter_factors(
        self, model: str
    ) -> tuple[AdapterVersion, tuple[ModulePlan, ...], dict[str, tuple[Tensor, Tensor]]]:
        """A copy of a version's weights in PEFT's orientation (A ``[r, in]``, B ``[out, r]``), on the CPU."""
        version = self.registry.resolve(model)
        if version.slot < 0:
            raise ConfigError(f"{model!r} is the base: it has no adapter weights to export")
        modules = self.arena.modules(version.slot)
        views = self.arena.factors[version.slot]
        factors = {
            m.target.path: (
                views[m.target.index].a_RK.detach().cpu().clone(),
                views[m.target.index].b_RN.detach().T.contiguous().cpu().clone(),
            )
            for m in modules
        }
        return version, modules, factors

    # --- jobs ---

    def start_job(
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
        check_examples(examples, self.base.vocab_size)
        if eval_examples:
            check_examples(eval_examples, self.base.vocab_size)
        modules = resolve_modules(spec, self.base.targets)
        source = self._same_layout(start_from, modules) if start_from is not None else None
        slot = self._allocate_for_training(modules)
        if source is not None:
            self.arena.flat(slot).copy_(self.arena.flat(source))
        else:
            initialize_slot(self.arena.factors[slot], modules, config.seed)
        optimizer = AdapterOptimizer(self.arena.flat(slot), modules, config)
        job = FinetuneJob(next(self._job_ids), name, spec, config, examples, eval_examples, slot, optimizer)
        return self._enter(job, listener)

    def _enter(self, job: FinetuneJob, listener: JobListener) -> FinetuneJob:
        self.trainer.jobs[job.job_id] = job
        self._listeners[job.job_id] = listener
        return job

    def restore_job(self, image: JobImage, listener: JobListener) -> FinetuneJob:
        """Go on with a job that was taken out of another engine of the same base. Errors as `start_job`."""
        self._check_trainable(image.name)
        modules = resolve_modules(image.spec, self.base.targets)
        slot = self._allocate_for_training(modules)
        optimizer = AdapterOptimizer(self.arena.flat(slot), modules, image.config)
        job = FinetuneJob(
            next(self._job_ids),
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

    def _allocate_for_training(self, modules: tuple[ModulePlan, ...]) -> int:
        """A slot to train in, if there is room for the first publish beside it."""
        slot = self.arena.allocate(modules)
        if self.arena.free_bytes < self.arena.slot_bytes(slot):
            needed, free = 2 * self.arena.slot_bytes(slot), self.arena.free_bytes + self.arena.slot_bytes(slot)
            self.arena.free(slot)
            raise OutOfAdapterMemoryError(
                f"training needs {needed} bytes, one slot to train in and one to publish to; the arena has {free} of "
                f"{self.arena.total_bytes} bytes free. Unload an adapter or raise adapter_memory."
            )
        return slot

    def _check_trainable(self, name: str) -> None:
        check_name(name)
        if name == self.base.name:
            raise ConfigError(f"{name!r} is the base's name; choose another for the adapter")
        if self.job_of(name) is not None:
            raise ConfigError(f"a job is already training {name!r}; cancel it first, or choose another name")

    def job_of(self, name: str) -> FinetuneJob | None:
        """The job that trains `name` and has not ended, if any."""
        return next((j for j in self.trainer.jobs.values() if j.name == name and not j.status.is_final), None)

    def _same_layout(self, model: str, modules: tuple[ModulePlan, ...]) -> int:
        slot = self.registry.resolve(model).slot
        held = self.arena.modules(slot) if slot >= 0 else ()
        if held != modules:
            raise ConfigError(
                f"start_from={model!r}: its modules, ranks or scales ({len(held)} modules, {num_elements(held)} "
                f"weights) differ from the job's ({len(modules)} modules, {num_elements(modules)} weights); "
                "use the same LoraSpec"
            )
        return slot

    def set_job_status(self, job: FinetuneJob, status: JobStatus) -> None:
        """Pause, resume, cancel or detach; takes effect with the next step. Raises JobStateError."""
        if status.is_final:
            self._end_job(job, status)
            self._release_jobs()
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
        check_examples(examples, self.base.vocab_size)
        version = self.registry.acquire(model)

        def finish(result: EvalResult | LoquetierError) -> None:
            self.registry.release(version)
            done(result)

        task = EvalTask(next(self._job_ids), version.slot, examples)
        self.trainer.evaluations[task.task_id] = (task, finish)

    def _evaluate_job(self, job: FinetuneJob) -> None:
        """Evaluate the weights in training; the job's next step waits for it."""
        task = EvalTask(next(self._job_ids), job.slot, job.eval_examples)
        job.evaluation = task

        def finish(result: EvalResult | LoquetierError) -> None:
            job.evaluation = None
            if job.status.is_final:
                return
            if isinstance(result, LoquetierError):
                self._end_job(job, JobStatus.FAILED, result)
                return
            job.attach_evaluation(result)
            self._listeners[job.job_id](job, job.history[-1])
            if job.num_steps == job.total_steps:
                self._end_job(job, JobStatus.SUCCEEDED)

        self.trainer.evaluations[task.task_id] = (task, finish)

    def _publish(self, job: FinetuneJob) -> None:
        """The weights in training become a new served version: one copy between two steps, then the name moves."""
        started = time.perf_counter()
        slot = self.arena.allocate(self.arena.modules(job.slot), zeroed=False)
        self.arena.flat(slot).copy_(self.arena.flat(job.slot))
        self.registry.publish(job.name, slot, job.spec)
        self.totals.publishes += 1
        self.totals.publish_seconds += time.perf_counter() - started

    def _end_job(self, job: FinetuneJob, status: JobStatus, error: LoquetierError | None = None) -> None:
        job.move(status)
        job.error = error
        self._listeners[job.job_id](job, None)

    def _release_jobs(self) -> None:
        """Give back the slots of ended jobs that no open tape and no evaluation still reads."""
        in_tape = {item.job_id for item in self.trainer.tape.items} if self.trainer.tape else set()
        for job in [j for j in self.trainer.jobs.values() if j.status.is_final]:
            if job.job_id not in in_tape and job.evaluation is None:
                del self.trainer.jobs[job.job_id], self._listeners[job.job_id]
                self.arena.free(job.slot)

    # --- books ---

    def close(self, error: LoquetierError) -> None:
        """End every request, evaluation and job with `error`."""
        for request_id in list(self.serving.requests):
            self.serving.abort(request_id, error)
        self.trainer.tape = None
        for job in list(self.trainer.jobs.values()):
            if not job.status.is_final:
                self._end_job(job, JobStatus.FAILED, error)
        for task_id in list(self.trainer.evaluations):
            self.trainer.evaluations.pop(task_id)[1](error)
        self._release_jobs()

    def check_integrity(self) -> None:
        """Pages, slots, references and buffers add up. Raises IntegrityError."""
        self.scheduler.check_integrity()
        self.registry.check_integrity()
        self.arena.check_integrity()
        owned = [v.slot for v in self.registry.versions] + [j.slot for j in self.trainer.jobs.values()]
        if sorted(owned) != sorted(self.arena.slots):
            raise IntegrityError(f"slots {sorted(self.arena.slots)} are allocated, {sorted(owned)} are owned")
        if not self.has_work and self.allocator.num_free != self.allocator.num_pages:
            raise IntegrityError(f"idle, but {self.allocator.num_pages - self.allocator.num_free} KV pages are taken")
        users = sum(v.users for v in self.registry.versions)
        expected = sum(r.version.slot >= 0 for r in self.serving.requests.values())
        if not self.trainer.evaluations and users != expected:
            raise IntegrityError(f"{users} users of adapter versions, {expected} requests on adapters")


def _most_useful_pages(config: EngineConfig, max_context: int) -> int:
    """More pages than every sequence at full context would need are never used."""
    return config.max_sequences * -(-max_context // config.page_size)


def _report(plan: StepPlan, backward_rows: int, seconds: float) -> StepReport:
    return StepReport(
        train_rows=sum(i.num_rows for i in plan.train),
        eval_rows=sum(i.num_rows for i in plan.evaluate),
        prefill_rows=sum(c.length for c in plan.prefill),
        decode_rows=len(plan.decode),
        backward_units=plan.backward_units if backward_rows else 0,
        seconds=seconds,
    )
