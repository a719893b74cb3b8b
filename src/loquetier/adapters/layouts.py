"""One object for all adapters of one form."""

from __future__ import annotations

from typing import Final

from loquetier.adapters.spec import ModulePlan

MOST: Final = 1024


class Layouts:
    """Forms that were seen: thousands of adapters share few of them, take little memory so, and compare fast."""

    def __init__(self) -> None:
        self._known: dict[tuple[ModulePlan, ...], tuple[ModulePlan, ...]] = {}

    def shared(self, modules: tuple[ModulePlan, ...]) -> tuple[ModulePlan, ...]:
        """The one tuple that equals `modules`."""
        if len(self._known) >= MOST:
            self._known.clear()
        return self._known.setdefault(modules, modules)
