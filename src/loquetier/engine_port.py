"""What a server asks of the engine without waiting for it: requests in, events out, reads of the books.

`Runtime`'s own methods wait for the step under way; an HTTP loop cannot. Everything here returns a future or at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from loquetier.adapters.registry import AdapterVersion
from loquetier.adapters.spec import AdapterSpec, LinearTarget
from loquetier.config import SamplingParams, TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.engine.loop import EngineLoop
from loquetier.engine.prefix import CacheSpace
from loquetier.engine.request import Request, TokenEvent
from loquetier.engine.sampler import TokenConstraint
from loquetier.errors import EngineStoppedError, LoquetierError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ticket:
    """Requests that were queued together, one per prompt."""

    request_ids: tuple[int, ...]
    label: str
    """The version that answers all of them: ``name@number``, or the base's name."""


@dataclass(frozen=True, slots=True)
class EnginePort:
    """The engine as seen from another thread. Methods may be called from any thread."""

    _engine: Engine
    _loop: EngineLoop

    @property
    def is_alive(self) -> bool:
        """Whether the engine's loop runs; False after a close and after it died."""
        return self._loop.is_alive

    @property
    def base_name(self) -> str:
        """The name under which the bare base answers."""
        return self._engine.base.name

    @property
    def vocab_size(self) -> int:
        """Token ids are in ``[0, vocab_size)``."""
        return self._engine.base.vocab_size

    @property
    def targets(self) -> Sequence[LinearTarget]:
        """Every linear of the base that an adapter may sit on."""
        return self._engine.base.targets

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.max_context

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The model's own end tokens."""
        return self._engine.base.loaded.eos_token_ids

    def check_job(self, name: str, spec: AdapterSpec, config: TrainingConfig) -> None:
        """Refuse a job with checkpoints that would be refused whatever its data is; waits for no step.

        Raises:
            AdapterMismatchError, ConfigError, OutOfAdapterMemoryError, OutOfTrainMemoryError: as `Runtime.finetune`.
        """
        self._engine.jobs.admission.check_settings(name, spec, config, saves=True)

    def versions(self) -> tuple[AdapterVersion, ...]:
        """Every adapter version, live and kept, as of now; one atomic copy, which waits for no step."""
        return tuple(self._engine.registry.versions)

    def find(self, model: str) -> AdapterVersion | None:
        """The adapter version that `model` (a name, or ``name@number``) means now; waits for no step."""
        return self._engine.registry.find(model)

    def is_pinned(self, name: str) -> bool:
        """Whether an adapter must stay in memory."""
        return name in self._engine.registry.pinned

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        model: str,
        params: SamplingParams,
        sink: Callable[[int, TokenEvent], None],
        priority: int = 0,
        constrain: Callable[[], TokenConstraint] | None = None,
        space: CacheSpace | None = None,
    ) -> Future[Ticket]:
        """Queue one request per prompt, all of them or none; they share one adapter version.

        Args:
            sink: called on the engine's thread with the prompt's index and the event; must not block.
            constrain: makes what limits the tokens of one choice; None = nothing does.
            space: whose requests may share KV pages with these.

        Raises (in the future):
            as `Runtime.submit`.
        """

        def add_all() -> Ticket:
            requests: list[Request] = []
            try:
                for index, prompt in enumerate(prompts):
                    request = self._engine.add_request(
                        list(prompt), model, params, _tagged(sink, index), priority, constrain, space
                    )
                    requests.append(request)
            except BaseException:
                for request in requests:
                    request.sink = _nobody
                    self._engine.abort_request(request.request_id)
                raise
            return Ticket(tuple(r.request_id for r in requests), requests[0].version.label)

        return self._loop.submit(add_all)

    def abort(self, ticket: Ticket, error: LoquetierError | None = None) -> None:
        """End what is still open of a ticket before the next step; with `error`, its events say so."""

        def abort_all() -> None:
            for request_id in ticket.request_ids:
                self._engine.serving.abort(request_id, error)

        with suppress(EngineStoppedError):  # a closed runtime has ended every request itself
            self._loop.submit(abort_all)

    def call(self, call: Callable[[Engine], T]) -> Future[T]:
        """Have `call` run on the engine's thread between two steps. Raises EngineStoppedError."""
        return self._loop.submit(lambda: call(self._engine))


def _tagged(sink: Callable[[int, TokenEvent], None], index: int) -> Callable[[TokenEvent], None]:
    return lambda event: sink(index, event)


def _nobody(_: TokenEvent) -> None:
    """The sink of a request that was never announced."""
