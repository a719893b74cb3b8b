"""Processes that the benchmark starts: workers that take orders, and servers. Each writes a log; none outlives us."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loquetier.errors import EngineError

_GRACE_SECONDS = 20.0


class Process:
    """A child in a process group of its own, so that its own children end with it.

    Args:
        name: for messages and the log's name.
        log: file that gets what it prints.
        piped: its input and output are ours (a worker) instead of the log's.
    """

    def __init__(
        self, name: str, command: Sequence[str], environ: Mapping[str, str], log: Path, *, piped: bool = False
    ) -> None:
        self.name, self._log = name, log
        with log.open("ab") as sink:
            self.child = subprocess.Popen(
                list(command),
                env=dict(environ),
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else sink,
                stderr=sink,
                start_new_session=True,
                text=True,
            )

    def failed(self, what: str) -> EngineError:
        """An error that shows the log's end."""
        tail = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        return EngineError(f"{self.name}: {what}. The end of {self._log}:\n" + "\n".join(tail))

    def pause(self) -> None:
        """Stop it and its children where they are: what waits must not take time from what is measured."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Undo `pause`."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and its children; at once when it does not go by itself."""
        self.go_on()
        if self.child.stdin is not None:
            self.child.stdin.close()
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(_GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self.child.wait()
        if self.child.stdout is not None:
            self.child.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, number)  # it leads its group: start_new_session


class Worker(Process):
    """A `loquetier.bench.peers.worker`, loaded and waiting. Raises EngineError: it failed."""

    def __init__(
        self, name: str, python: Path, environ: Mapping[str, str], log: Path, setup: Mapping[str, Any]
    ) -> None:
        super().__init__(name, [str(python), "-m", "loquetier.bench.peers.worker"], environ, log, piped=True)
        self.versions: dict[str, str] = self._ask(setup)["ready"]

    def run(self, task: str, draw: int, new_tokens: int | None = None) -> dict[str, Any]:
        """One measurement in the worker."""
        return self._ask({"task": task, "draw": draw, "new_tokens": new_tokens})

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self.child.stdin is not None and self.child.stdout is not None, "piped"
        try:
            print(json.dumps(order), file=self.child.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self.child.stdout.readline())
        except (OSError, ValueError) as error:  # it is gone: a broken pipe, or no answer
            raise self.failed("the worker ended before it answered") from error
        return answer


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_ready(server: Process, port: int, seconds: float) -> None:
    """Until the server's ``/health`` says 200. Raises EngineError: it ended, or the time is up."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.child.poll() is not None:
            raise server.failed(f"the server ended with exit code {server.child.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)  # not listening yet
    raise server.failed(f"the server was not ready after {seconds:.0f} s")
