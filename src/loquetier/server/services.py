"""Everything that routes share, built once: no globals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loquetier.engine_port import EnginePort
from loquetier.runtime import Runtime
from loquetier.server.adapter_desk import AdapterDesk
from loquetier.server.adapter_ledger import AdapterLedger
from loquetier.server.admission import Admission
from loquetier.server.auth import KeyRing
from loquetier.server.grammar import GrammarDesk
from loquetier.server.limits import BadKeys, Limiter
from loquetier.server.metrics import Metrics
from loquetier.server.models import ModelBook
from loquetier.server.quarantine import Quarantine
from loquetier.server.settings import ServerSettings
from loquetier.server.store.store import Store
from loquetier.server.telemetry import Telemetry
from loquetier.server.text import TextDesk
from loquetier.server.tuning import Tuning, build_tuning
from loquetier.server.watch import Watch

if TYPE_CHECKING:
    from loquetier.server.running import Running


@dataclass(frozen=True, slots=True)
class Services:
    """What a router gets. Routers of other rooms (files, jobs) take the same object."""

    runtime: Runtime
    port: EnginePort
    settings: ServerSettings
    keys: KeyRing
    clock: Callable[[], float]
    """Monotonic seconds."""
    wall: Callable[[], float]
    """Unix seconds, for `created` only."""
    limiter: Limiter
    bad_keys: BadKeys
    admission: Admission
    models: ModelBook
    adapters: AdapterDesk
    quarantine: Quarantine
    text: TextDesk
    grammars: GrammarDesk
    metrics: Metrics
    watch: Watch
    telemetry: Telemetry
    tuning: Tuning | None
    """Files and jobs, and the store below them; None for a server without."""
    open_runs: set[Running] = field(default_factory=set)
    """Orders in the engine; ended with an error when the time to drain is over."""


def build_services(
    runtime: Runtime,
    settings: ServerSettings,
    keys: KeyRing,
    base_root: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    store: Store | None = None,
    telemetry: Telemetry | None = None,
) -> Services:
    """The services over one runtime."""
    port = runtime.port
    models = ModelBook(port, base_root or runtime.base_name, int(wall()), None if store is None else store.adapters)
    admission = Admission(settings, clock)
    ledger = None if store is None else AdapterLedger(store, runtime)
    tuning = None
    if store is not None and ledger is not None:
        tuning = build_tuning(runtime, store, ledger, settings, admission, models, wall)
    unload = runtime.unload_adapter if tuning is None else tuning.unload
    metrics = Metrics(settings, port.base_name)
    runtime.on_swapped_in(metrics.adapter_swapped_in)
    telemetry = telemetry or Telemetry()
    telemetry.label_of, telemetry.clock = metrics.model, clock
    return Services(
        runtime=runtime,
        port=port,
        settings=settings,
        keys=keys,
        clock=clock,
        wall=wall,
        limiter=Limiter(clock),
        bad_keys=BadKeys(clock, settings.bad_keys_per_minute),
        admission=admission,
        models=models,
        adapters=AdapterDesk(runtime, port, models, metrics, settings, clock, wall, unload, ledger),
        quarantine=Quarantine(clock, models.label_of),
        text=TextDesk(runtime.tokenizer, runtime.base_name, runtime.max_context),
        grammars=GrammarDesk(runtime.tokenizer, port.vocab_size, port.eos_token_ids),
        metrics=metrics,
        watch=Watch(port, settings, clock),
        telemetry=telemetry,
        tuning=tuning,
    )
