"""A server on a real socket over a tiny model, in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from tests.server.published import check

from loquetier.config import MIB, EngineConfig
from loquetier.runtime import Runtime
from loquetier.server.auth import KeyRing
from loquetier.server.serve import Server, close, open_socket
from loquetier.server.services import Services, build_services
from loquetier.server.settings import ServerSettings
from loquetier.server.store.store import Store
from loquetier.server.telemetry import Telemetry

ENGINE = EngineConfig(dtype="float32", device="cpu", kv_memory=8 * MIB, adapter_memory=16 * MIB)
DEADLINE = 20.0
"""Seconds that any single wait may take; far more than it should, so that a busy machine fails no test."""


@dataclass(frozen=True)
class Live:
    """What a test talks to."""

    services: Services
    server: Server
    address: tuple[str, int]
    key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    @property
    def runtime(self) -> Runtime:
        return self.services.runtime

    def client(self, **options: Any) -> openai.OpenAI:
        """The stock SDK, strict, without retries."""
        settings: dict[str, Any] = {"max_retries": 0, "timeout": DEADLINE, "_strict_response_validation": True}
        settings["http_client"] = openai.DefaultHttpxClient(event_hooks={"response": [published_whole]})
        return openai.OpenAI(base_url=f"{self.url}/v1", **(settings | {"api_key": self.key or "none"} | options))

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http("POST", path, json=body, **options)

    def http(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = ({"Authorization": f"Bearer {self.key}"} if self.key else {}) | options.pop("headers", {})
        answer = httpx.request(method, f"{self.url}{path}", headers=headers, timeout=DEADLINE, **options)
        return as_published(answer)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=DEADLINE)

    def settled(self) -> bool:
        """Whether nothing of any request is left in the engine or the server."""
        stats = self.runtime.stats()
        return (
            stats.num_running == stats.num_waiting == 0
            and stats.kv_pages_free == stats.kv_pages
            and self.services.admission.num_open == 0
        )


def as_published(answer: Any) -> Any:
    """The answer, after it was held against OpenAI's description (an `httpx.Response` or the SDK's twin of it)."""
    kind = answer.headers.get("content-type", "")
    check(answer.request.method, answer.request.url.path, answer.status_code, kind, answer.content)
    return answer


def published_whole(answer: Any) -> None:
    """Every answer that the SDK gets as a whole; a stream is read by its test, and `Live.http` checks its chunks."""
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        answer.read()
        as_published(answer)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE) -> float:
    """Poll until `condition` holds; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.005)
    return time.monotonic() - began


@contextmanager
def serving(
    runtime: Runtime,
    keys: KeyRing | None = None,
    key: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    telemetry: Telemetry | None = None,
    store: Store | None = None,
    **settings: Any,
) -> Iterator[Live]:
    """Serve `runtime` while the context is open; with a `store`, both are closed at the end."""
    limits = ServerSettings(**({"port": 0, "grace_seconds": 2.0} | settings))
    services = build_services(runtime, limits, keys or KeyRing(), clock=clock, telemetry=telemetry, store=store)
    if services.tuning is not None:
        services.tuning.start()
    opened = open_socket(limits)
    server = Server(services)
    server.capture_signals = _no_signals  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), "the server starts")
    try:
        yield Live(services, server, ("127.0.0.1", opened.getsockname()[1]), key)
    finally:
        if thread.is_alive():
            server.stop(at_once=True)
        thread.join(DEADLINE)
        opened.close()
        assert not thread.is_alive(), "the server did not stop"
        if store is not None:
            runtime.check_integrity()
            close(services)


@contextmanager
def _no_signals() -> Iterator[None]:
    """Signal handlers can only be set on the main thread."""
    yield


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, which must have exactly OpenAI's four keys."""
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return dict(body["error"])
