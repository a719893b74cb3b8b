"""The engine: one loop over steps in which every adapter's tokens, served or trained, share the base's forward.

Everything here runs on one thread; `loquetier.runtime` owns that thread and hands work in between two steps.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from loquetier.adapters.arena import Arena
from loquetier.adapters.packed import Packer
from loquetier.adapters.registry import AdapterRegistry
from loquetier.base.model import Base
from loquetier.config import EngineConfig, SamplingParams
from loquetier.engine.admission import Admission, memory_model
from loquetier.engine.background import Inline
from loquetier.engine.batch import Batch, PendingTokens, build_batch
from loquetier.engine.blocks import BlockAllocator
from loquetier.engine.cost import StepFeatures, plan_features
from loquetier.engine.decode_graphs import CudaCapture, DecodeGraphs
from loquetier.engine.jobs import Jobs
from loquetier.engine.policy import TrainLimits
from loquetier.engine.prefix import CacheSpace
from loquetier.engine.publisher import Publisher
from loquetier.engine.request import Request, TokenEvent
from loquetier.engine.residency import Residency
from loquetier.engine.rows import StepPlan
from loquetier.engine.sampler import DeviceTokens, TokenConstraint
from loquetier.engine.scheduler import Scheduler
from loquetier.engine.serving import Serving
from loquetier.engine.shelf import AdapterShelf
from loquetier.engine.tally import SECONDS, TOKENS, Tally
from loquetier.engine.trainer import Trainer
from loquetier.engine.version_files import VersionFiles
from loquetier.errors import EngineError, IntegrityError, LoquetierError, OutOfKVMemoryError, typed
from loquetier.failpoints import fail_points
from loquetier.kernels.select import process_kernels
from loquetier.kernels.smlm import SmlmPlans
from loquetier.kernels.transfer import mark
from loquetier.training.replay_probe import replay_refusal

log = logging.getLogger("loquetier.engine")
T = TypeVar("T")


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

    def add(self, report: StepReport) -> None:
        """Count one step."""
        self.steps += 1
        for name in ("train_rows", "eval_rows", "prefill_rows", "decode_rows", "backward_units"):
            setattr(self, name, getattr(self, name) + getattr(report, name))
        self.mixed_steps += bool(report.train_rows and (report.prefill_rows or report.decode_rows))


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step whose work is queued on the device; the host may not know its outcome yet."""

    plan: StepPlan
    batch: Batch | None
    tokens: DeviceTokens | None
    features: StepFeatures
    started: float
    end: torch.cuda.Event | None
    """Behind the step's last work; None on a CPU, where it has run."""

    @property
    def pending(self) -> PendingTokens | None:
        """Its tokens, for the step that is planned before they are known."""
        if self.batch is None or self.tokens is None:
            return None
        return PendingTokens(self.tokens.ids_N, {seq.seq_id: i for i, seq in enumerate(self.batch.sampled)})


