"""How a prompt becomes a request and its events an answer, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Future
from contextlib import aclosing, suppress

from loquetier.arguments import Prompt, encode_prompt, given
from loquetier.config import SamplingParams
from loquetier.engine.engine import Engine
from loquetier.engine.loop import EngineLoop
from loquetier.engine.request import Request, TokenEvent
from loquetier.errors import ConfigError, EngineStoppedError
from loquetier.generation import Collector, Completion, GenerationHandle


class Answers:
    """Requests of callers in this process. Methods may be called from any thread; `Runtime`'s say the rest."""

    def __init__(self, engine: Engine, loop: EngineLoop) -> None:
        self._engine, self._loop = engine, loop

    def submit(
        self, prompt: Prompt, model: str | None, params: SamplingParams | None, priority: int
    ) -> GenerationHandle:
        """See `Runtime.submit`."""
        params = _checked(params)
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise ConfigError(f"priority={priority!r}: must be an integer; lower runs earlier")
        tokens = self.encode(prompt)
        name = self.model_name(model)

        def add() -> GenerationHandle:
            events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
            request = self._engine.add_request(tokens, name, params, events.put, priority)
            return GenerationHandle(request.version.label, tokens, params.n, events, lambda: self._abort(request))

        return self._loop.call(add)

    async def generate(self, prompt: Prompt, model: str | None, params: SamplingParams | None) -> Completion:
        """See `Runtime.agenerate`."""
        request, events, collector = await self._submit(prompt, model, _checked(params))
        async for event in self._drain(request, events, collector):
            del event
        return collector.completion()

    async def stream(
        self, prompt: Prompt, model: str | None, params: SamplingParams | None
    ) -> AsyncIterator[TokenEvent]:
        """See `Runtime.astream`."""
        request, events, collector = await self._submit(prompt, model, _checked(params))
        # Closed with the outer one, not when the garbage collector finds it: leaving must abort at once.
        async with aclosing(self._drain(request, events, collector)) as drained:
            async for event in drained:
                yield event

    def encode(self, prompt: Prompt) -> list[int]:
        """See `Runtime.encode`."""
        return encode_prompt(prompt, self._engine.base.loaded.tokenizer, self._engine.base.name)

    def model_name(self, model: str | None) -> str:
        """None is the base; anything else must name something itself, the empty string too."""
        if model is None:
            return self._engine.base.name
        if not isinstance(model, str):
            raise ConfigError(f"model={model!r}: must be a name, or None for the base")
        return model

    async def _submit(
        self, prompt: Prompt, model: str | None, params: SamplingParams
    ) -> tuple[Request, asyncio.Queue[TokenEvent], Collector]:
        tokens = self.encode(prompt)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()

        def put(event: TokenEvent) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        name = self.model_name(model)
        submitted = self._loop.submit(lambda: self._engine.add_request(tokens, name, params, put))
        try:
            request = await asyncio.shield(asyncio.wrap_future(submitted))
        except asyncio.CancelledError:
            submitted.add_done_callback(self._abort_late)
            raise
        return request, events, Collector(request.version.label, tokens, params.n)

    async def _drain(
        self, request: Request, events: asyncio.Queue[TokenEvent], collector: Collector
    ) -> AsyncGenerator[TokenEvent, None]:
        try:
            while collector.num_open:
                event = await events.get()
                collector.add(event)
                yield event
        finally:
            if collector.num_open:
                self._abort(request)

    def _abort_late(self, submitted: Future[Request]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self._abort(submitted.result())

    def _abort(self, request: Request) -> None:
        with suppress(EngineStoppedError):  # a closed runtime has ended every request itself
            self._loop.submit(lambda: self._engine.abort_request(request.request_id))


def _checked(params: SamplingParams | None) -> SamplingParams:
    return given(params, SamplingParams, "params") or SamplingParams()
