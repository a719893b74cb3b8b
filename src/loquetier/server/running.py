"""One order in the engine, seen from the event loop: events in batches, and an abort whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import takewhile

from loquetier.engine.prefix import CacheSpace
from loquetier.engine.request import TokenEvent
from loquetier.engine_port import Ticket
from loquetier.errors import AdapterUnavailableError, EngineStoppedError, LoquetierError, OutOfAdapterMemoryError
from loquetier.server.admission import Waiting
from loquetier.server.auth import Principal
from loquetier.server.inbox import Inbox
from loquetier.server.metrics import RequestTimes
from loquetier.server.orders import Order
from loquetier.server.pieces import WHOLE_INTERVAL, Event, stream_interval
from loquetier.server.problems import ApiError, bad, from_error, overloaded
from loquetier.server.services import Services

MAX_PENDING_EVENTS = 16384
"""Events that nobody takes: a client that lags further than this is gone."""


class Running:
    """Events of an order; made by `running`. Event loop only, but for the sink."""

    def __init__(self, services: Services, who: Principal, order: Order, num_prompts: int, waiting: Waiting) -> None:
        self._services, self._who, self._order, self._waiting = services, who, order, waiting
        self._inbox: Inbox[tuple[float, Event]] = Inbox(self._interval)
        """Events with the time at which they came."""
        self._ticket: Ticket | None = None
        self.num_open = num_prompts * order.params.n
        self.label = ""
        """The version that answers."""
        self.prompt_tokens = self.completion_tokens = 0
        self.cached_tokens = 0
        """Prompt tokens that were in the prefix cache, of each prompt's first answer."""
        self._has_failed = False
        self.times = RequestTimes(services.clock)

    async def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Queue the order. Raises ApiError, with nothing queued."""
        self.prompt_tokens = sum(map(len, prompts))
        order, quarantine = self._order, self._services.quarantine
        quarantine.check(order.model)
        space = CacheSpace(self._who.owner, order.cache_salt or "")
        try:
            future = self._services.port.add(
                prompts, order.model, order.params, self._sink, order.priority, order.constrain, space
            )
            try:
                self._ticket = await asyncio.shield(asyncio.wrap_future(future))
            except asyncio.CancelledError:
                port = self._services.port
                future.add_done_callback(lambda f: None if f.cancelled() or f.exception() else port.abort(f.result()))
                raise
        except LoquetierError as error:
            raise from_error(error, order.model) from error
        self.label = self._ticket.label

    def _interval(self) -> float:
        if self._order.streaming is None:
            return WHOLE_INTERVAL
        return stream_interval(self._services.settings.stream_interval, len(self._services.open_runs))

    def _sink(self, index: int, event: TokenEvent) -> None:
        """On the engine's thread."""
        waiting = self._inbox.put((self._services.clock(), (index, event)), urgent=event.finish_reason is not None)
        if waiting > MAX_PENDING_EVENTS:
            self.abort()

    def _take(self, at: float, prompt: int, event: TokenEvent) -> None:
        if event.token_id is not None:
            if not self.completion_tokens:
                self._services.admission.started(self._waiting)
            self.completion_tokens += 1
            if self.times.first is None:
                self.times.queued = event.queue_seconds
            self.times.token(at, (prompt, event.index))
        if event.index == 0:
            self.cached_tokens += event.cached_tokens
        if event.finish_reason is not None:
            self.num_open -= 1

    async def batches(self) -> AsyncIterator[list[Event]]:
        """What has happened since the last batch, until every choice is finished.

        Raises:
            ApiError: the request failed, or was ended by the server.
        """
        while self.num_open > 0:
            batch = await self._inbox.take()
            for at, (prompt, event) in batch:
                self._take(at, prompt, event)
            events = [event for _, event in batch]
            good = list(takewhile(lambda e: not _is_failure(e[1]), events))
            # Noted at once, for the client may leave meanwhile; what came before it is told before it.
            failure = self._failure(events[len(good)][1]) if len(good) < len(events) else None
            if good:
                yield good
            if failure is not None:
                raise failure

    def settle(self) -> None:
        """Count what nobody took: the books of a client that has left are right too."""
        for at, (prompt, event) in self._inbox.take_now():
            self._take(at, prompt, event)

    def _failure(self, event: TokenEvent) -> ApiError:
        self.abort()
        if event.error is None:
            return overloaded("the request was aborted by the server", code="request_aborted")
        self._has_failed = True
        self._count_failure(event.error)
        failure = from_error(event.error, self._order.model)
        failure.__cause__ = event.error
        return failure

    def _count_failure(self, error: LoquetierError) -> None:
        """Only what the adapter may be the cause of: not the base, an end of the engine, or a client's own grammar.

        Nor that it could not come into memory: it did not run, and may be there the next time.
        """
        is_adapter = self.label != self._services.port.base_name
        other = (EngineStoppedError, AdapterUnavailableError, OutOfAdapterMemoryError)
        if is_adapter and self._order.constrain is None and not isinstance(error, other):
            self._services.quarantine.failed(self.label)

    def abort(self, error: LoquetierError | None = None) -> None:
        """End what is open before the next step."""
        if self._ticket is not None and self.num_open:
            self._services.port.abort(self._ticket, error)

    def close(self) -> None:
        """It is over, or its client has left: nothing of it goes on."""
        self.settle()
        if self.num_open:
            self.abort()
        elif not self._has_failed:
            self._services.quarantine.worked(self.label)
        self._services.limiter.charge_tokens(self._who, self.completion_tokens)


def _is_failure(event: TokenEvent) -> bool:
    return event.error is not None or event.finish_reason == "abort"


@asynccontextmanager
async def running(
    services: Services, who: Principal, order: Order, prompts: Sequence[Sequence[int]]
) -> AsyncIterator[Running]:
    """Admit an order and queue it; leaving aborts what is open.

    Raises:
        ApiError: refused by a limit, by the state of the server, or by the engine; nothing is left behind.
    """
    check_prompts(prompts, order, services.port.vocab_size, services.port.max_context)
    services.limiter.take_tokens(who, sum(map(len, prompts)))
    with services.limiter.running(who):
        waiting = services.admission.enter(len(prompts) * order.params.n)
        try:
            run = Running(services, who, order, len(prompts), waiting)
            await run.start(prompts)
            services.open_runs.add(run)
            try:
                yield run
            finally:
                services.open_runs.discard(run)
                run.close()
        finally:
            services.admission.leave(waiting)


def check_prompts(prompts: Sequence[Sequence[int]], order: Order, vocab_size: int, max_context: int) -> None:
    """What the engine would refuse, said with the field's name. Raises ApiError."""
    for tokens in prompts:
        if not tokens:
            raise bad("the prompt is empty and this model has no token to begin with", "prompt")
        wrong = next((t for t in tokens if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise bad(f"prompt: token id {wrong} is not in [0, {vocab_size})", "prompt")
        wanted = order.params.max_tokens or 1
        if len(tokens) + wanted > max_context:
            asked = f"{len(tokens)} in the prompt and {wanted} for the answer"
            raise bad(
                f"This model's maximum context length is {max_context} tokens. However, you requested "
                f"{len(tokens) + wanted} tokens ({asked}). Shorten the prompt or lower max_tokens.",
                "messages" if order.request_id.startswith("chat") else "prompt",
                "context_length_exceeded",
            )