class Engine:
    """Many adapters on one base, served and trained in the same forwards.

    Args:
        base: the base after surgery.
        config: resolved settings (no "auto", no None budgets).

    Raises:
        OutOfKVMemoryError: less than one page. UnsupportedModelError: tape="replay" on a base that it cannot run.
    """

    def __init__(self, base: Base, config: EngineConfig) -> None:
        assert config.kv_memory is not None and config.adapter_memory is not None, "resolve() the config first"
        self.base, self.config = base, config
        self.replay_refusal = None if config.serve_only else replay_refusal(base)
        """Why the replay tape cannot run this base; None when it can."""
        if self.replay_refusal is not None and config.tape == "replay":
            raise self.replay_refusal
        self.max_context = min(base.loaded.max_context, config.max_context or base.loaded.max_context)
        num_pages = _num_pages(base, config, config.kv_memory, self.max_context)
        process_kernels(base.device.type)  # may compile: at the start of an engine, not inside its first step
        self.cache = base.new_cache(num_pages, config.page_size)
        if config.serve_only:
            base.drop_originals()
        self.arena = Arena(config.adapter_memory, _adapter_dtype(base, config), base.device, base.weight)
        self._smlm_plans = SmlmPlans()
        self.registry = AdapterRegistry(base.name, self.arena.free, config.keep_versions)
        self.residency = _residency(base, config, self.arena, self.registry)
        self.allocator = BlockAllocator(num_pages, config.page_size)
        self.scheduler = Scheduler(config, self.allocator, self.max_context)
        head_module = next((t.index for t in base.targets if t.layer is None), None)
        may_share = _may_share(base, config, self.max_context)
        self.serving = Serving(base, self.scheduler, self.residency, self.max_context, head_module, may_share)
        self.trainer = Trainer(base, self.arena, head_module)
        self.adapters = AdapterShelf(self.arena, self.registry, self.residency, lora_only=config.serve_only)
        self.admission = Admission(self.trainer, self.residency, memory_model(base, config, self.arena.itemsize))
        fail_point = fail_points(os.environ)
        publisher = Publisher(self.arena, self.residency, self.admission, fail_point)
        self.jobs = Jobs(self.trainer, self.registry, self.admission, self.residency, publisher, fail_point)
        self.jobs.serve_only = config.serve_only
        self.admission.tell = self.jobs.tell
        self.residency.room_changed = self.admission.look_again
        self.residency.reserved_bytes = lambda: self.admission.reserved_bytes
        self.totals = Totals()
        self.step_seconds, self.step_tokens = Tally(SECONDS), Tally(TOKENS)
        """Of steps that did something; tokens are those of requests."""
        self.decode_graphs = self._new_graphs() if config.cuda_graphs else None
        self._in_flight: _Launched | None = None
        """With async scheduling: the step that the device computes while the next one is planned."""
        self._completed_at = 0.0
        """When the last step was complete."""

    @property
    def on_device(self) -> AbstractContextManager[object]:
        """Makes the engine's GPU the current one of the thread that runs it: kernels are launched on that one."""
        device = self.base.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    # --- the step ---

    @property
    def has_work(self) -> bool:
        """A step would do something."""
        waits = self.scheduler.has_work or self.trainer.has_work or self.admission.may_admit or self.residency.has_news
        return waits or self._in_flight is not None

    def step(self) -> StepReport:
        """One pass of the loop: schedule, forward, sample and loss, backward, optimize, commit, deliver.

        With async scheduling what is delivered is the step before, while the device computes this one.
        """
        started = time.perf_counter()
        plan = self._schedule()
        before, self._in_flight = self._in_flight, None
        launched = self._attempt(lambda: self._launch(plan, before, started))
        if before is not None:
            self._complete(before)
        if isinstance(launched, Exception):  # its sequences have their tokens of the step before
            self._fail(plan, launched)
        elif self.config.async_scheduling and not plan.is_empty:
            self._in_flight = launched
        elif not self._complete(launched):
            launched = EngineError("its tokens could not be delivered")
        report = _report(None if isinstance(launched, Exception) else launched, time.perf_counter() - started)
        self.totals.add(report)
        self.step_seconds.add(report.seconds)
        if report.prefill_rows or report.decode_rows:
            self.step_tokens.add(report.prefill_rows + report.decode_rows)
        return report

    @staticmethod
    def _attempt(call: Callable[[], T]) -> T | Exception:
        try:
            return call()
        except IntegrityError:
            raise  # our own books are wrong: nothing can be trusted to go on
        except Exception as error:
            log.exception("a step failed; what took part in it ends")
            return error

    def _schedule(self) -> StepPlan:
        trainer = self.trainer
        self.residency.tick()
        self.jobs.admit()
        limits = TrainLimits(
            units_per_tape=self.base.num_layers,
            open_tape_rows=trainer.tape.unit_rows if trainer.tape else 0,
            open_forward=trainer.forward_left,
            can_replay=self.replay_refusal is None,
            graph_bytes=self.admission.graph_bytes,
        )
        return self.scheduler.schedule(trainer.train_items(), trainer.eval_items(), trainer.open_units, limits)

    def _launch(self, plan: StepPlan, before: _Launched | None, started: float) -> _Launched:
        """Queue a planned step's work on the device. `before` is the step whose tokens the host does not know yet."""
        trainer, serving = self.trainer, self.serving
        tokens = batch = None
        serving.begun(plan)
        if plan.num_rows:
            batch = self._build(plan, before)
            hidden_MD = self._hidden(batch)
            tokens = serving.sample(batch, hidden_MD)
            trainer.losses(batch, hidden_MD)
        backward_rows = trainer.backward(plan.backward_units)
        self.jobs.after_backward()
        features = plan_features(plan, backward_rows)
        self.scheduler.commit(plan)
        if batch is not None:
            serving.mark_pending(batch)
        return _Launched(plan, batch, tokens, features, started, mark(self.base.device))

    def _hidden(self, batch: Batch) -> Tensor:
        replayed_MD = self.decode_graphs(batch) if self.decode_graphs is not None else None
        if replayed_MD is not None:
            return replayed_MD
        return self.base.hidden(batch.ids_M, batch.positions_M, batch.step)

    def _new_graphs(self) -> DecodeGraphs:
        lora = process_kernels(self.base.device.type).in_triton("smlm_forward")
        return DecodeGraphs(self.base, self.cache, self._smlm_plans, CudaCapture(), lora_is_fixed=lora)

    def _build(self, plan: StepPlan, before: _Launched | None) -> Batch:
        trainer = self.trainer
        return build_batch(
            plan,
            trainer.example_of,
            self.arena.factors,
            trainer.grads(),
            self.cache,
            trainer.open_tape(plan, self.config.train_window),
            trainer.dropout(plan),
            self.arena.methods,
            self._smlm_plans,
            before.pending if before is not None else None,
        )

    def _complete(self, launched: _Launched) -> bool:
        """Wait for a step, hand its tokens out and learn how long it took; False when that failed."""
        error = self._attempt(lambda: self._deliver(launched))
        if isinstance(error, Exception):
            self._fail(launched.plan, error)
        return error is None

    def _deliver(self, launched: _Launched) -> None:
        if launched.batch is not None:
            self.serving.deliver(launched.batch, launched.tokens)
        if launched.end is not None:
            launched.end.synchronize()
        now = time.perf_counter()
        # The device began it when it had finished the step before.
        self.scheduler.cost.observe(launched.features, now - max(launched.started, self._completed_at))
        self._completed_at = now

    def _fail(self, plan: StepPlan, cause: Exception) -> None:
        """A step broke: end what took part in it, keep everything else. Its KV rows are freed with it."""
        error = typed(cause)
        for seq in (*(c.seq for c in plan.prefill), *plan.decode):
            self.scheduler.pages.distrust(seq)  # also of one that has ended since: others may find its pages
            choice = self.serving.choices.get(seq.seq_id)
            if choice is not None:
                self.serving.end(choice, error)
        self.jobs.fail((*plan.train, *plan.evaluate), error)
        self.check_integrity()

    # --- requests ---

    def add_request(
        self,
        prompt: list[int],
        model: str,
        params: SamplingParams,
        sink: Callable[[TokenEvent], None],
        priority: int = 0,
        constrain: Callable[[], TokenConstraint] | None = None,
        space: CacheSpace | None = None,
    ) -> Request:
        """Queue a request; events go to `sink`. See `Serving.add` for the errors."""
        return self.serving.add(prompt, model, params, sink, priority, constrain, space)

    def abort_request(self, request_id: int) -> None:
        """End a request before the next step; its pages are free at once."""
        self.serving.abort(request_id)

    # --- books ---

    def close(self, error: LoquetierError) -> None:
        """End every request, evaluation and job with `error`."""
        self._in_flight = None
        for request_id in list(self.serving.requests):
            self.serving.abort(request_id, error)
        self.jobs.close(error)
        self.residency.close(error)

    def check_integrity(self) -> None:
        """Pages, slots, references and buffers add up. Raises IntegrityError."""
        self.scheduler.check_integrity()
        self.registry.check_integrity()
        self.arena.check_integrity()
        owned = [v.slot for v in self.registry.versions if v.slot >= 0] + [j.slot for j in self.trainer.jobs.values()]
        if sorted(owned) != sorted(self.arena.slots):
            raise IntegrityError(f"slots {sorted(self.arena.slots)} are allocated, {sorted(owned)} are owned")
        taken = self.allocator.num_pages - self.scheduler.pages.num_available
        if not self.has_work and taken:
            raise IntegrityError(f"idle, but {taken} KV pages are taken")
        self.residency.check_integrity()
        users = sum(v.users for v in self.registry.versions)
        expected = sum(not r.version.is_base for r in self.serving.requests.values()) + self.admission.num_pinned
        if users < expected:
            raise IntegrityError(f"{users} users of adapter versions, {expected} requests and jobs on adapters")
        self.admission.check_integrity()


