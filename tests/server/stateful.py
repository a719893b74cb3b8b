"""schemathesis walks over our OpenAPI's links: a file becomes a job that is paused, looked at, cancelled; and so on."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import FlakyStrategyDefinition
from schemathesis import GenerationMode
from tests.server.fixtures import BASE
from tests.server.live import DEADLINE, Live
from tests.server.tuned import CHATS, jsonl

WALKS = 6
"""In a round."""
STEPS = {"max_steps": 1000, "checkpoint_every": 2, "batch_size": 1}
OURS = frozenset({"model", "training_file", "lora", "training", "hyperparameters", "method", "validation_file"})


def walk(live: Live, modes: list[GenerationMode], *, rounds: int, steps: int, paths: str, root: Path) -> Counter[str]:
    """Rounds of walks of `steps` requests each, every round from its own seed.

    Args:
        paths: a regular expression of the paths that take part.
        root: the adapter directory, in which "one" is good.

    Returns:
        How often each operation was answered with a 200.
    """
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json").include(path_regex=paths)
    schema.config.generation.update(modes=modes)
    schema.config.phases.stateful.inference.algorithms = []  # the links that we publish, not those that it guesses
    done: Counter[str] = Counter()
    failures: list[str] = []

    class Walk(schema.as_state_machine()):  # type: ignore[misc]
        def before_call(self, case: Any) -> None:
            ground(case, root)

        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"timeout": DEADLINE}

        def validate_response(self, response: Any, case: Any, **_: Any) -> None:
            problem = problem_of(response.status_code, response.content)
            if problem is not None:
                failures.append(f"{case.operation.label} {case.body!r}: {problem}")
                raise AssertionError(failures[-1])
            if response.status_code == 200:
                done[case.operation.label] += 1

        def teardown(self) -> None:
            clear(live)
            super().teardown()

    options = hypothesis.settings(
        max_examples=WALKS,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for number in range(rounds):
        # A job may have ended by the second look, so that another link is open: such a round ends early.
        with suppress(FlakyStrategyDefinition):
            hypothesis.seed(number)(Walk).run(settings=options)
    assert not failures, failures[0]
    return done


def problem_of(status: int, content: bytes) -> str | None:
    """What is wrong with an answer: a 5xx, or an error without OpenAI's four keys."""
    if status >= 500:
        return f"{status} {content[:1000]!r}"
    if status >= 400:
        error = json.loads(content)
        if set(error) != {"error"} or set(error["error"]) != {"message", "type", "param", "code"}:
            return f"{status} with another shape: {content[:1000]!r}"
    return None


def clear(live: Live) -> None:
    """Every walk begins with nothing."""
    for job in live.http("GET", "/v1/fine_tuning/jobs?limit=100").json()["data"]:
        if job["status"] not in ("succeeded", "failed", "cancelled"):
            assert live.http("POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel").status_code in (200, 400)
    for file in live.http("GET", "/v1/files").json()["data"]:
        assert live.http("DELETE", f"/v1/files/{file['id']}").status_code == 200
    for adapter in live.http("GET", "/v1/adapters").json()["data"]:
        if not adapter["id"].startswith("ft:"):
            assert live.post("/v1/unload_lora_adapter", {"lora_name": adapter["id"]}).status_code == 200


def ground(case: Any, root: Path) -> None:
    """Names that exist put into a body that is right in itself: made up, they would never get past the 404."""
    if case.meta is not None and case.meta.generation.mode is GenerationMode.NEGATIVE:
        return
    body, label = case.body, case.operation.label
    if label.endswith("/events"):
        case.query.pop("stream", None)  # it would end with the job
    if not isinstance(body, dict):
        return
    if label == "POST /v1/files":
        body["file"], body["purpose"] = jsonl(CHATS), "fine-tune"
    elif label == "POST /v1/fine_tuning/jobs":
        body["model"] = BASE
        for name in OURS - {"model", "training_file"}:
            body.pop(name, None)
        body["training"] = dict(STEPS)
        body["lora"] = {"r": 2}
    elif label == "POST /v1/load_lora_adapter":
        body["lora_name"], body["lora_path"] = f"a{len(body)}", str(root / "one")
        body.pop("is_3d_lora_weight", None)
    elif label == "POST /v1/completions":
        model = body.get("model")  # that of the link, if one led here
        body.clear()
        body.update(model=model, prompt="x", max_tokens=2)
