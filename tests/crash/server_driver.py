"""Drives a server through one story (load, upload, job, model, delete) over many lives, each ended by a kill; JSON out.

Run as a script; POSIX only. The parent imports everything once, before any thread, and forks a child per life of the
server; it is the client. Nothing of torch runs in the parent.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# Everything that a child needs is imported here, once.
from loquetier.config import EngineConfig
from loquetier.failpoints import VARIABLE, fail_points
from loquetier.runtime import Runtime
from loquetier.server.auth import KeyRing
from loquetier.server.logs import configure_logs
from loquetier.server.serve import open_socket, serve
from loquetier.server.services import build_services
from loquetier.server.settings import ServerSettings
from loquetier.server.store.datadir import DATABASE
from loquetier.server.store.store import open_store

STEPS, EVERY = 12, 3
CONFIG = EngineConfig(dtype="float32", kv_memory=1 << 20, adapter_memory=1 << 20)
CHATS = [
    {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": f"{b}!"}]}
    for a, b in zip("abcdefghijkl", "lkjihgfedcba", strict=True)
]
FILE = "".join(json.dumps(chat) + "\n" for chat in CHATS).encode()
JOB = {
    "lora": {"r": 2},
    "training": {"max_steps": STEPS, "checkpoint_every": EVERY, "learning_rate": 1e-2, "batch_size": 4},
    "suffix": "fox",
    "seed": 5,
}


def live(base: Path, data: Path, pipe: int, seconds: float | None) -> int:
    """One life of the server, as `loquetier serve` lives it."""
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    configure_logs("error")
    settings = ServerSettings(port=0, grace_seconds=2.0, adapter_root=base.parent)
    opened = open_socket(settings)
    store = open_store(data, fail_point=fail_points(os.environ))
    runtime = Runtime(str(base), config=CONFIG)
    store.bind(runtime.base_name, runtime.base_fingerprint)
    services = build_services(runtime, settings, KeyRing(), store=store)
    os.write(pipe, f"{opened.getsockname()[1]}\n".encode())
    return serve(services, opened)


@dataclass
class Lives:
    """The server's lives, one after the other, and how each is to end."""

    base: Path
    data: Path
    ends: Iterator[str | float | None]
    """A fail point, seconds until a kill, or None for a life that goes on."""
    kills: list[str] = field(default_factory=list)
    pid: int = 0
    port: int = 0
    end: str | float | None = None

    def start(self) -> None:
        """Begin the next life; returns when it is ready, and begins another one where that life ended before."""
        while True:
            self.end = next(self.ends, None)
            read, write = os.pipe()
            self.pid = os.fork()
            if self.pid == 0:
                os.close(read)
                code = 1
                try:
                    if isinstance(self.end, str):
                        os.environ[VARIABLE] = self.end
                    code = live(self.base, self.data, write, self.end if isinstance(self.end, float) else None)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            os.close(write)
            with os.fdopen(read) as pipe:
                line = pipe.readline()
            if line and self._is_ready(int(line)):
                return
            self.died()

    def _is_ready(self, port: int) -> bool:
        self.port = port
        while True:
            try:
                if self.ask("GET", "/ready")[0] == 200:
                    return True
            except (OSError, http.client.HTTPException):
                if self._is_dead():
                    return False
            time.sleep(0.01)  # a poll of another process: there is nothing to wait on

    def _is_dead(self) -> bool:
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return info is not None

    def died(self) -> None:
        """The life has ended; it must have been killed. What it left must be whole."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if code != -signal.SIGKILL:
            raise SystemExit(f"the server ended with {code} in a life that was to end with {self.end!r}")
        self.kills.append(str(self.end))
        check_database(self.data)

    def stop(self) -> None:
        """End in order; a life whose kill comes while it ends is followed by one more."""
        while True:
            os.kill(self.pid, signal.SIGTERM)
            if not isinstance(self.end, float) or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT).si_status == 0:
                break
            self.died()
            self.start()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if code != 0:
            raise SystemExit(f"SIGTERM: the server ended with {code}")

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """One request. Raises OSError, HTTPException when the server dies on the way."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def insist(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """`ask` until there is an answer, over as many lives as it takes."""
        while True:
            try:
                return self.ask(method, path, body, **headers)
            except (OSError, http.client.HTTPException):
                self.died()
                self.start()


def check_database(data: Path) -> None:
    """SQLite's own verdict on what a kill has left."""
    if (data / DATABASE).exists():
        with sqlite3.connect(data / DATABASE) as c:
            found = c.execute("PRAGMA integrity_check").fetchall()
        c.close()
        if found != [("ok",)]:
            raise SystemExit(f"integrity_check: {found}")


