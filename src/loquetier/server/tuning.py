"""Files and fine-tuning jobs: the parts that outlive a process, and their order at its start and end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from loquetier.runtime import Runtime
from loquetier.server.adapter_ledger import AdapterLedger
from loquetier.server.admission import Admission
from loquetier.server.file_check import FileChecker
from loquetier.server.file_desk import FileDesk
from loquetier.server.jobs.bell import Bell
from loquetier.server.jobs.changes import JobChanges
from loquetier.server.jobs.desk import JobDesk
from loquetier.server.jobs.patience import Patience
from loquetier.server.jobs.running import RunningJobs
from loquetier.server.jobs.shelf import Shelf
from loquetier.server.models import ModelBook
from loquetier.server.settings import ServerSettings
from loquetier.server.store.store import Store

log = structlog.get_logger("loquetier.server.jobs")


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the routes of files and jobs share."""

    runtime: Runtime
    store: Store
    ledger: AdapterLedger
    settings: ServerSettings
    admission: Admission
    models: ModelBook
    checker: FileChecker
    files: FileDesk
    jobs: JobDesk
    changes: JobChanges
    running: RunningJobs
    bell: Bell
    wall: Callable[[], float]

    def start(self) -> None:
        """Take up what the process before left: adapters first, so that a job's next publish is the newer version."""
        self.ledger.open()
        self.checker.start()
        for adapter in self.store.adapters.all():
            if adapter.live_number is not None:
                self.running.shelf.serve(adapter.name)
        self.running.recover()

    @property
    def problem(self) -> str | None:
        """Why the server is not ready yet."""
        count = self.running.num_coming_back
        return f"{count} jobs are being taken up again" if count else None

    async def delete_model(self, name: str) -> None:
        """Forget an adapter of a job or a checkpoint, durably; what is under way ends on it."""
        await asyncio.shield(asyncio.to_thread(self.changes.delete_model, name))

    def unload(self, name: str) -> int:
        """Forget an adapter, whoever made it, durably; returns the bytes freed. Waits. Raises as the two ways do."""
        known = self.store.adapters.find(name)
        if known is not None and known.job_id is not None:
            return self.changes.delete_model(name)
        return self.ledger.unload(name)

    def close(self) -> None:
        """After the engine has stopped. The store stays open."""
        self.checker.close()
        self.running.close()


def build_tuning(
    runtime: Runtime,
    store: Store,
    ledger: AdapterLedger,
    settings: ServerSettings,
    admission: Admission,
    models: ModelBook,
    wall: Callable[[], float],
) -> Tuning:
    """The parts over one runtime and one store."""
    checker, bell = FileChecker(store), Bell()
    running = RunningJobs(runtime, store, checker, bell, Patience(store), Shelf(ledger, models))
    changes = JobChanges(store, running)
    return Tuning(
        runtime=runtime,
        store=store,
        ledger=ledger,
        settings=settings,
        admission=admission,
        models=models,
        checker=checker,
        files=FileDesk(store, settings, checker),
        jobs=JobDesk(store, settings, running, changes, models),
        changes=changes,
        running=running,
        bell=bell,
        wall=wall,
    )
