"""Whether another owner could learn by the clock what exists: answers for what is ann's against what nobody has.

Statistical, so run it alone on a quiet machine: ``make parity``. Prints a line for each kind of request; exit code 1
where the two differ (two-sided Mann-Whitney test, 1 % over all kinds together).
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from tests.server.fixtures import BASE
from tests.server.live import Live
from tests.server.test_jobs import JOBS, RING, bearer
from tests.server.tuned import QUICK, create, tuned, upload, wait_for
from tests.tiny import save_tiny

from loquetier.server.logs import configure_logs

SAMPLES = 200
WARM_UP = 20
LEVEL = 0.01
Ask = Callable[[str], None]
Seconds = npt.NDArray[np.float64]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save_tiny(root / BASE, "llama", vocab=260)
        configure_logs("error")
        with tuned(root / BASE, root / "data", RING, "ann-key") as live, client(live, "bob-key") as bob:
            found = {label: samples(ask, *names) for label, (ask, names) in kinds(live, bob).items()}
            with client(live, "ann-key") as ann:
                found["first token of a prompt that ann's requests have cached"] = prefixes(ann, bob)
    level, failed = LEVEL / len(found), False
    for label, (there, missing) in found.items():
        p = mann_whitney(there, missing)
        failed |= p < level
        medians = f"{1e3 * np.median(there):.3f} and {1e3 * np.median(missing):.3f} ms"
        print(f"{label}: {medians}, p = {p:.4f}{', DIFFERENT' if p < level else ''}")
    print(f"{len(found)} kinds, {SAMPLES} samples of each and of its opposite; different below p = {level:.4f}")
    sys.exit(failed)


def client(live: Live, key: str) -> httpx.Client:
    return httpx.Client(base_url=live.url, headers=bearer(key), timeout=30)


def kinds(live: Live, bob: httpx.Client) -> dict[str, tuple[Ask, tuple[str, str]]]:
    """What bob asks, by its label; the name of something of ann's, and one of the same form that nobody has."""
    ann = live.client()
    file = upload(ann)
    job = create(ann, file, BASE, QUICK).id
    model = str(wait_for(live, job, "succeeded")["fine_tuned_model"])
    asked: dict[str, list[tuple[str, str, Any]]] = {
        file.id: [
            ("GET", "/v1/files/ID", None), ("GET", "/v1/files/ID/content", None), ("DELETE", "/v1/files/ID", None),
            ("POST", JOBS, {"model": BASE, "training_file": "ID"}),
        ],
        job: [
            ("GET", f"{JOBS}/ID", None), ("GET", f"{JOBS}/ID/events", None), ("GET", f"{JOBS}/ID/checkpoints", None),
            ("POST", f"{JOBS}/ID/cancel", None), ("GET", f"{JOBS}?after=ID", None),
        ],
        model: [
            ("GET", "/v1/models/ID", None), ("DELETE", "/v1/models/ID", None),
            ("POST", "/v1/completions", {"model": "ID", "prompt": "x", "max_tokens": 1}),
            ("POST", "/v1/unload_lora_adapter", {"lora_name": "ID"}),
            ("POST", "/v1/rollback_lora_adapter", {"lora_name": "ID", "version": 1}),
            ("POST", "/v1/adapters/pin", {"lora_name": "ID"}),
        ],
    }  # fmt: skip
    return {
        f"{method} {path}{'' if body is None else f' {body}'}": (
            partial(refused, bob, method, path, body),
            (name, name[:-4] + "zzzz"),
        )
        for name, requests in asked.items()
        for method, path, body in requests
    }


def refused(bob: httpx.Client, method: str, path: str, body: Any, name: str) -> None:
    sent = body and {k: name if v == "ID" else v for k, v in body.items()}
    answer = bob.request(method, path.replace("ID", name), json=sent)
    assert answer.status_code in (400, 404), answer.text


def samples(ask: Ask, there: str, missing: str) -> tuple[Seconds, Seconds]:
    """Seconds of both, in an order by chance: what drifts meets both alike."""
    order = random.Random(0).sample([there, missing] * SAMPLES, 2 * SAMPLES)
    seconds: dict[str, list[float]] = {there: [], missing: []}
    for number, name in enumerate(order[:WARM_UP] + order):
        began = time.perf_counter()
        ask(name)
        if number >= WARM_UP:
            seconds[name].append(time.perf_counter() - began)
    return np.array(seconds[there]), np.array(seconds[missing])


def prefixes(ann: httpx.Client, bob: httpx.Client) -> tuple[Seconds, Seconds]:
    """Bob's time to one token of prompts that ann has sent before, and of prompts that nobody has."""
    rng = random.Random(1)

    def ask(who: httpx.Client, prompt: str) -> float:
        began = time.perf_counter()
        answer = who.post("/v1/completions", json={"model": BASE, "prompt": prompt, "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        return time.perf_counter() - began

    found: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + 2 * SAMPLES):
        prompt, other = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=200)) for _ in range(2))
        is_new = (number + rng.randrange(2)) % 2
        ask(ann, other if is_new else prompt)  # a request of ann's before each of bob's
        seconds = ask(bob, prompt)
        if number >= WARM_UP:
            found[is_new].append(seconds)
    return np.array(found[0]), np.array(found[1])


def mann_whitney(a: Seconds, b: Seconds) -> float:
    """Two-sided p by the normal approximation, which 200 samples allow; a clock in nanoseconds has next to no ties."""
    ranks = np.argsort(np.argsort(np.concatenate([a, b]))) + 1.0
    u = ranks[: len(a)].sum() - len(a) * (len(a) + 1) / 2
    mean, sigma = len(a) * len(b) / 2, math.sqrt(len(a) * len(b) * (len(a) + len(b) + 1) / 12)
    return math.erfc(abs(u - mean) / sigma / math.sqrt(2))


if __name__ == "__main__":
    main()
