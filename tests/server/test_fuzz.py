"""schemathesis over our own OpenAPI: whatever it makes up, no 5xx, and every error has OpenAI's four keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from tests.server.fixtures import BASE, base_dir, make_adapter
from tests.server.live import DEADLINE, Live, wait_until
from tests.server.stateful import clear, problem_of, walk
from tests.server.tuned import tuned, upload

__all__ = ["base_dir"]

EXAMPLES = 25
"""Per route and mode; a night may take thousands."""


@pytest.fixture(scope="module")
def live(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("adapters")
    with tuned(base_dir, tmp_path_factory.mktemp("data"), adapter_root=root) as found:
        make_adapter(found.runtime, root / "one", seed=1)
        yield found


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_nothing_made_up_breaks_the_server(live: Live, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    file = upload(live.client()).id
    seen = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and not len(operation.body) and not len(operation.query):
            continue  # nothing in it can be wrong: any path is a string
        fuzz(live, operation, mode, file)
        seen += 1
    assert seen >= 14
    tuning = live.services.tuning
    assert tuning is not None
    clear(live)
    wait_until(lambda: not tuning.running.num_running and live.settled(), "all of it is over")
    live.runtime.check_integrity()
    tuning.store.check_integrity()


def fuzz(live: Live, operation: Any, mode: GenerationMode, file: str) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def check(case: Any) -> None:
        for name, known in (("model", BASE), ("training_file", file), ("validation_file", file)):
            if isinstance(case.body, dict) and isinstance(case.body.get(name), str):
                case.body[name] = known  # else nothing would ever get past the 404
        response = case.call(timeout=DEADLINE)
        problem = problem_of(response.status_code, response.content)
        assert problem is None, (case.body, problem)
        if response.status_code == 200 and operation.label == "POST /v1/fine_tuning/jobs":
            job = response.json()["id"]  # its settings are made up too: it may want to train for ever
            assert live.http("POST", f"/v1/fine_tuning/jobs/{job}/cancel").status_code in (200, 400)

    check()


TUNED = r"^/v1/(files|fine_tuning|load_|unload_|models|completions)"
LINKED = {
    "POST /v1/files", "GET /v1/files/{file_id}", "GET /v1/files/{file_id}/content", "DELETE /v1/files/{file_id}",
    "POST /v1/fine_tuning/jobs", "GET /v1/fine_tuning/jobs/{job_id}", "GET /v1/fine_tuning/jobs/{job_id}/events",
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints", "POST /v1/fine_tuning/jobs/{job_id}/cancel",
    "POST /v1/fine_tuning/jobs/{job_id}/pause", "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter",
    "GET /v1/models/{model}", "POST /v1/completions",
}  # fmt: skip
"""What the walks must have got a 200 from."""


def walk_links(base_dir: Path, tmp_path: Path, *, rounds: int, steps: int) -> Counter[str]:
    with tuned(base_dir, tmp_path / "data", adapter_root=tmp_path) as live:
        make_adapter(live.runtime, tmp_path / "one", seed=1)
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        done = walk(live, modes, rounds=rounds, steps=steps, paths=TUNED, root=tmp_path)
        tuning = live.services.tuning
        assert tuning is not None
        wait_until(lambda: not tuning.running.num_running and live.settled(), "all of it is over")
        live.runtime.check_integrity()
        tuning.store.check_integrity()
    return done


def test_no_walk_over_the_links_breaks_the_server(base_dir: Path, tmp_path: Path) -> None:
    done = walk_links(base_dir, tmp_path, rounds=5, steps=20)
    assert done.keys() >= LINKED, LINKED - done.keys()


@pytest.mark.conform_full
@pytest.mark.timeout(3600)
def test_no_long_walk_over_the_links_breaks_the_server(base_dir: Path, tmp_path: Path) -> None:
    done = walk_links(base_dir, tmp_path, rounds=200, steps=50)
    assert done.keys() >= LINKED | {"POST /v1/fine_tuning/jobs/{job_id}/resume"}
