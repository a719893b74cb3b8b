"""Has adapters that are on the disk answer: after a restart, and checkpoints as they are made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from loquetier.errors import AdapterNotFoundError, EngineStoppedError
from loquetier.server.adapter_ledger import AdapterLedger
from loquetier.server.models import ModelBook


@dataclass(frozen=True, slots=True)
class Shelf:
    """Any thread but the engine's."""

    ledger: AdapterLedger
    models: ModelBook

    def serve(self, name: str) -> None:
        """Have an adapter answer under its versions' own numbers; its weights come in when they are asked for.

        What is wrong with its files is told and stops nothing else.
        """
        adapters = self.ledger.store.adapters
        adapter = adapters.find(name)
        if adapter is None:
            return  # deleted meanwhile
        with suppress(EngineStoppedError):
            if not self.ledger.restore(adapter):
                return
            self.models.note(name, adapter.root, adapter.created_at)
            if adapters.find(name) is None:  # deleted between the two: its files may be gone
                self.withdraw([name], [])

    def withdraw(self, names: Sequence[str], directories: Sequence[str]) -> int:
        """After their rows have gone: they do not answer any more; what is under way ends on them, then files go.

        Returns the bytes of memory freed.
        """
        freed = 0
        for name in names:
            with suppress(AdapterNotFoundError, EngineStoppedError):  # damaged ones are rows only
                freed += self.ledger.runtime.unload_adapter(name)
        self.ledger.tidy(directories)
        return freed
