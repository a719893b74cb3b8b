"""What a runtime says of its adapters and of itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loquetier.adapters.spec import AdapterSpec
from loquetier.engine.engine import Engine, Totals
from loquetier.engine.residency_books import ResidencyTotals


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One served name."""

    name: str
    version: int
    num_modules: int
    num_bytes: int
    """In the arena, while it is there."""
    num_users: int
    """Requests running on it now."""
    spec: AdapterSpec
    template_fingerprint: str | None = None
    """Of the chat template and tokenizer that it was trained under; None = whoever wrote it did not say."""
    template_differs: bool = False
    """It was trained under another template or tokenizer than this base's: its chat prompts are new to it."""
    is_resident: bool = True
    """Its weights are in the arena; if not, they come in with the first request."""
    is_pinned: bool = False
    """It stays there."""


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """What the engine did and holds."""

    totals: Totals
    tokens_generated: int
    num_running: int
    num_waiting: int
    kv_pages_free: int
    """Those that only the prefix cache still holds included."""
    kv_pages: int
    arena_bytes_free: int
    arena_bytes: int
    publishes: int
    publish_seconds: float
    """Time spent publishing, over all publishes."""
    longest_publish: float
    """Seconds of the slowest publish."""
    publish_bytes: int
    """Bytes of weights that publishing copied, over all publishes."""
    adapters: ResidencyTotals
    """What came into the arena and left it."""
    adapters_resident: int
    """Versions in the arena now."""
    prefix_queries: int = 0
    """Tokens of admitted sequences that could have been in the prefix cache, each sequence once."""
    prefix_hits: int = 0
    """Tokens of them that were."""

    @property
    def mean_publish(self) -> float:
        """Seconds of a publish on average; 0 before the first."""
        return self.publish_seconds / self.publishes if self.publishes else 0.0


def stats_of(engine: Engine) -> RuntimeStats:
    """The books now; engine thread only."""
    return RuntimeStats(
        totals=replace(engine.totals),
        tokens_generated=engine.serving.tokens_generated,
        num_running=engine.scheduler.num_running,
        num_waiting=engine.scheduler.num_waiting + engine.residency.num_waiting,
        kv_pages_free=engine.scheduler.pages.num_available,
        kv_pages=engine.allocator.num_pages,
        arena_bytes_free=engine.arena.free_bytes,
        arena_bytes=engine.arena.total_bytes,
        publishes=engine.jobs.publisher.count,
        publish_seconds=engine.jobs.publisher.took.total,
        longest_publish=engine.jobs.publisher.longest,
        publish_bytes=engine.jobs.publisher.num_bytes,
        prefix_queries=engine.scheduler.pages.num_queried,
        prefix_hits=engine.scheduler.pages.num_hit,
        adapters=replace(engine.residency.totals),
        adapters_resident=sum(v.is_resident for v in engine.registry.versions),
    )
