"""HTTP/1.1 connections that do not wait for ever: bounds on their number, on the time for headers, and for reading."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

from loquetier.server.settings import ServerSettings

log = structlog.get_logger("loquetier.server.connection")


class BoundedProtocol(H11Protocol):  # type: ignore[misc, unused-ignore]
    """One connection, as `protocol_class` makes it."""

    limits: ServerSettings
    _timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
        else:
            self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start_timer()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as we write, and 64 kB wait for it."""
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.stall_timeout, self._stalled)

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def _stalled(self) -> None:
        log.warning("client_stalled", seconds=self.limits.stall_timeout)
        self.transport.abort()  # `close` would wait for it to read

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.limits.header_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol_class(settings: ServerSettings) -> type[H11Protocol]:
    """uvicorn's h11 protocol with our limits. It takes a class, so the settings are bound by a subclass."""
    return type("BoundProtocol", (BoundedProtocol,), {"limits": settings})
