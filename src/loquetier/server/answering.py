"""An order to an HTTP answer, whole or streamed. What chat and completions share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loquetier.engine.request import TokenEvent
from loquetier.generation import Collector, Completion
from loquetier.server.auth import Principal, Scope
from loquetier.server.orders import Order
from loquetier.server.problems import ApiError, bad
from loquetier.server.running import Running, running
from loquetier.server.services import Services
from loquetier.server.sse import EventStream, encode, until_gone

VERSION_HEADER = "x-loquetier-model-version"


class Shape(Protocol):
    """How answers of one endpoint look."""

    @property
    def prompt_tokens(self) -> int:
        """For the usage."""

    def shown_tokens(self, generated: int) -> int:
        """Completion tokens of the usage."""

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer without its usage."""

    def chunks(self, prompt_index: int, event: TokenEvent) -> Iterator[dict[str, Any]]:
        """An event's chunks without usage."""

    def empty_chunk(self) -> dict[str, Any]:
        """A chunk without choices."""


MakeShape = Callable[[str], Shape]
"""From the label of the version that answers."""


async def answer(
    services: Services,
    request: Request,
    order: Order,
    prompts: Sequence[Sequence[int]],
    make_shape: MakeShape,
) -> Response:
    """Queue an order and answer it.

    Raises:
        ApiError: nothing of the order is left in the engine. ClientDisconnect: the same, and nobody to tell.
    """
    who: Principal = request.scope["state"]["principal"]
    if order.priority < 0 and Scope.ADMIN not in who.scopes:
        raise bad("a priority below 0 needs a key with the scope 'admin'", "priority")
    work = _start_stream if order.streaming is not None else _whole
    task = asyncio.create_task(_counted(services, order, work(services, who, order, prompts, make_shape)))
    response: Response = await until_gone(request.receive, task)
    return response


async def _counted(services: Services, order: Order, work: Any) -> Response:
    try:
        response: Response = await work
        return response
    except ApiError as error:
        if error.status in (429, 503):
            services.metrics.refused(order.model.partition("@")[0], error.api_code or "other")
        raise


async def _whole(
    services: Services, who: Principal, order: Order, prompts: Sequence[Sequence[int]], make_shape: MakeShape
) -> Response:
    async with running(services, who, order, prompts) as run:
        services.metrics.admitted(_name(order), map(len, prompts), order.params.n)
        collectors = [Collector(run.label, list(p), order.params.n) for p in prompts]
        try:
            async for batch in run.batches():
                for index, event in batch:
                    collectors[index].add(event)
        except BaseException as error:
            _finished(services, order, run, "error" if isinstance(error, ApiError) else "abort")
            raise
        completions = [c.completion() for c in collectors]
        _finished(services, order, run, completions[0].answers[0].finish_reason or "stop")
    shape = make_shape(run.label)
    body = await asyncio.to_thread(_encode_whole, shape, completions, run.completion_tokens, run.cached_tokens)
    return Response(body, 200, {VERSION_HEADER: run.label}, "application/json")


def _encode_whole(shape: Shape, completions: Sequence[Completion], generated: int, cached: int) -> bytes:
    return msgspec.json.encode(shape.whole(completions) | {"usage": usage(shape, generated, cached)})


async def _start_stream(
    services: Services, who: Principal, order: Order, prompts: Sequence[Sequence[int]], make_shape: MakeShape
) -> Response:
    async with AsyncExitStack() as stack:
        run = await stack.enter_async_context(running(services, who, order, prompts))
        services.metrics.admitted(_name(order), map(len, prompts), order.params.n)
        parts = _stream(services, order, run, make_shape(run.label))
        headers = {VERSION_HEADER: run.label}
        return EventStream(parts, stack.pop_all(), headers)
    raise AssertionError("unreachable")


async def _stream(services: Services, order: Order, run: Running, shape: Shape) -> AsyncGenerator[bytes, None]:
    options = order.streaming
    assert options is not None
    reason = "abort"
    try:
        async for batch in run.batches():
            out: list[bytes] = []
            for index, event in batch:
                for chunk in shape.chunks(index, event):
                    if options.usage:
                        chunk["usage"] = (
                            usage(shape, run.completion_tokens, run.cached_tokens) if options.continuous else None
                        )
                    out.append(encode(chunk))
                reason = event.finish_reason or reason
            if out:
                yield b"".join(out)
        if options.usage:
            yield encode(shape.empty_chunk() | {"usage": usage(shape, run.completion_tokens, run.cached_tokens)})
    except ApiError:
        reason = "error"
        raise
    finally:
        _finished(services, order, run, reason)


def _finished(services: Services, order: Order, run: Running, reason: str) -> None:
    services.metrics.finished(_name(order), run.times, run.completion_tokens, reason)


def _name(order: Order) -> str:
    """The model without its version: metrics have no label per version."""
    return order.model.partition("@")[0]


def usage(shape: Shape, generated: int, cached: int) -> dict[str, Any]:
    """OpenAI's usage object. `cached`: prompt tokens that were in the prefix cache."""
    shown = shape.shown_tokens(generated)
    return {
        "prompt_tokens": shape.prompt_tokens,
        "completion_tokens": shown,
        "total_tokens": shape.prompt_tokens + shown,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
