"""Has adapters that are on the disk answer: those of ended jobs after a restart, checkpoints as they are made."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import structlog

from loquetier.engine.engine import Engine
from loquetier.errors import AdapterNotFoundError, EngineStoppedError, LoquetierError
from loquetier.runtime import Runtime
from loquetier.server.models import ModelBook
from loquetier.server.store.store import Store

log = structlog.get_logger("loquetier.server.jobs")


@dataclass(frozen=True, slots=True)
class Shelf:
    """Any thread but the engine's."""

    runtime: Runtime
    store: Store
    models: ModelBook

    def serve(self, name: str) -> None:
        """Load the live version of an adapter under its own number.

        What is wrong with it, or no room for it in memory, is told and stops nothing else.
        """
        adapter, version = self.store.adapters.find(name), self.store.adapters.version(name)
        if adapter is None or version is None:
            return  # deleted meanwhile

        def number(engine: Engine) -> None:
            engine.registry.number_after(name, version.number - 1)

        try:
            self.runtime.port.call(number).result()
            self.runtime.load_adapter(name, self.store.adapters.path(version))
        except EngineStoppedError:
            return
        except LoquetierError as error:
            log.error("adapter_not_served", adapter=name, problem=str(error))
            return
        self.models.note(name, adapter.root, adapter.created_at)

    def withdraw(self, name: str) -> None:
        """It does not answer any more; what is under way ends on it."""
        with suppress(AdapterNotFoundError, EngineStoppedError):  # it may not have been in memory
            self.runtime.unload_adapter(name)
