"""Whether one more request may come in: by how many answers wait, and for how long. Event loop only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from loquetier.server.problems import overloaded
from loquetier.server.settings import ServerSettings


@dataclass(eq=False, slots=True)
class Waiting:
    """One admitted request."""

    choices: int
    since: float


@dataclass(slots=True)
class Admission:
    """Requests that were admitted: those that wait for their first token, and those that answer."""

    settings: ServerSettings
    clock: Callable[[], float]
    is_draining: bool = False
    """Set when the server is told to stop: nothing new comes in."""
    _waiting: dict[int, Waiting] = field(default_factory=dict)
    """By id, in order of arrival."""
    num_open: int = 0
    """Requests that are not over."""

    @property
    def num_waiting(self) -> int:
        """Answers without a first token."""
        return sum(w.choices for w in self._waiting.values())

    @property
    def oldest_wait(self) -> float:
        """Seconds that the oldest of them has waited; 0 when none does."""
        first = next(iter(self._waiting.values()), None)
        return 0.0 if first is None else max(0.0, self.clock() - first.since)

    def enter(self, choices: int) -> Waiting:
        """Admit a request of so many answers; pair it with `leave`. Raises ApiError 503."""
        if self.is_draining:
            raise overloaded("the server is shutting down", code="shutting_down")
        waiting, age = self.num_waiting, self.oldest_wait
        if waiting and waiting + choices > self.settings.max_queued:
            raise overloaded(f"{waiting} answers are waiting; the limit is {self.settings.max_queued}", max(1.0, age))
        if age > self.settings.queue_age_limit:
            raise overloaded(
                f"the oldest request has waited {age:.1f} s for its first token; the limit is "
                f"{self.settings.queue_age_limit:g} s",
                age / 2,
            )
        entry = Waiting(choices, self.clock())
        self._waiting[id(entry)] = entry
        self.num_open += 1
        return entry

    def started(self, entry: Waiting) -> None:
        """Its first token is there: it does not wait any more."""
        self._waiting.pop(id(entry), None)

    def leave(self, entry: Waiting) -> None:
        """It is over."""
        self.started(entry)
        self.num_open -= 1
