"""A server with a data directory, and what the tests of files and jobs send it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob
from tests.server.live import ENGINE, Live, serving, wait_until

from loquetier.config import EngineConfig
from loquetier.runtime import Runtime
from loquetier.server.auth import KeyRing
from loquetier.server.store.store import open_store

CHATS = [
    {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": f"{b}!"}]}
    for a, b in zip("abcdefghijkl", "lkjihgfedcba", strict=True)
]
QUICK: dict[str, Any] = {
    "lora": {"r": 2, "alpha": 4},
    "training": {"max_steps": 6, "checkpoint_every": 2, "learning_rate": 1e-2, "batch_size": 4},
}
"""A job of six steps."""
LONG: dict[str, Any] = {"lora": {"r": 2}, "training": {"max_steps": 100_000, "checkpoint_every": 1000, "batch_size": 1}}
"""One that ends only when it is told to."""


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@contextmanager
def tuned(
    base: Path,
    data: Path,
    keys: KeyRing | None = None,
    key: str | None = None,
    engine: EngineConfig = ENGINE,
    **settings: Any,
) -> Iterator[Live]:
    """A server over `data`; everything is closed in order at the end."""
    store = open_store(data)
    runtime = Runtime(str(base), config=engine)
    store.bind(runtime.base_name, runtime.base_fingerprint)
    with serving(runtime, keys, key, store=store, **settings) as live:
        wait_until(lambda: live.http("GET", "/ready").status_code == 200, "the server is ready")
        yield live


def upload(client: openai.OpenAI, content: bytes | None = None, name: str = "chats.jsonl") -> FileObject:
    """A training file that has been looked at."""
    made = client.files.create(file=(name, jsonl(CHATS) if content is None else content), purpose="fine-tune")
    return client.files.wait_for_processing(made.id, poll_interval=0.01)


def create(client: openai.OpenAI, file: FileObject, base: str, extra: dict[str, Any], **options: Any) -> FineTuningJob:
    return client.fine_tuning.jobs.create(model=base, training_file=file.id, extra_body=extra, **options)


def job_of(live: Live, job_id: str) -> dict[str, Any]:
    answer = live.http("GET", f"/v1/fine_tuning/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def wait_for(live: Live, job_id: str, *states: str, seconds: float = 60) -> dict[str, Any]:
    """The job, as soon as it is in one of `states`."""
    wait_until(lambda: job_of(live, job_id)["status"] in states, f"{job_id} is {states}", seconds)
    return job_of(live, job_id)


def wait_for_step(live: Live, job_id: str, step: int) -> None:
    """Until an event tells of the step."""

    def is_there() -> bool:
        events = live.http("GET", f"/v1/fine_tuning/jobs/{job_id}/events?limit=100").json()["data"]
        return any(e["data"].get("step", 0) >= step for e in events)

    wait_until(is_there, f"step {step}", 60)


def say(live: Live, model: str) -> list[float]:
    """What a model's greedy answer is worth to it: log-probabilities differ where weights do, also if no token does."""
    body = {"model": model, "prompt": "a?", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    answer = live.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return [round(p, 4) for p in answer.json()["choices"][0]["logprobs"]["token_logprobs"]]