def story(lives: Lives) -> dict[str, Any]:
    """Load, upload, train, ask, delete; each request is sent again, with its key, until it is answered."""
    lives.start()
    as_json = {"Content_Type": "application/json"}
    given = load_and_unload(lives)
    multipart = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n' + FILE + b"\r\n--b--\r\n"
    )
    kind = "multipart/form-data; boundary=b"
    file = answer(lives.insist("POST", "/v1/files", multipart, Content_Type=kind, Idempotency_Key="file"))
    wanted = JOB | {"model": lives.base.name, "training_file": file["id"]}
    body = json.dumps(wanted).encode()
    job = answer(lives.insist("POST", "/v1/fine_tuning/jobs", body, Idempotency_Key="job", **as_json))
    path = f"/v1/fine_tuning/jobs/{job['id']}"
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.02)  # a poll of another process
        job = answer(lives.insist("GET", path))
    assert job["status"] == "succeeded", job
    model = str(job["fine_tuned_model"])
    text = said(lives, model)
    gone = f"{model}:ckpt-step-{STEPS}"
    status, _ = lives.insist("DELETE", f"/v1/models/{gone}")
    assert status in (200, 404), "404 where the kill came after the commit"
    lives.stop()
    lives.start()  # and what was acknowledged is there
    assert lives.insist("GET", f"/v1/models/{gone}")[0] == 404
    assert lives.insist("GET", f"/v1/files/{file['id']}/content")[1] == FILE
    found = outcome(lives, job["id"], model) | {"text": text, "given": given}
    assert said(lives, model) == text and said(lives, "mine") == given
    loaded = {a["id"]: a["pinned"] for a in answer(lives.insist("GET", "/v1/adapters"))["data"]}
    assert loaded["mine"] is True and "gone" not in loaded, loaded
    lives.stop()
    check_database(lives.data)
    leftovers = [p.name for p in lives.data.rglob("*") if ".tmp-" in p.name or ".old-" in p.name]
    return found | {"leftovers": leftovers + [p.name for p in (lives.data / "tmp").iterdir()], "kills": lives.kills}


def load_and_unload(lives: Lives) -> str:
    """Load an adapter, and pin it; load another one, and unload it. Returns what the first one says."""
    as_json = {"Content_Type": "application/json"}

    def change(path: str, body: dict[str, str], again: int) -> None:
        status, text = lives.insist("POST", path, json.dumps(body).encode(), **as_json)
        # The other status is that of a request whose first sending was done when the kill came.
        assert status == 200 or (lives.kills and status == again), (path, status, text)

    change("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "given"}, again=400)
    change("/v1/adapters/pin", {"lora_name": "mine"}, again=200)
    change("/v1/load_lora_adapter", {"lora_name": "gone", "lora_path": "given"}, again=400)
    change("/v1/unload_lora_adapter", {"lora_name": "gone"}, again=404)
    return said(lives, "mine")


def said(lives: Lives, model: str) -> str:
    """A model's greedy answer."""
    ask = {"model": model, "prompt": "a?", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    found = lives.insist("POST", "/v1/completions", json.dumps(ask).encode(), Content_Type="application/json")
    return str(answer(found)["choices"][0]["text"])


def answer(found: tuple[int, bytes]) -> dict[str, Any]:
    """An answer that must be good."""
    status, body = found
    assert status == 200, (status, body)
    return dict(json.loads(body))


def outcome(lives: Lives, job_id: str, model: str) -> dict[str, Any]:
    """What is left of a job, without what may differ: ids, times, messages of restarts."""
    path = f"/v1/fine_tuning/jobs/{job_id}"
    job = answer(lives.insist("GET", path))
    events = answer(lives.insist("GET", f"{path}/events?limit=100"))["data"][::-1]
    with sqlite3.connect(lives.data / DATABASE) as c:
        live_version = c.execute(
            "SELECT directory, number FROM versions JOIN adapters USING (name) WHERE name = ? AND number = live_number",
            (model,),
        ).fetchone()
        numbers = [row[0] for row in c.execute("SELECT number FROM versions WHERE name = ? ORDER BY step", (model,))]
        counts = [c.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("files", "jobs")]
        directories = {row[0] for row in c.execute("SELECT directory FROM versions")}
    c.close()
    weights = lives.data / "adapters" / live_version[0] / "adapter_model.safetensors"
    return {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "steps": [[e["data"]["step"], e["data"]["train_loss"]] for e in events if e["type"] == "metrics"],
        "messages": [
            e["message"].replace(job_id, "JOB").replace(model, "MODEL").replace(job["training_file"], "FILE")
            for e in events
            if "restarted" not in e["message"]
        ],
        "checkpoints": [c["step_number"] for c in answer(lives.insist("GET", f"{path}/checkpoints"))["data"]],
        "results": lives.insist("GET", f"/v1/files/{job['result_files'][0]}/content")[1].decode(),
        "tokens": job["trained_tokens"],
        "numbers_rise": numbers == sorted(set(numbers)),
        "counts": counts,
        "orphans": sorted({p.name for p in (lives.data / "adapters").iterdir()} - directories),
        "job_rooms": [p.name for p in (lives.data / "jobs").iterdir()],
    }


def main() -> None:
    """Tell the story unbroken, then with each list of ends, then with kills at random instants; print the reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--ends", action="append", default=[], help="Fail points of the lives of one story, by comma.")
    parser.add_argument("--random", type=int, default=0, help="At least so many kills at random instants.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    report: dict[str, Any] = {"unbroken": story(Lives(options.base, options.work / "unbroken", iter(())))}
    seconds, rng = time.monotonic() - began, random.Random(options.seed)
    report["stories"] = []

    def tell(ends: Sequence[str | float]) -> int:
        work = options.work / f"story-{len(report['stories'])}"
        told = story(Lives(options.base, work, iter(ends)))
        report["stories"].append(told)
        return len(told["kills"])

    for ends in options.ends:
        tell(ends.split(","))
    left = options.random
    while left > 0:  # a story may be over before all of its kills have come
        left -= tell([rng.uniform(0.0, 0.7 * seconds) for _ in range(5)])
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
