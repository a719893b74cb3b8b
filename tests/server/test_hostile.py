"""Bad and hostile inputs of the inference endpoints: each gets the status it should, OpenAI's error, and harms nobody.

Numbers in names are rows of the project's table of hostile inputs.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.fixtures import BASE, base_dir, live, runtime
from tests.server.live import Live, error_of, wait_until

__all__ = ["base_dir", "live", "runtime"]

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def _the_next_request_is_fine(live: Live) -> Iterator[None]:
    yield
    answer = live.post(TEXT, {"model": BASE, "prompt": "ok", "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    assert live.http("GET", "/health").status_code == 200
    wait_until(live.settled, "everything of the bad request is gone")


def refused(live: Live, path: str, param: str | None, **fields: Any) -> dict[str, Any]:
    """A 400 that names `param`."""
    body = {"model": BASE, "max_tokens": 2} | ({"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}) | fields
    response = live.post(path, body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] is not None and error["param"].startswith(param), error
    return error


@pytest.mark.parametrize("body", [b"", b"{", b'{"a":', b"[1]", b"nope", b'"x"', b'{"a": "\xff"}', b"\x00"], ids=repr)
def test_row_1_broken_json(live: Live, body: bytes) -> None:
    response = live.http("POST", CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error" and error["param"] is None


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_row_1_numbers_that_json_does_not_have(live: Live, literal: str) -> None:
    body = f'{{"model": "{BASE}", "messages": [{{"role": "user", "content": "x"}}], "temperature": {literal}}}'
    response = live.http("POST", CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("body", [b"[" * 4_000_000, b'{"a":' * 200 + b"1" + b"}" * 200], ids=["brackets", "objects"])
def test_row_2_deep_json(live: Live, body: bytes) -> None:
    response = live.http("POST", CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "deeper" in error_of(response)["message"]


def test_row_2_brackets_in_strings_are_not_depth(live: Live) -> None:
    text = "[" * 100 + '\\"' + "{" * 100
    body = {"model": BASE, "prompt": text[:100], "max_tokens": 1}
    assert live.post(TEXT, body).status_code == 200


def test_row_3_a_body_over_the_limit(live: Live) -> None:
    body = json.dumps({"model": BASE, "prompt": "x" * (9 << 20)}).encode()
    response = live.http("POST", TEXT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert response.headers["connection"] == "close"


def test_row_3_chunked_without_a_length(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        sent = 0
        try:
            while sent < 64 << 20:  # it must not take all of it
                connection.sendall(chunk)
                sent += 0x10000
        except OSError:
            pass
        assert sent < 64 << 20, "the server read on"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_row_4_wrong_content_type(live: Live, kind: str) -> None:
    response = live.http("POST", CHAT, content=b'{"a": 1}', headers={"Content-Type": kind})
    assert response.status_code == 415
    error_of(response)


@pytest.mark.parametrize(
    "name",
    ["gpt-4o", "../../etc/passwd", "ft:", "x" * 10_000, "math\x00", "\u202etam", "", "math@", "math@0", "math@99999"],
    ids=lambda name: repr(name[:12]),
)
def test_row_7_unknown_models(live: Live, name: str) -> None:
    for path, extra in ((CHAT, {"messages": MESSAGES}), (TEXT, {"prompt": "x"})):
        response = live.post(path, {"model": name, **extra})
        assert response.status_code == 404, response.text
        error = error_of(response)
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert len(error["message"]) < 200 and "\x00" not in error["message"] and "\u202e" not in error["message"]
    assert name[:20] not in live.http("GET", "/metrics").text or not name


@pytest.mark.parametrize("n", [0, -1, 10**9, "2", 1.5, True, 129])
def test_row_8_n(live: Live, n: Any) -> None:
    refused(live, CHAT, "n", n=n)
    refused(live, TEXT, "n", n=n)


def test_row_8_n_times_prompts(live: Live) -> None:
    refused(live, TEXT, "n", n=128, prompt=["a", "b", "c"])


def test_row_9_best_of(live: Live) -> None:
    refused(live, TEXT, "best_of", n=3, best_of=2)
    refused(live, TEXT, "best_of", best_of=1, stream=True)
    refused(live, TEXT, "best_of", best_of=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", 1e308), ("temperature", "0.5"), ("temperature", True), ("top_p", 0),
        ("top_p", 2), ("presence_penalty", 3), ("frequency_penalty", -2.1), ("top_k", -5), ("top_k", 1.5),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0), ("repetition_penalty", -1), ("seed", 2**63),
        ("seed", 1.5), ("priority", "high"), ("user", "x" * 1000),
    ],
)  # fmt: skip
def test_row_10_sampling_options(live: Live, field: str, value: Any) -> None:
    refused(live, CHAT, field, **{field: value})
    refused(live, TEXT, field, **{field: value})


@pytest.mark.parametrize("value", [-1, 2**63, 2**70, "10", 1.5])
def test_row_11_max_tokens(live: Live, value: Any) -> None:
    refused(live, CHAT, "max_tokens", max_tokens=value)
    refused(live, TEXT, "max_tokens", max_tokens=value)


def test_row_11_over_the_context(live: Live) -> None:
    for path in (CHAT, TEXT):
        error = refused(live, path, None, max_tokens=100_000)
        assert error["code"] == "context_length_exceeded" and "256" in error["message"]
    error = refused(live, TEXT, "prompt", prompt="x" * 300)
    assert error["code"] == "context_length_exceeded" and "300" in error["message"]
    error = refused(live, TEXT, "prompt", prompt="x" * 6_000_000)  # refused before it is tokenized
    assert error["code"] == "context_length_exceeded" and "6000000" in error["message"]


def test_row_12_min_above_max(live: Live) -> None:
    refused(live, CHAT, "min_tokens", min_tokens=3)
    refused(live, TEXT, "min_tokens", min_tokens=3)
    refused(live, TEXT, "min_tokens", min_tokens=1, max_tokens=0, echo=True)


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], ["x"] * 10_000, [-1], [260], [2**40], [1, "a"], ["a", 1], [[1], "a"], [[1, True]], {"a": 1}, None, 5],
    ids=lambda p: repr(p)[:20],
)
def test_row_13_prompts(live: Live, prompt: Any) -> None:
    refused(live, TEXT, "prompt", prompt=prompt)


def test_row_13_an_empty_prompt_without_a_first_token(live: Live) -> None:
    refused(live, TEXT, "prompt", prompt="")


@pytest.mark.parametrize("stop", [["a"] * 5, "", [""], "x" * (1 << 20), [1]], ids=lambda s: repr(s)[:12])
def test_row_14_stop(live: Live, stop: Any) -> None:
    refused(live, CHAT, "stop", stop=stop)
    refused(live, TEXT, "stop", stop=stop)


def test_row_14_a_list_is_judged_as_a_list(live: Live) -> None:
    """`stop` may be a string or a list: the complaint is about what was sent, not about the other form."""
    assert "at least 1 character" in refused(live, CHAT, "stop[1]", stop=["a", ""])["message"]
    assert "at most 4 items" in refused(live, CHAT, "stop", stop=["a"] * 5)["message"]


@pytest.mark.parametrize(
    "bias",
    [{str(i): 1 for i in range(100_000)}, {"260": 1}, {"-1": 1}, {"5": 1e9}, {"abc": 1}, {"5": "x"}, {"٣": 1}, [1]],
    ids=lambda b: repr(b)[:12],
)
def test_row_15_logit_bias(live: Live, bias: Any) -> None:
    refused(live, CHAT, "logit_bias", logit_bias=bias)
    refused(live, TEXT, "logit_bias", logit_bias=bias)


def test_row_16_logprobs(live: Live) -> None:
    refused(live, TEXT, "logprobs", logprobs=6)
    refused(live, TEXT, "logprobs", logprobs=True)
    refused(live, CHAT, "top_logprobs", logprobs=True, top_logprobs=21)
    refused(live, CHAT, "top_logprobs", top_logprobs=2)
    refused(live, CHAT, "logprobs", logprobs=3)


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": "root", "content": "x"}], "messages[0]"),
        ([MESSAGES[0], {"role": "user", "content": None}], "messages[1]"),
        ([MESSAGES[0], {"role": "user", "content": 5}], "messages[1]"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "messages[0]"),
        ([MESSAGES[0], {"role": "tool", "content": "x"}], "messages[1]"),
        ([{"role": "user", "content": "x", "weird": 1}], "messages[0]"),
        (["x"], "messages[0]"),
        ([{"role": "user", "content": "x" * (7 << 20)}], "messages"),
        ([{"role": "user", "content": ""}] * 100_000, "messages"),
    ],
    ids=range(12),
)
def test_row_17_messages(live: Live, messages: Any, place: str) -> None:
    error = refused(live, CHAT, place, messages=messages)
    assert place in error["message"]


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "file:///etc/passwd", "data:image/png;base64,AA=="])
def test_row_18_nothing_is_fetched(live: Live, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = threading.get_ident()
    real = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        assert threading.get_ident() == mine, f"the server connects to {address}"
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    error = refused(live, CHAT, "messages[0]", messages=[{"role": "user", "content": parts}])
    assert "text parts" in error["message"]


@pytest.mark.parametrize("field", ["chat_template", "chat_template_kwargs"])
def test_row_18_no_templates_by_request(live: Live, field: str) -> None:
    value = "{{ 'a' * 10**9 }}" if field == "chat_template" else {"tokenize": False}
    error = refused(live, CHAT, field, **{field: value})
    assert "not supported" in error["message"]
    assert live.post("/tokenize", {"messages": MESSAGES, field: value}).status_code == 400


def test_row_21_streams(live: Live) -> None:
    refused(live, CHAT, "stream_options", stream_options={"include_usage": True})
    refused(live, TEXT, "stream_options", stream=False, stream_options={"include_usage": True})
    refused(live, CHAT, "stream", stream="yes")
    refused(live, CHAT, "stream_options", stream=True, stream_options={"include_usage": "yes"})


def test_row_22_a_callers_request_id_is_only_echoed(live: Live) -> None:
    ids = set()
    for _ in range(10):
        body = {"model": BASE, "prompt": "x", "max_tokens": 1}
        answer = live.post(TEXT, body, headers={"X-Request-Id": "same"})
        assert answer.headers["x-request-id"] == "same"
        ids.add(answer.json()["id"])
    assert len(ids) == 10
    hostile = live.http("GET", "/health", headers={"X-Request-Id": "a\tb" + "c" * 500})
    assert hostile.headers["x-request-id"] == "ab" + "c" * 125
    assert live.http("GET", "/health").headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("salt", ["a/b", "a@b", "a\\b", "a\x00b", "", "x" * (1 << 20)], ids=lambda s: repr(s)[:8])
def test_row_23_cache_salt(live: Live, salt: str) -> None:
    refused(live, CHAT, "cache_salt", cache_salt=salt)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models/x", 405), ("PUT", "/tokenize", 405),
     ("GET", "//v1/models", 404), ("GET", "/v1/%2e%2e/models", 404), ("GET", "/v1/models/nope", 404)],
)  # fmt: skip
def test_unknown_paths_and_methods(live: Live, method: str, path: str, status: int) -> None:
    response = live.http(method, path)
    assert response.status_code == status
    error_of(response)


def raw(live: Live, head: bytes) -> bytes:
    """The answer to a request written by hand, up to its end or a first 4 kB."""
    with live.connect() as connection:
        connection.sendall(head)
        return connection.recv(4096)


@pytest.mark.parametrize("host", [b"x/health?", b"evil.example", b"127.0.0.1.evil.example", b"localhost@evil", b""])
def test_row_6_hosts(live: Live, host: bytes) -> None:
    """Without keys only this machine may ask: a page in a browser cannot, whatever its name resolves to."""
    answer = raw(live, b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400"), answer


def test_row_6_a_64_kb_header_and_an_absolute_uri(live: Live) -> None:
    answer = raw(live, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000 + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 4"), answer  # 431 of ours, or 400 of the parser, whichever sees it first
    answer = raw(live, b"GET http://x/health HTTP/1.1\r\nHost: evil\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 4"), answer
