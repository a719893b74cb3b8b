"""One use of an adapter version: a request, an evaluation, a job that continues from it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from loquetier.adapters.registry import AdapterVersion
from loquetier.errors import LoquetierError


class HoldState(enum.Enum):
    """How far a use of a version has come."""

    NEW = "new"
    WAITING = "waiting"
    HELD = "held"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Hold:
    """One use of a version, from the moment it is resolved until `Residency.drop`."""

    version: AdapterVersion
    is_long: bool = False
    """It does not end by itself within some steps: nobody waits for it."""
    state: HoldState = HoldState.NEW
    since: float = 0.0
    """When it began to wait."""
    ready: Callable[[], None] = field(default=lambda: None)
    fail: Callable[[LoquetierError], None] = field(default=lambda error: None)
