"""The benchmark's processes and its client: failures are loud, nothing outlives a run, answers are counted."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loquetier.bench.peers.client import drive
from loquetier.bench.peers.processes import Process, Worker, free_port, wait_ready
from loquetier.bench.traffic import Ask
from loquetier.errors import EngineError


def test_a_worker_that_fails_shows_its_last_words(tmp_path: Path) -> None:
    setup = {"side": "ours", "threads": 1, "dtype": "float32", "base": "no-such-base"}
    with pytest.raises(EngineError, match=r"(?s)ended before it answered.*no-such-base"):
        Worker("ours", Path(sys.executable), os.environ, tmp_path / "ours.log", setup)


def test_a_server_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    code = "import sys; sys.exit('no such model')"
    server = Process("vllm", [sys.executable, "-c", code], os.environ, tmp_path / "vllm.log")
    with pytest.raises(EngineError, match=r"(?s)vllm: the server ended with exit code 1.*no such model"):
        wait_ready(server, free_port(), seconds=60)
    server.close()


def test_a_paused_process_and_its_children_end_with_the_run(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    process = Process("side", [sys.executable, "-c", code], os.environ, tmp_path / "side.log")
    process.pause()
    process.close()
    assert process.child.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.child.pid, 0)  # nobody is left in its group


@contextmanager
def server(num_tokens: int) -> Iterator[int]:
    """A server of completions that says it made `num_tokens` tokens, in two pieces."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("application/json", json.dumps({"object": "list", "data": []}))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            usage = {"prompt_tokens": 1, "completion_tokens": num_tokens, "total_tokens": 1 + num_tokens}
            chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "text": "x"}]}] * 2
            whole = [*chunks, {"choices": [], "usage": usage}]
            lines = [f"data: {json.dumps({'id': 'c', 'object': 'text_completion', **c})}\n\n" for c in whole]
            self._answer("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

        def _answer(self, kind: str, body: str) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield found.server_address[1]
    finally:
        found.shutdown()
        found.server_close()


def test_the_client_counts_what_the_server_says_it_made() -> None:
    asks = [Ask(model=None, prompt=(5, 6), new_tokens=3), Ask(model="a0", prompt=(7,), new_tokens=3)]
    with server(3) as port:
        sample = drive(port, "base", asks)
    assert sample["tokens"] == 6
    assert 0 < sample["first_token_s"] <= sample["seconds"] and sample["token_s"] >= 0
    with server(2) as port, pytest.raises(EngineError, match="2 tokens where 3"):
        drive(port, "base", asks)
