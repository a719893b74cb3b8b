"""The process: a socket, uvicorn, the engine's watch, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType

import structlog
import uvicorn

from loquetier.errors import ConfigError
from loquetier.server.app import create_app
from loquetier.server.auth import KeyRing
from loquetier.server.gate import MAX_HEADER_BYTES
from loquetier.server.problems import overloaded
from loquetier.server.protocol import protocol_class
from loquetier.server.services import Services
from loquetier.server.settings import ServerSettings

log = structlog.get_logger("loquetier.server")

_POLL_SECONDS = 0.05


def check_bind(settings: ServerSettings, keys: KeyRing) -> None:
    """Raises ConfigError for a public address without keys."""
    if keys.keys or settings.insecure or is_loopback(settings.host):
        return
    raise ConfigError(
        f"--host {settings.host!r} is not a loopback address and there are no API keys: everybody who reaches it could "
        "use and change the models. Give --api-keys FILE, or --insecure if the network is protected otherwise."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def open_socket(settings: ServerSettings) -> socket.socket:
    """A bound, listening socket. Raises ConfigError: the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only on sockets that say TCP. Without it an answer's head
    # and body are 40 ms apart: Nagle waits for the client's delayed ACK.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((settings.host, settings.port))
        found.listen(2048)
    except OSError as error:
        found.close()
        problem = f"cannot listen on {settings.host}:{settings.port}: {error.strerror}"
        raise ConfigError(f"{problem}; give another --port (0 takes a free one) or --host") from error
    return found


class Server(uvicorn.Server):
    """uvicorn with our way to stop: /ready says 503 at once, open answers finish, or end with an error in time."""

    def __init__(self, services: Services, app: object = None) -> None:
        settings = services.settings
        config = uvicorn.Config(
            app or create_app(services),  # type: ignore[arg-type]
            http=protocol_class(settings),
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            backlog=2048,
        )
        super().__init__(config)
        self.services = services
        self.death: str | None = None
        """Why the engine ended, if it did."""
        self._stopping: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open, and begin to watch the engine."""
        self._loop = asyncio.get_running_loop()
        await self.services.watch.beat()
        self._watching = asyncio.create_task(self.services.watch.run(self._engine_died))
        await super().startup(sockets)

    def _engine_died(self, problem: str) -> None:
        log.error("engine_died", problem=problem)
        self.death = problem
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one drains, the second one ends at once."""
        del frame
        self._signals += 1
        log.warning("stopping", signal=signal.Signals(sig).name, at_once=self._signals > 1)
        self.stop(at_once=self._signals > 1)

    def stop(self, *, at_once: bool = False) -> None:
        """Stop taking requests; let open ones finish for `grace_seconds`. May be called from any thread."""
        assert self._loop is not None, "not started"
        self._loop.call_soon_threadsafe(self._stop, at_once)

    def _stop(self, at_once: bool) -> None:
        self.services.admission.is_draining = True
        if self.services.tuning is not None:
            self.services.tuning.bell.ring()  # streams of events end now
        if self._stopping is None or at_once:
            if self._stopping is not None:
                self._stopping.cancel()
            grace = 0.0 if at_once else self.services.settings.grace_seconds
            self._stopping = asyncio.create_task(self._drain(grace))

    async def _drain(self, grace: float) -> None:
        services = self.services
        end = services.clock() + grace
        while services.admission.num_open and services.clock() < end:
            await asyncio.sleep(_POLL_SECONDS)
        for run in list(services.open_runs):
            run.abort(overloaded("the server is shutting down", code="shutting_down"))
        end = services.clock() + 2  # for the error events to reach their clients
        while services.admission.num_open and services.clock() < end:
            await asyncio.sleep(_POLL_SECONDS)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is left."""
        if self._watching is not None:
            self._watching.cancel()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Ours while serving; not raised again afterwards, because a drained stop is a success."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(services: Services, opened: socket.socket) -> int:
    """Serve until told to stop. Returns the exit code: 0 stopped in order, 1 the engine died.

    Jobs write a checkpoint and go on after the next start. A hung engine cannot be closed: the process ends there
    and then.
    """
    server = Server(services)
    if services.tuning is not None:
        services.tuning.start()
    server.run(sockets=[opened])
    services.telemetry.close()
    if server.death is None:
        close(services)
        return 0
    if services.port.is_alive:
        log.error("exit", reason="the engine hangs")
        sys.stderr.flush()
        os._exit(1)
    return 1


def close(services: Services) -> None:
    """Stop the engine, which checkpoints the jobs; then what was recorded of them is written, and the store closed."""
    services.runtime.close()
    if services.tuning is not None:
        services.tuning.close()
        services.tuning.store.close()
