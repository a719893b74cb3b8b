"""The engine's heartbeat: a call goes through its loop again and again; an answer that does not come is a hang."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from loquetier.engine.engine import Engine, Totals
from loquetier.engine.rows import SequenceStatus
from loquetier.engine.tally import Tally
from loquetier.engine_port import EnginePort
from loquetier.server.settings import ServerSettings

BEAT_SECONDS = 0.5


MOST_NAMES = 64
"""Adapters that are named in a pulse, of each kind."""


@dataclass(frozen=True, slots=True)
class AdapterPulse:
    """What adapters take, who waits for one, and what came in and went out since the start."""

    num_registered: int
    """Versions that answer or are kept, in memory or not."""
    num_resident: int
    num_in_host_memory: int
    bytes_used: int
    bytes_total: int
    host_bytes_used: int
    host_bytes_total: int
    num_waiting: int
    """Requests, evaluations and jobs that wait for their adapter."""
    running: tuple[str, ...]
    """Adapters that answer something now; at most `MOST_NAMES`."""
    waiting: tuple[str, ...]
    """Adapters that are waited for; at most `MOST_NAMES`."""
    resident: tuple[str, ...]
    """Names by version in memory, most recently used first; at most `MOST_NAMES`."""
    pinned: tuple[str, ...]
    capacity: int
    """How many adapters of the mean size fit."""
    loads: int
    host_hits: int
    evictions: int
    load_failures: int
    load_seconds: float
    saves: int


@dataclass(frozen=True, slots=True)
class Pulse:
    """The engine's books at one beat."""

    num_running: int
    num_waiting: int
    kv_pages: int
    kv_pages_free: int
    """Those that only the prefix cache still holds included."""
    prefix_queries: int
    prefix_hits: int
    arena_bytes: int
    arena_bytes_free: int
    tokens_generated: int
    totals: Totals
    adapters: AdapterPulse
    num_deferred: int
    """Answers that wait for their adapter."""
    running: Mapping[str, int]
    """Answers with KV memory, by adapter."""
    waiting: Mapping[str, int]
    preemptions: int
    step_tokens: Tally
    step_seconds: Tally
    prediction_error: float | None
    """Of the step time, relative; None before anything could be predicted."""
    jobs: Mapping[str, int]
    """In the engine, by state."""
    jobs_ended: Mapping[str, int]
    train_steps: int
    train_tokens: int
    publishes: Tally
    """Seconds."""
    cache: Mapping[str, str]
    """What `cache_config_info` tells of the KV cache."""


@dataclass(slots=True)
class Watch:
    """Whether the engine's loop lives. Event loop only."""

    port: EnginePort
    settings: ServerSettings
    clock: Callable[[], float]
    pulse: Pulse | None = None
    """The last beat's books; None before the first."""
    _asked: float | None = field(default=None)
    """When the beat under way was asked for."""

    @property
    def problem(self) -> str | None:
        """Why the engine cannot answer, or None."""
        if not self.port.is_alive:
            return "the engine loop has ended"
        if self._asked is not None and self.clock() - self._asked > self.settings.hang_seconds:
            return f"the engine has not finished a step for {self.settings.hang_seconds:g} s"
        return None

    async def beat(self) -> None:
        """One beat: ask, and wait for the answer. Raises EngineStoppedError."""
        self._asked = self.clock()
        self.pulse = await asyncio.wrap_future(self.port.call(_pulse))
        self._asked = None

    async def run(self, on_death: Callable[[str], object]) -> None:
        """Beat until the engine dies or hangs; then say so once and end."""
        task: asyncio.Task[None] | None = None
        try:
            while self.problem is None:
                if task is None or task.done():
                    if task is not None and task.exception() is not None:
                        break
                    task = asyncio.create_task(self.beat())
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            if task is not None:
                task.cancel()
        on_death(self.problem or f"the engine's books cannot be read: {task.exception() if task else None}")


def _pulse(engine: Engine) -> Pulse:
    scheduler, jobs = engine.scheduler, engine.jobs
    return Pulse(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        kv_pages=engine.allocator.num_pages,
        kv_pages_free=engine.scheduler.pages.num_available,
        prefix_queries=engine.scheduler.pages.num_queried,
        prefix_hits=engine.scheduler.pages.num_hit,
        arena_bytes=engine.arena.total_bytes,
        arena_bytes_free=engine.arena.free_bytes,
        tokens_generated=engine.serving.tokens_generated,
        totals=replace(engine.totals),
        num_deferred=max(0, len(engine.serving.choices) - scheduler.num_running - scheduler.num_waiting),
        running=_by_adapter(engine, is_running=True),
        waiting=_by_adapter(engine, is_running=False),
        preemptions=scheduler.num_preemptions,
        step_tokens=engine.step_tokens.copy(),
        step_seconds=engine.step_seconds.copy(),
        prediction_error=scheduler.cost.prediction_error,
        jobs=Counter(job.status.value for job in jobs.open),
        jobs_ended=dict(jobs.tally.ended),
        train_steps=jobs.tally.steps,
        train_tokens=jobs.tally.tokens,
        publishes=jobs.publisher.took.copy(),
        cache=_cache_config(engine),
        adapters=_adapters(engine),
    )


def _adapters(engine: Engine) -> AdapterPulse:
    residency, arena, totals = engine.residency, engine.arena, engine.residency.totals
    there = sorted((v for v in engine.registry.versions if v.is_resident), key=lambda v: v.last_used, reverse=True)
    mean = sum(v.num_bytes for v in there) // len(there) if there else 0
    return AdapterPulse(
        num_registered=len(engine.registry.versions),
        num_resident=len(there),
        num_in_host_memory=len(residency.host),
        bytes_used=arena.total_bytes - arena.free_bytes,
        bytes_total=arena.total_bytes,
        host_bytes_used=residency.host.used_bytes,
        host_bytes_total=residency.host.total_bytes,
        num_waiting=residency.num_waiting,
        running=tuple(v.name for v in there if v.holders)[:MOST_NAMES],
        waiting=tuple(residency.waiting_names[:MOST_NAMES]),
        resident=tuple(v.name for v in there)[:MOST_NAMES],
        pinned=tuple(sorted(engine.registry.pinned)[:MOST_NAMES]),
        capacity=arena.total_bytes // mean if mean else 0,
        loads=totals.loads,
        host_hits=totals.host_hits,
        evictions=totals.evictions,
        load_failures=totals.failures,
        load_seconds=totals.load_seconds,
        saves=residency.files.num_saved,
    )


def _by_adapter(engine: Engine, *, is_running: bool) -> dict[str, int]:
    """Answers by adapter; those of the base are not counted."""
    found: Counter[str] = Counter()
    for choice in engine.serving.choices.values():
        name = choice.request.version.name
        if name != engine.base.name and (choice.seq.status is SequenceStatus.RUNNING) is is_running:
            found[name] += 1
    return dict(found)


def _cache_config(engine: Engine) -> dict[str, str]:
    return {
        "block_size": str(engine.allocator.page_size),
        "num_gpu_blocks": str(engine.allocator.num_pages),
        "cache_dtype": str(engine.base.dtype).removeprefix("torch."),
        "enable_prefix_caching": str(engine.config.prefix_cache and engine.serving.may_share),
        "kv_cache_memory_bytes": str(engine.allocator.num_pages * engine.base.page_bytes(engine.allocator.page_size)),
    }
