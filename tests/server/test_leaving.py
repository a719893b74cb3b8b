"""Clients that leave, stall or dawdle: what they had in the engine is freed, and the others go on."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from tests.server.live import Live, serving, wait_until
from tests.tiny import save_tiny

from loquetier.config import MIB, EngineConfig
from loquetier.runtime import Runtime

BASE = "slow-base"
FREED_WITHIN = 10.0
"""The goal is 1 s; the tests' machine may be busy, and what they must tell apart is an answer of minutes."""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A context so long that an answer takes minutes, and prompts that take many steps."""
    directory = tmp_path_factory.mktemp("leaving") / BASE
    save_tiny(directory, "llama", vocab=260, context=32768)
    config = EngineConfig(
        dtype="float32", device="cpu", kv_memory=64 * MIB, adapter_memory=4 * MIB, max_prefill_rows=16
    )
    with Runtime(str(directory), config=config) as made:
        yield made


@pytest.fixture(scope="module")
def live(runtime: Runtime) -> Iterator[Live]:
    with serving(runtime, stall_timeout=1.0, header_timeout=0.5, body_timeout=0.5, max_connections=64) as found:
        yield found


@pytest.fixture(autouse=True)
def _the_next_request_is_fine(live: Live) -> Iterator[None]:
    yield
    wait_until(live.settled, "everything is freed")
    answer = live.post("/v1/completions", {"model": BASE, "prompt": "ok", "max_tokens": 1})
    assert answer.status_code == 200


def ask(live: Live, stream: bool, prompt: Any = "hello", **fields: Any) -> socket.socket:
    """Send a request whose answer would take minutes; the connection is the caller's to close."""
    body = {"model": BASE, "prompt": prompt, "max_tokens": 8000, "ignore_eos": True, "stream": stream} | fields
    content = json.dumps(body).encode()
    connection = live.connect()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


def busy(live: Live) -> bool:
    stats = live.runtime.stats()
    return stats.num_running > 0 and stats.kv_pages_free < stats.kv_pages


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_row_39_a_client_that_closes(live: Live, stream: bool, phase: str) -> None:
    prompt = [5] * 8000 if phase == "prefill" else "hello"  # 500 steps of 16 rows
    connection = ask(live, stream, prompt)
    wait_until(lambda: busy(live), "it runs")
    before = live.runtime.stats().totals
    if phase == "prefill":
        assert before.prefill_rows and live.runtime.stats().num_running == 1
    connection.close()
    wait_until(live.settled, "its slot and KV pages are free", FREED_WITHIN)


def test_row_39_a_client_that_half_closes(live: Live) -> None:
    connection = ask(live, stream=False)
    wait_until(lambda: busy(live), "it runs")
    connection.shutdown(socket.SHUT_WR)
    wait_until(live.settled, "its slot and KV pages are free", FREED_WITHIN)
    connection.close()


def test_a_client_that_leaves_the_queue(live: Live) -> None:
    """It waits for KV memory behind one that takes all of it."""
    stats = live.runtime.stats()
    rows = stats.kv_pages * 16
    first = ask(live, False, [5] * 100, max_tokens=min(rows, 32768) - 101)
    wait_until(lambda: busy(live), "it runs")
    second = ask(live, False, [5] * 100)
    wait_until(lambda: live.services.admission.num_open == 2, "two are admitted")
    second.close()
    wait_until(lambda: live.services.admission.num_open == 1, "the second one is gone", FREED_WITHIN)
    assert busy(live)
    first.close()


def test_row_39_a_client_that_never_reads(live: Live) -> None:
    """Its socket fills up; after the stall timeout the request is aborted, and nobody else has noticed."""
    connections = []
    for _ in range(2):
        # Many alternatives per token make the stream fat, so that the kernel's buffers fill in a second or two.
        connection = ask(live, True, logprobs=5, n=8, max_tokens=4000, return_token_ids=True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connections.append(connection)
    wait_until(lambda: busy(live), "they run")
    assert live.post("/v1/completions", {"model": BASE, "prompt": "ok", "max_tokens": 2}).status_code == 200
    with structlog.testing.capture_logs() as logs:
        wait_until(live.settled, "the stalled ones are aborted", 60)
    assert sum(line["event"] == "client_stalled" for line in logs) == 2
    for connection in connections:
        connection.close()


def test_row_40_slow_headers(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert connection.recv(100) == b"", "closed without an answer"
    with live.connect() as connection:
        assert connection.recv(100) == b"", "idle from the start"


def test_row_40_slow_bodies(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_row_39_many_idle_connections(live: Live) -> None:
    """Beyond the limit they are closed; those that say nothing are closed in time; then everything is as before."""
    idle = [live.connect() for _ in range(200)]
    answer = None
    deadline = time.monotonic() + 20
    while answer is None and time.monotonic() < deadline:
        try:
            answer = live.http("GET", "/health")
        except OSError:
            continue
        except Exception as error:  # httpx wraps what the socket says
            assert "closed" in str(error) or "disconnected" in str(error) or "reset" in str(error).lower(), error
    assert answer is not None and answer.status_code == 200
    for connection in idle:
        connection.close()


def test_a_keep_alive_connection_answers_again(live: Live) -> None:
    connection = http.client.HTTPConnection(*live.address, timeout=20)
    connection.connect()
    opened = connection.sock
    for _ in range(3):
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read() == b'{"status":"ok"}'
        assert connection.sock is opened
    connection.close()
