"""Nothing of one adapter, version or owner shows in another's answers, over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.server.fixtures import BASE, base_dir, make_adapter
from tests.server.live import DEADLINE, Live, wait_until
from tests.server.test_jobs import JOBS, RING, bearer
from tests.server.tuned import LONG, QUICK, create, job_of, tuned, upload, wait_for, wait_for_step

__all__ = ["base_dir"]

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PROMPT = "forty-eight tokens, one for each byte of this te"
CANARIES = 6
NEIGHBOURS = 1e-4
"""Of a log-probability in float32: other rows in the same product change the order of its sums."""


@pytest.fixture(scope="module")
def live(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("adapters")
    with tuned(base_dir, tmp_path_factory.mktemp("data"), RING, "ann-key", adapter_root=root) as found:
        for number in range(CANARIES + 1):
            make_adapter(found.runtime, root / str(number), seed=number)
        yield found
        found.runtime.check_integrity()


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return live.client()


def load(live: Live, name: str, path: str, **fields: Any) -> str:
    """The version's label."""
    answer = live.post(LOAD, {"lora_name": name, "lora_path": path} | fields)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-loquetier-model-version"])


def said(live: Live, model: str, prompt: str = PROMPT, **fields: Any) -> tuple[list[str], list[float], int, str]:
    """Greedy tokens, their log-probabilities, how much of the prompt was cached, and the version that said it."""
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    answer = live.post("/v1/completions", body | fields)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    shown = found["choices"][0]["logprobs"]
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return shown["tokens"], shown["token_logprobs"], cached, answer.headers["x-loquetier-model-version"]


def test_a_cached_prefix_of_the_old_version_is_never_the_news(live: Live) -> None:
    load(live, "a", "1")
    old = said(live, "a")
    assert said(live, "a")[2] == 32, "of 48 tokens, in pages of 16, the last of them computed again"
    load(live, "a", "2", load_inplace=True)
    cold = said(live, "a", cache_salt="nobody-has-this")
    first, second = said(live, "a"), said(live, "a")
    assert (cold[2], first[2], second[2]) == (0, 0, 32)
    for warm in (first, second):
        assert warm[0] == cold[0] and warm[1] == pytest.approx(cold[1], abs=NEIGHBOURS)
    assert old[1] != pytest.approx(cold[1], abs=100 * NEIGHBOURS), "the versions can be told apart"
    load(live, "a", "1", load_inplace=True)
    assert said(live, "a")[1] == pytest.approx(old[1], abs=NEIGHBOURS)
    assert live.post(UNLOAD, {"lora_name": "a"}).status_code == 200
    load(live, "a", "3")
    assert said(live, "a")[2] == 0, "nor after the name was free in between"
    live.post(UNLOAD, {"lora_name": "a"})


def test_training_changes_no_answer(live: Live, client: openai.OpenAI) -> None:
    load(live, "a", "1")
    before = {model: said(live, model, cache_salt="before") for model in (BASE, "a")}
    made = create(client, upload(client), BASE, LONG)
    wait_for_step(live, made.id, 1)
    for round_ in range(5):
        for model, (tokens, logprobs, _, _) in before.items():
            during = said(live, model, cache_salt=f"during-{round_}")
            assert during[2] == 0, "computed beside the job, not remembered"
            assert during[0] == tokens and during[1] == pytest.approx(logprobs, abs=NEIGHBOURS)
        wait_for_step(live, made.id, 3 * round_ + 2)
    assert job_of(live, made.id)["status"] == "running"
    client.fine_tuning.jobs.cancel(made.id)
    wait_for(live, made.id, "cancelled")
    for model, (tokens, logprobs, _, _) in before.items():
        after = said(live, model, cache_salt="after")
        assert after[0] == tokens and after[1] == logprobs, "alone again: bit for bit"
    live.post(UNLOAD, {"lora_name": "a"})


