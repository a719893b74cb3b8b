"""Server-sent events to one client: written as they come, ended when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loquetier.server.problems import ApiError, body_of

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
PING_SECONDS = 15.0
"""Silence after which a comment keeps the connection (and proxies in between) alive."""


def encode(chunk: Mapping[str, Any]) -> bytes:
    """One event. JSON has no line breaks, so it is one line."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


class EventStream(Response):
    """Streams `parts` (bytes of whole events) and closes `stack` whatever happens.

    Args:
        parts: events; an ApiError raised by it is told as the last event, and the stream ends.
        stack: what holds the request in the engine; closing it aborts what is open.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        stack: AsyncExitStack,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._parts, self._stack = parts, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Returns when the stream is complete, or the client has left."""
        async with self._stack:
            writing = asyncio.create_task(self._write(send))
            leaving = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (writing, leaving):
                    if not task.done():
                        task.cancel()
                results = await asyncio.gather(writing, leaving, return_exceptions=True)
            error = results[0]
            if isinstance(error, Exception) and not isinstance(error, (OSError, ClientDisconnect)):
                raise error

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with aclosing(with_pings(self._parts)) as parts:
                async for part in parts:
                    await send(_body(part))
            await send(_body(DONE))
        except ApiError as error:
            await send(_body(encode(body_of(error))))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(part: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": part, "more_body": True}


async def with_pings(parts: AsyncGenerator[bytes, None], seconds: float = PING_SECONDS) -> AsyncGenerator[bytes, None]:
    """`parts`, with a comment wherever nothing came for so long."""
    following: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            following = following or asyncio.create_task(_next(parts))
            done, _ = await asyncio.wait({following}, timeout=seconds)
            if not done:
                yield PING
                continue
            task, following = following, None
            part = task.result()
            if part is None:
                return
            yield part
    finally:
        if following is not None:
            following.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await following
        await parts.aclose()


async def _next(parts: AsyncGenerator[bytes, None]) -> bytes | None:
    """The next part; None at the end (a task cannot raise StopAsyncIteration)."""
    return await anext(parts, None)


async def _gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(receive: Receive, work: asyncio.Task[Any]) -> Any:
    """The result of `work`; when the client leaves first, `work` is cancelled.

    Raises:
        ClientDisconnect: the client has left. Otherwise what `work` raises.
    """
    leaving = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, leaving):
            if not task.done():
                task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)
