"""schemathesis over our own OpenAPI: whatever it makes up, no 5xx, and every error has OpenAI's four keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from tests.server.fixtures import BASE, base_dir, live, runtime
from tests.server.live import DEADLINE, Live, wait_until

__all__ = ["base_dir", "live", "runtime"]

EXAMPLES = 25
"""Per route and mode; a night may take thousands."""


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_nothing_made_up_breaks_the_server(live: Live, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    seen = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and not len(operation.body):
            continue  # nothing in it can be wrong: any path is a string
        fuzz(operation, mode)
        seen += 1
    assert seen >= 7
    wait_until(live.settled, "all of it is over")
    live.runtime.check_integrity()


def fuzz(operation: Any, mode: GenerationMode) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = BASE  # else nothing would ever get past the 404
        response = case.call(timeout=DEADLINE)
        assert response.status_code < 500, (case.body, response.text)
        if response.status_code >= 400:
            body = json.loads(response.content)
            assert set(body["error"]) == {"message", "type", "param", "code"}, body

    check()