def _adapter_dtype(base: Base, config: EngineConfig) -> torch.dtype:
    """What `resolve` chose; for a config that was not resolved, "auto" as `resolve` has it."""
    if config.adapter_dtype == "auto":
        return torch.float32 if base.device.type == "cpu" else base.dtype
    dtype: torch.dtype = getattr(torch, config.adapter_dtype)
    return dtype


def _residency(base: Base, config: EngineConfig, arena: Arena, registry: AdapterRegistry) -> Residency:
    packer = Packer(
        base.targets, base.name, str(base.loaded.name), arena.dtype, arena.total_bytes, base.device.type != "cpu"
    )
    spill = None if config.adapter_spill is None else Path(config.adapter_spill).absolute()
    patience, host_bytes = config.adapter_patience, config.host_adapter_memory or 0
    files = VersionFiles(arena, registry, packer, Inline(), spill)
    return Residency(arena, registry, files, patience=patience, host_bytes=host_bytes)


def _may_share(base: Base, config: EngineConfig, max_context: int) -> bool:
    """Whether sequences may share KV pages; they may not where a sliding window lets go of some."""
    window = base.sliding_window
    may_share = window is None or window >= max_context
    if config.prefix_cache and not may_share:
        log.info("no prefix cache on %s: its attention has a sliding window of %d tokens", base.name, window)
    return may_share


