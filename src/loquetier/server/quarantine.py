"""An adapter whose requests break the engine again and again is set aside; the others go on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from loquetier.server.problems import overloaded

FAILURES = 3
"""In a row."""
SECONDS = 60.0
"""How long a version is set aside before it is tried again."""
_MAX_LABELS = 1024


@dataclass(slots=True)
class Quarantine:
    """Failures in a row per version label. Event loop only."""

    clock: Callable[[], float]
    label_of: Callable[[str], str]
    """The version that a model's name means now."""
    _failures: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)
    """Count, and when the last one was."""

    def check(self, model: str) -> None:
        """Raises ApiError 503 for a version that is set aside."""
        if not self._failures:
            return
        label = self.label_of(model)
        count, at = self._failures.get(label, (0, 0.0))
        left = at + SECONDS - self.clock()
        if count >= FAILURES and left > 0:
            raise overloaded(f"{label} failed {count} times in a row and is set aside", left, "adapter_quarantined")

    def failed(self, label: str) -> None:
        """The engine failed while it ran a request of this version."""
        count, _ = self._failures.pop(label, (0, 0.0))
        self._failures[label] = (count + 1, self.clock())
        while len(self._failures) > _MAX_LABELS:
            self._failures.popitem(last=False)

    def worked(self, label: str) -> None:
        """An answer was completed."""
        self._failures.pop(label, None)
