"""What a runtime says of its adapters and of itself."""

from __future__ import annotations

from dataclasses import dataclass

from loquetier.adapters.spec import AdapterSpec
from loquetier.engine.engine import Totals
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