def _num_pages(base: Base, config: EngineConfig, kv_memory: int, max_context: int) -> int:
    """Pages of the KV cache. Raises OutOfKVMemoryError where there is memory for none."""
    page_bytes = base.page_bytes(config.page_size)
    num_pages = min(kv_memory // page_bytes, _most_useful_pages(config, max_context))
    if num_pages < 1:
        raise OutOfKVMemoryError(f"kv_memory={kv_memory} bytes is less than one page of {page_bytes} bytes; raise it")
    return num_pages


def _most_useful_pages(config: EngineConfig, max_context: int) -> int:
    """More pages than every sequence at full context would need are never used."""
    return config.max_sequences * -(-max_context // config.page_size)


def _report(launched: _Launched | None, seconds: float) -> StepReport:
    """What a step did, or nothing if it failed."""
    if launched is None:
        return StepReport(0, 0, 0, 0, 0, seconds)
    plan = launched.plan
    return StepReport(
        train_rows=sum(i.num_rows for i in plan.train),
        eval_rows=sum(i.num_rows for i in plan.evaluate),
        prefill_rows=sum(c.length for c in plan.prefill),
        decode_rows=len(plan.decode),
        backward_units=plan.backward_units if launched.features.backward_rows else 0,
        seconds=seconds,
    )
