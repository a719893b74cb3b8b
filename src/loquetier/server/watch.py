"""The engine's heartbeat: a call goes through its loop again and again; an answer that does not come is a hang."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from loquetier.engine.engine import Engine, Totals
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
    publishes: int
    publish_seconds: float
    totals: Totals
    adapters: AdapterPulse


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
    return Pulse(
        num_running=engine.scheduler.num_running,
        num_waiting=engine.scheduler.num_waiting + engine.residency.num_waiting,
        kv_pages=engine.allocator.num_pages,
        kv_pages_free=engine.scheduler.pages.num_available,
        prefix_queries=engine.scheduler.pages.num_queried,
        prefix_hits=engine.scheduler.pages.num_hit,
        arena_bytes=engine.arena.total_bytes,
        arena_bytes_free=engine.arena.free_bytes,
        tokens_generated=engine.serving.tokens_generated,
        publishes=engine.jobs.publishes,
        publish_seconds=engine.jobs.publish_seconds,
        totals=engine.totals,
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
