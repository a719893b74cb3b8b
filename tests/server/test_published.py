"""The second oracle sees what it should: an answer without a required key, of a wrong type, and a bad chunk."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.server.fixtures import BASE, base_dir, live, runtime
from tests.server.live import Live
from tests.server.published import check

__all__ = ["base_dir", "live", "runtime"]

CHAT = "/v1/chat/completions"


def ask(live: Live, **more: Any) -> bytes:
    body = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3} | more
    return live.post(CHAT, body).content


def test_a_missing_key_is_seen(live: Live) -> None:
    answer = json.loads(ask(live))
    check("POST", CHAT, 200, "application/json", json.dumps(answer).encode())
    del answer["choices"][0]["message"]["refusal"]
    with pytest.raises(AssertionError, match="refusal"):
        check("POST", CHAT, 200, "application/json", json.dumps(answer).encode())


def test_a_bad_chunk_is_seen(live: Live) -> None:
    body = ask(live, stream=True)
    check("POST", CHAT, 200, "text/event-stream", body)
    with pytest.raises(AssertionError, match="chunk"):
        check("POST", CHAT, 200, "text/event-stream", body.replace(b"chat.completion.chunk", b"chat.completion"))


def test_an_error_has_four_keys() -> None:
    check(
        "GET", "/v1/models/x", 404, "application/json", b'{"error":{"message":"m","type":"t","param":null,"code":"c"}}'
    )
    with pytest.raises(AssertionError, match="code"):
        check("GET", "/v1/models/x", 404, "application/json", b'{"error":{"message":"m","type":"t","param":null}}')