def test_canaries_under_churn(live: Live, client: openai.OpenAI) -> None:
    """Each adapter's answer is its own while others are loaded, replaced and unloaded, and a job trains."""
    expected = {}
    for number in range(CANARIES + 1):
        load(live, "probe", str(number), load_inplace=True)
        expected[str(number)] = said(live, "probe", "canary")[:2]
    tokens = [tuple(t) + tuple(round(p, 3) for p in logprobs) for t, logprobs in expected.values()]
    assert len(set(tokens)) == CANARIES + 1, "each says something else"
    weights = {load(live, f"canary-{n}", str(n)): str(n) for n in range(CANARIES)}
    made = create(client, upload(client), BASE, LONG)
    wrong: list[str] = []
    is_over = threading.Event()

    def churn() -> None:
        for turn in range(1000):
            if is_over.is_set():
                return
            path = str((0, CANARIES)[turn % 2])
            weights[load(live, "canary-0", path, load_inplace=True)] = path
            load(live, "comes-and-goes", path)
            live.post(UNLOAD, {"lora_name": "comes-and-goes"})

    answers: list[tuple[str, list[str], list[float]]] = []

    def ask(first: int) -> None:
        for turn in range(10):
            name = f"canary-{(first + turn) % CANARIES}"
            text, logprobs, _, label = said(live, name, "canary")
            assert label.partition("@")[0] == name
            answers.append((label, text, logprobs))

    churning = threading.Thread(target=churn)
    asking = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in (churning, *asking):
        thread.start()
    for thread in asking:
        thread.join(DEADLINE)
    is_over.set()
    churning.join(DEADLINE)
    client.fine_tuning.jobs.cancel(made.id)
    for label, text, logprobs in answers:
        own = expected[weights[label]]
        if text != own[0] or logprobs != pytest.approx(own[1], abs=NEIGHBOURS):
            wrong.append(f"{label}: {text} {logprobs}, alone {own}")
    assert len(answers) == 40 and not wrong, wrong[:3]
    wait_for(live, made.id, "cancelled")
    for name in ("probe", *(f"canary-{n}" for n in range(CANARIES))):
        live.post(UNLOAD, {"lora_name": name})


def test_what_is_anothers_does_not_exist(live: Live, client: openai.OpenAI) -> None:
    file = upload(client)
    made = create(client, file, BASE, QUICK)
    model = wait_for(live, made.id, "succeeded")["fine_tuned_model"]
    ask = {"prompt": "x", "max_tokens": 1}
    train = {"model": BASE, "training_file": "ID"}
    swap = {"lora_name": "ID", "version": 1}
    asked: dict[str, list[tuple[str, str, Any]]] = {
        file.id: [
            ("GET", "/v1/files/ID", None), ("GET", "/v1/files/ID/content", None), ("DELETE", "/v1/files/ID", None),
            ("GET", "/v1/files?after=ID", None), ("POST", JOBS, train), 
            ("POST", JOBS, train | {"validation_file": "ID"}),
        ],
        made.id: [
            ("GET", f"{JOBS}/ID", None), ("GET", f"{JOBS}/ID/events", None), ("GET", f"{JOBS}/ID/checkpoints", None),
            ("GET", f"{JOBS}/ID/events?stream=true", None), ("POST", f"{JOBS}/ID/cancel", None),
            ("POST", f"{JOBS}/ID/pause", None), ("POST", f"{JOBS}/ID/resume", None), ("GET", f"{JOBS}?after=ID", None),
        ],
        model: [
            ("GET", "/v1/models/ID", None), ("GET", "/v1/models/ID@1", None), ("DELETE", "/v1/models/ID", None),
            ("POST", "/v1/completions", ask | {"model": "ID"}), ("POST", "/v1/completions", ask | {"model": "ID@1"}),
            ("POST", "/v1/chat/completions", {"model": "ID", "messages": [{"role": "user", "content": "x"}]}),
            ("POST", UNLOAD, {"lora_name": "ID"}), ("POST", "/v1/rollback_lora_adapter", swap),
            ("POST", "/v1/adapters/pin", {"lora_name": "ID"}), ("POST", "/v1/adapters/unpin", {"lora_name": "ID"}),
        ],
    }  # fmt: skip
    for found, requests in asked.items():
        missing = found[:-4] + "zzzz"  # of the same length and kind
        for method, path, body in requests:
            bodies = []
            for name in (found, missing):
                sent = body and {k: name if v == "ID" else v for k, v in body.items()}
                if body and str(body.get("model")) == "ID@1":
                    sent["model"] = f"{name}@1"
                options = {} if sent is None else {"json": sent}
                answer = live.http(method, path.replace("ID", name), headers=bearer("bob-key"), **options)
                kept = {k: v for k, v in answer.headers.items() if k not in ("x-request-id", "date")}
                kept = {k: v for k, v in kept.items() if not k.startswith("x-ratelimit")}
                bodies.append((answer.status_code, answer.text.replace(name, "ID"), kept))
            assert bodies[0] == bodies[1] and bodies[0][0] in (400, 404), (method, path, bodies)
    residency = "/v1/adapters/residency"
    wait_until(lambda: model in live.http("GET", residency).text, "the engine's next beat names it to its owner")
    for path in ("/v1/models", "/v1/adapters", "/v1/lora_adapters", residency, "/v1/files", JOBS):
        page = live.http("GET", path, headers=bearer("bob-key"))
        assert page.status_code == 200 and not {n for n in asked if n in page.text}, path
    assert client.files.retrieve(file.id).id == file.id and client.models.retrieve(model).id == model, "all untouched"
