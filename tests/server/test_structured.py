"""Structured output: a random model, left to itself, writes rubbish; under a grammar it writes what was asked for."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tests.server.fixtures import BASE, base_dir, live, runtime
from tests.server.live import Live, error_of

__all__ = ["base_dir", "live", "runtime"]

ASK: dict[str, Any] = {"model": BASE, "prompt": "abc", "max_tokens": 120, "seed": 4}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def say(live: Live, **fields: Any) -> Any:
    answer = live.post("/v1/completions", ASK | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_a_json_schema_through_the_sdk(live: Live) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = live.client().chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "who?"}], response_format=schema, n=3, seed=2
    )
    for choice in answer.choices:
        person = json.loads(choice.message.content or "")
        assert person["name"] in ("ada", "bob") and 1 <= person["age"] <= 99
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-c]+x"}, r"[0-9]{3}-[a-c]+x"),
        ({"guided_choice": ["yes", "no", "a.b"]}, r"yes|no|a\.b"),
        ({"guided_grammar": 'start: "x" ("y" | "z")'}, r"x[yz]"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, r"left|right"),
        ({"guided_json": json.dumps({"type": "boolean"} | {})}, r"true|false"),
    ],
)
def test_every_kind(live: Live, fields: dict[str, Any], pattern: str) -> None:
    choices = say(live, n=4, temperature=1.5, **fields)
    assert all(re.fullmatch(pattern, c["text"]) and c["finish_reason"] == "stop" for c in choices), choices


def test_neighbours_in_the_batch_are_free(live: Live) -> None:
    free = say(live, temperature=0)[0]["text"]
    stream = live.client(_strict_response_validation=False).completions.create(
        **ASK, stream=True, extra_body={"guided_regex": "[ab]{100}"}
    )
    text = next(stream).choices[0].text
    assert say(live, temperature=0)[0]["text"] == free
    text += "".join(c.choices[0].text for c in stream)
    assert re.fullmatch("[ab]{100}", text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {"type": "nope"}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"$ref": "http://169.254.169.254/x"}}, "guided_json"),
        ({"guided_json": {"type": "string", "pattern": "a" * 200_000}}, "guided_json"),
        ({"guided_regex": "(" * 8000 + "a" + ")" * 8000}, "guided_regex"),
        ({"guided_regex": "a" * 20_000}, "guided_regex"),
        ({"guided_regex": "["}, "guided_regex"),
        ({"guided_grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "guided_grammar"),
        ({"guided_grammar": "nonsense"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
    ids=range(17),
)
def test_row_20_what_cannot_be_compiled_is_400(live: Live, fields: dict[str, Any], param: str) -> None:
    response = live.post("/v1/completions", ASK | fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"].startswith(param) or param in error["message"]


def test_row_20_a_recursive_schema_and_a_greedy_regex_are_fine(live: Live) -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    assert say(live, guided_json=tree, max_tokens=30)
    assert re.fullmatch("a+", say(live, guided_regex="(a+)+", max_tokens=30)[0]["text"])


def test_row_20_many_different_schemas(live: Live) -> None:
    for number in range(50):
        assert say(live, guided_choice=[f"answer {number}"])[0]["text"] == f"answer {number}"
