"""One order seen from the event loop, with an engine that says what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from loquetier.config import SamplingParams
from loquetier.engine.request import TokenEvent
from loquetier.engine_port import Ticket
from loquetier.errors import EngineError
from loquetier.server import running
from loquetier.server.orders import Order, Streaming
from loquetier.server.problems import ApiError
from loquetier.server.running import Running
from loquetier.server.services import Services
from loquetier.server.settings import ServerSettings

DEADLINE = 60.0


class SaidPort:
    """An engine port whose events the test sends."""

    base_name = "base"

    def __init__(self) -> None:
        self.sink: Callable[[int, TokenEvent], None] = lambda index, event: None
        self.aborted = 0

    def add(self, prompts: Any, model: str, params: Any, sink: Any, *_: Any) -> Future[Ticket]:
        self.sink = sink
        done: Future[Ticket] = Future()
        done.set_result(Ticket((0,), "base"))
        return done

    def abort(self, ticket: Ticket, error: Any = None) -> None:
        self.aborted += 1


async def begun(port: SaidPort, worked: Callable[[str], None] = lambda label: None) -> Running:
    def nothing(*_: Any) -> None:
        return None

    services = SimpleNamespace(
        clock=lambda: 0.0,
        settings=ServerSettings(stream_interval=1.0),
        port=port,
        open_runs=set(),
        quarantine=SimpleNamespace(check=nothing, failed=nothing, worked=worked),
        admission=SimpleNamespace(started=nothing),
        limiter=SimpleNamespace(charge_tokens=nothing),
    )
    order = Order(request_id="cmpl-1", model="base", params=SamplingParams(), streaming=Streaming())
    who = cast(Any, SimpleNamespace(owner="local"))
    run = Running(cast(Services, services), who, order, 1, cast(Any, None))
    await run.start([[1]])
    return run


def test_text_before_a_failure_is_told_before_it() -> None:
    """Tokens gather for a piece; an error that ends the piece must not swallow them."""

    async def work() -> None:
        port = SaidPort()
        run = await begun(port)
        for event in (TokenEvent(0, 5, "a"), TokenEvent(0, 6, "b")):
            port.sink(0, event)
        port.sink(0, TokenEvent(0, None, "", finish_reason="error", error=EngineError("broken")))
        told = []
        with pytest.raises(ApiError, match="broken"):
            async for batch in run.batches():
                told += [event.text for _, event in batch]
        assert told == ["a", "b"] and run.completion_tokens == 2

    asyncio.run(asyncio.wait_for(work(), DEADLINE))


def test_a_client_that_leaves_before_the_failure_does_not_clear_the_adapter() -> None:
    async def work() -> None:
        port, worked = SaidPort(), []
        run = await begun(port, worked.append)
        port.sink(0, TokenEvent(0, 5, "a"))
        port.sink(0, TokenEvent(0, None, "", finish_reason="error", error=EngineError("broken")))
        batches = run.batches()
        assert [event.text for _, event in await anext(batches)] == ["a"]
        run.close()
        assert worked == [], "it failed, told or not"

    asyncio.run(asyncio.wait_for(work(), DEADLINE))


def test_a_client_that_takes_nothing_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "MAX_PENDING_EVENTS", 8)

    async def work() -> None:
        port = SaidPort()
        run = await begun(port)
        for token in range(8):
            port.sink(0, TokenEvent(0, token, "x"))
        assert port.aborted == 0
        port.sink(0, TokenEvent(0, 8, "x"))
        assert port.aborted == 1
        run.close()
        assert run.completion_tokens == 9, "what was generated is charged"

    asyncio.run(asyncio.wait_for(work(), DEADLINE))
