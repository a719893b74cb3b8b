"""`python -m loquetier.bench.health`: how long ``/health`` and ``/v1/models`` take while a server does all it can.

A server in a process of its own, as `loquetier serve` starts it; a job made over HTTP that does not end; clients that
each ask again as soon as they are answered. Beside them one more client that asks the two routes in turn, on a
connection that it keeps. The target is a p99 below 50 ms.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loquetier.bench.peers.processes import Process, free_port, wait_ready
from loquetier.errors import EngineError

PATHS = ("/health", "/v1/models")
_WORDS = ("the", "fox", "and", "a", "crow", "talk", "about", "cheese", "while", "rain", "falls", "on", "green", "hills")
_TIMEOUT = 120.0


@dataclass
class Load:
    """What the server did meanwhile."""

    port: int
    tokens: int = 0
    requests: int = 0
    errors: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, seed: int, words: int, new_tokens: int) -> None:
        """Ask until it is over."""
        rng, model = random.Random(seed), base_of(self.port)
        try:
            while not self.is_over.is_set():
                prompt = " ".join(rng.choices(_WORDS, k=rng.randint(words // 6, words)))
                body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "ignore_eos": True}
                usage = call(self.port, "POST", "/v1/completions", body)["usage"]
                with self._lock:
                    self.tokens += usage["completion_tokens"]
                    self.requests += 1
        except (EngineError, OSError, ValueError) as error:  # told in the result: such a figure counts for nothing
            self.errors.append(str(error)[:200])


def call(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    """One request on a connection of its own. Raises EngineError: not a 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    try:
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, sent, {"Content-Type": "application/json"} | (headers or {}))
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise EngineError(f"{method} {path}: {answer.status} {content[:500]!r}")
    return json.loads(content)


def base_of(port: int) -> str:
    """The base's name: the first of the models."""
    return str(call(port, "GET", "/v1/models")["data"][0]["id"])


def start_job(port: int, rank: int) -> str:
    """Upload made-up chats and train on them for ever; returns the job's id."""
    rng = random.Random(0)
    lines = []
    for _ in range(64):
        turns = [{"role": r, "content": " ".join(rng.choices(_WORDS, k=40))} for r in ("user", "assistant")]
        lines.append(json.dumps({"messages": turns}) + "\n")
    form = (
        '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        '--x\r\nContent-Disposition: form-data; name="file"; filename="chats.jsonl"\r\n\r\n' + "".join(lines)
    ) + "\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    file = call(port, "POST", "/v1/files", form.encode(), kind)
    body = {
        "model": base_of(port),
        "training_file": file["id"],
        "lora": {"r": rank},
        "training": {"max_steps": 100_000, "batch_size": 4, "checkpoint_every": 100_000, "publish": "every_step"},
    }
    return str(call(port, "POST", "/v1/fine_tuning/jobs", body)["id"])


def steps_of(port: int, job: str) -> int:
    """Optimizer steps that the job has told of."""
    page = call(port, "GET", f"/v1/fine_tuning/jobs/{job}/events?limit=20")
    return max((int(event["data"].get("step", 0)) for event in page["data"]), default=0)


def probe(port: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each request, by path, on one connection."""
    found: dict[str, list[float]] = {path: [] for path in PATHS}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for path in PATHS:
            began = time.perf_counter()
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            found[path].append(time.perf_counter() - began)
            if answer.status != 200:
                raise EngineError(f"{path}: {answer.status}")
        time.sleep(0.01)
    connection.close()
    return found


def figures(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    named = {"median": statistics.median(ordered), "p99": p99, "longest": ordered[-1]}
    return {"requests": len(ordered)} | {name: round(1000 * value, 2) for name, value in named.items()}


def measure(port: int, args: argparse.Namespace) -> dict[str, Any]:
    """Everything, against a server that is ready."""
    idle = {path: figures(values) for path, values in probe(port, args.settle).items()}
    job = start_job(port, args.rank)
    until = time.monotonic() + _TIMEOUT
    while steps_of(port, job) < 1:
        if time.monotonic() > until:
            raise EngineError(f"the job made no step within {_TIMEOUT:.0f} s")
        time.sleep(0.1)
    load = Load(port)
    threads = [
        threading.Thread(target=load.client, args=(n, args.prompt_words, args.new_tokens)) for n in range(args.clients)
    ]
    for thread in threads:
        thread.start()
    time.sleep(args.settle)  # every client is at work
    steps, tokens = steps_of(port, job), load.tokens
    busy = {path: figures(values) for path, values in probe(port, args.seconds).items()}
    steps, tokens = steps_of(port, job) - steps, load.tokens - tokens
    load.is_over.set()
    call(port, "POST", f"/v1/fine_tuning/jobs/{job}/cancel")
    for thread in threads:
        thread.join()
    meanwhile = {"clients": args.clients, "tokens": tokens, "job_steps": steps, "seconds": args.seconds}
    return {"idle_ms": idle, "busy_ms": busy, "meanwhile": meanwhile | {"errors": load.errors}}


def main() -> int:
    """The command line; exit code 1 when a p99 is above the target or a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--prompt-words", type=int, default=96, help="at most; at least a sixth of it")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--settle", type=float, default=3.0, help="seconds alone, and of load before it counts")
    parser.add_argument("--target", type=float, default=50.0, help="milliseconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        port = free_port()
        command = [sys.executable, "-m", "loquetier", "serve", args.base, "--port", str(port)]
        log = Path(place) / "server.log"
        server = Process("the server", [*command, "--data-dir", str(Path(place) / "data")], os.environ, log)
        try:
            wait_ready(server, port, _TIMEOUT)
            found = measure(port, args)
        finally:
            server.close()
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "base": args.base}
    print(json.dumps(machine | found, indent=1))
    is_good = all(busy["p99"] <= args.target for busy in found["busy_ms"].values())
    return 0 if is_good and not found["meanwhile"]["errors"] else 1


if __name__ == "__main__":
    sys.exit(main())
