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
from loquetier.server.pieces import apart, joined
from loquetier.server.problems import ApiError, bad
from loquetier.server.running import Running, running
from loquetier.server.services import Services
from loquetier.server.sse import EventStream, encode, until_gone
from loquetier.server.telemetry import Observation, Outcome

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
    seen = services.telemetry.begin(order, request.headers)
    task = asyncio.create_task(_counted(services, seen, work(services, who, seen, prompts, make_shape)))
    response: Response = await until_gone(request.receive, task)
    return response


async def _counted(services: Services, seen: Observation, work: Any) -> Response:
    try:
        response: Response = await work
        return response
    except ApiError as error:
        if error.status in (429, 503):
            services.metrics.refused(_name(seen.order), error.api_code or "other")
        seen.end(Outcome("error", error_type=error.api_code or str(error.status)))
        raise


async def _whole(
    services: Services, who: Principal, seen: Observation, prompts: Sequence[Sequence[int]], make_shape: MakeShape
) -> Response:
    order = seen.order
    async with running(services, who, order, prompts) as run:
        services.metrics.admitted(_name(order), map(len, prompts), order.params.n, order.params.max_tokens)
        collectors = [Collector(run.label, list(p), order.params.n) for p in prompts]
        try:
            async for batch in run.batches():
                for index, event in batch:
                    collectors[index].add(event)
        except BaseException as error:
            _finished(services, seen, run, "error" if isinstance(error, ApiError) else "abort", error)
            raise
        completions = [c.completion() for c in collectors]
        _finished(services, seen, run, completions[0].answers[0].finish_reason or "stop")
    shape = make_shape(run.label)
    body = await asyncio.to_thread(_encode_whole, shape, completions, run.completion_tokens, run.cached_tokens)
    return Response(body, 200, {VERSION_HEADER: run.label}, "application/json")


def _encode_whole(shape: Shape, completions: Sequence[Completion], generated: int, cached: int) -> bytes:
    return msgspec.json.encode(shape.whole(completions) | {"usage": usage(shape, generated, cached)})


async def _start_stream(
    services: Services, who: Principal, seen: Observation, prompts: Sequence[Sequence[int]], make_shape: MakeShape
) -> Response:
    order = seen.order
    async with AsyncExitStack() as stack:
        run = await stack.enter_async_context(running(services, who, order, prompts))
        services.metrics.admitted(_name(order), map(len, prompts), order.params.n, order.params.max_tokens)
        parts = _stream(services, seen, run, make_shape(run.label))
        headers = {VERSION_HEADER: run.label}
        return EventStream(parts, stack.pop_all(), headers)
    raise AssertionError("unreachable")


async def _stream(services: Services, seen: Observation, run: Running, shape: Shape) -> AsyncGenerator[bytes, None]:
    options, failure = seen.order.streaming, None
    assert options is not None
    reason, told = "abort", 0
    try:
        async for batch in run.batches():
            out: list[bytes] = []
            for part in apart(batch) if seen.order.return_token_ids else joined(batch):
                told += part.num_tokens
                for chunk in shape.chunks(part.prompt, part.event):
                    if options.usage:
                        chunk["usage"] = usage(shape, told, run.cached_tokens) if options.continuous else None
                    out.append(encode(chunk))
                reason = part.event.finish_reason or reason
            if out:
                yield b"".join(out)
        if options.usage:
            yield encode(shape.empty_chunk() | {"usage": usage(shape, run.completion_tokens, run.cached_tokens)})
    except ApiError as error:
        reason, failure = "error", error
        raise
    finally:
        _finished(services, seen, run, reason, failure)


def _finished(
    services: Services, seen: Observation, run: Running, reason: str, error: BaseException | None = None
) -> None:
    run.settle()
    services.metrics.finished(_name(seen.order), run.times, run.completion_tokens, reason)
    kind = (error.api_code or str(error.status)) if isinstance(error, ApiError) else None
    seen.end(
        Outcome(
            reason,
            input_tokens=run.prompt_tokens,
            output_tokens=run.completion_tokens,
            cached_tokens=run.cached_tokens,
            label=run.label,
            times=run.times,
            error_type=kind or ("client_gone" if reason == "abort" else None),
        )
    )


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
