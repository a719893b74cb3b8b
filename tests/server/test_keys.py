"""Keys and limits: who may ask what, over every route that the app has."""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.routing import APIRoute
from tests.server.fixtures import BASE, base_dir, runtime
from tests.server.live import Live, error_of, serving
from tests.server.tuned import tuned

from loquetier.errors import ConfigError, IntegrityError
from loquetier.runtime import Runtime
from loquetier.server.app import create_app
from loquetier.server.auth import KeyRing, Principal, Scope, load_keys
from loquetier.server.gate import PUBLIC
from loquetier.server.guard import needs_of, routes_of
from loquetier.server.serve import check_bind, is_loopback
from loquetier.server.settings import ServerSettings

__all__ = ["base_dir", "runtime"]

KEYS = {
    "infer-key": Principal(id="i", owner="i", scopes=frozenset({Scope.INFER})),
    "train-key": Principal(id="t", owner="t", scopes=frozenset({Scope.TRAIN})),
    "admin-key": Principal(id="a", owner="a", scopes=frozenset({Scope.ADMIN})),
    "math-only": Principal(id="m", owner="m", scopes=frozenset({Scope.INFER}), adapters=frozenset({"math"})),
    "slow": Principal(id="s", owner="s", scopes=frozenset({Scope.INFER}), requests_per_minute=2),
    "few": Principal(id="f", owner="f", scopes=frozenset({Scope.INFER}), tokens_per_minute=20),
    "one": Principal(id="o", owner="o", scopes=frozenset({Scope.INFER}), concurrency=1),
}
RING = KeyRing(tuple((hashlib.sha256(key.encode()).hexdigest(), who) for key, who in KEYS.items()))
ASK: dict[str, Any] = {"model": BASE, "prompt": "hello", "max_tokens": 2}


class Clock:
    """Time that stands still unless a test moves it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def live(runtime: Runtime, clock: Clock) -> Iterator[Live]:
    with serving(runtime, RING, "infer-key", clock=clock) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_route_and_every_key(base_dir: Path, tmp_path: Path) -> None:
    """A new route is in this matrix by itself; one without a scope does not even let the app be built."""
    with tuned(base_dir, tmp_path, RING, "infer-key") as live:
        routes = [(method, r) for r in routes_of(create_app(live.services)) for method in r.methods or ()]
        for method, route in routes:
            _check_route(live, method, route)
    training = {(method, r.path) for method, r in routes if r.path.startswith(("/v1/files", "/v1/fine_tuning/"))} | {
        ("DELETE", "/v1/models/{model:path}")
    }
    assert len(training) == 14 and len(routes) >= 30
    for method, route in routes:
        need = needs_of(route)
        assert need is not None and ((method, route.path) in training) == (need.scopes == {Scope.TRAIN}), route.path


def _check_route(live: Live, method: str, route: APIRoute) -> None:
    need, path = needs_of(route), re.sub(r"\{[a-z_]+(:path)?\}", "math", route.path)
    assert need is not None
    anonymous = _status(live, method, path, None)
    if path in PUBLIC:
        assert anonymous == 200, path
        return
    assert anonymous == 401, path
    for key in ("infer-key", "train-key", "admin-key"):
        allowed = bool(need.scopes & KEYS[key].scopes)
        status = _status(live, method, path, key)
        assert (status not in (401, 403)) == allowed, (method, path, key, status)


def _status(live: Live, method: str, path: str, key: str | None) -> int:
    """The status of a request whose body is wrong on purpose: a key that may not ask must not learn even that."""
    live.services.bad_keys._buckets.clear()  # this test sends more bad keys than any minute allows
    headers = bearer(key) if key else {"Authorization": ""}
    options = {"json": {}} if method == "POST" else {}
    response = live.http(method, path, headers=headers, **options)
    if response.status_code >= 400:
        error_of(response)
    return response.status_code


def test_a_route_without_a_scope_is_refused(live: Live) -> None:
    from fastapi import APIRouter

    router = APIRouter()

    @router.get("/v1/forgotten")
    async def forgotten() -> dict[str, str]:
        return {}

    with pytest.raises(IntegrityError, match="/v1/forgotten"):
        create_app(live.services, [router])


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", "Bearer INFER-KEY", "infer-key", "Basic infer-key",
     "Bearer Bearer infer-key", "Bearer " + "x" * 5000],
    ids=lambda h: h[:20] or "none",
)  # fmt: skip
def test_row_5_bad_keys(live: Live, header: str) -> None:
    live.services.bad_keys._buckets.clear()
    response = live.http("GET", "/v1/models", headers={"Authorization": header})
    assert response.status_code == 401
    error = error_of(response)
    assert error["code"] == "invalid_api_key" and "infer-key" not in response.text.lower()


def test_row_5_two_keys_at_once(live: Live) -> None:
    live.services.bad_keys._buckets.clear()
    answer = _raw(live, b"Authorization: Bearer infer-key\r\nAuthorization: Bearer infer-key\r\n")
    assert answer.startswith(b"HTTP/1.1 401")


def _raw(live: Live, headers: bytes, target: bytes = b"/v1/models", host: bytes = b"localhost") -> bytes:
    with socket.create_connection(live.address, timeout=10) as connection:
        connection.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + headers + b"\r\n")
        return connection.recv(4096)


@pytest.mark.parametrize(
    ("target", "host"),
    [(b"/v1/models", b"x/health?"), (b"/v1/models", b"x?/health"), (b"http://x/health", b"x"),
     (b"//health/../v1/models", b"x"), (b"/health/../v1/models", b"x"), (b"/v1/models?/health", b"x"),
     (b"/v1/models#/health", b"x"), (b"/v1%2fmodels", b"x"), (b"/health%00/v1/models", b"x")],
)  # fmt: skip
def test_row_6_nothing_skips_the_key(live: Live, target: bytes, host: bytes) -> None:
    live.services.bad_keys._buckets.clear()
    answer = _raw(live, b"", target, host)
    assert answer[9:12] in (b"400", b"401", b"404"), answer


def test_row_5_twenty_bad_keys_a_minute(live: Live, clock: Clock) -> None:
    live.services.bad_keys._buckets.clear()
    statuses = [live.http("GET", "/v1/models", headers=bearer("bad")).status_code for _ in range(22)]
    assert statuses == [401] * 20 + [429] * 2
    throttled = live.http("GET", "/v1/models", headers=bearer("bad"))
    assert int(throttled.headers["retry-after"]) >= 1
    assert live.http("GET", "/v1/models").status_code == 200, "a good key from the same address goes on"
    clock.now += 61
    assert live.http("GET", "/v1/models", headers=bearer("bad")).status_code == 401


def test_a_key_sees_only_its_adapters(live: Live) -> None:
    shown = live.http("GET", "/v1/models", headers=bearer("math-only")).json()["data"]
    assert [m["id"] for m in shown] == ["math"]
    assert live.post("/v1/completions", ASK | {"model": "math@1"}, headers=bearer("math-only")).status_code == 200
    hidden = live.post("/v1/completions", ASK | {"model": "org/x:y"}, headers=bearer("math-only"))
    missing = live.post("/v1/completions", ASK | {"model": "org/x:z"}, headers=bearer("math-only"))
    assert hidden.status_code == missing.status_code == 404
    assert hidden.text.replace("x:y", "x:z") == missing.text
    assert live.post("/v1/completions", ASK, headers=bearer("math-only")).status_code == 404, "nor the base"


def test_requests_per_minute(live: Live, clock: Clock) -> None:
    clock.now += 120
    first = live.post("/v1/completions", ASK, headers=bearer("slow"))
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert live.http("GET", "/v1/models", headers=bearer("slow")).status_code == 200
    third = live.post("/v1/completions", ASK, headers=bearer("slow"))
    assert third.status_code == 429 and error_of(third)["code"] == "rate_limit_exceeded"
    assert third.headers["retry-after"] == "30"
    clock.now += 30
    assert live.post("/v1/completions", ASK, headers=bearer("slow")).status_code == 200


def test_tokens_per_minute_count_what_was_generated(live: Live, clock: Clock) -> None:
    clock.now += 120
    ask = ASK | {"max_tokens": 40, "ignore_eos": True}
    assert live.post("/v1/completions", ask, headers=bearer("few")).status_code == 200
    # 5 of the prompt and 40 generated: 25 below nothing, and 5 more are wanted; 20 come each minute.
    refused = live.post("/v1/completions", ask, headers=bearer("few"))
    assert refused.status_code == 429 and refused.headers["retry-after"] == "90"
    clock.now += 91
    assert live.post("/v1/completions", ask, headers=bearer("few")).status_code == 200


def test_one_request_at_once(live: Live) -> None:
    ask = ASK | {"max_tokens": 250, "ignore_eos": True}
    client = live.client(api_key="one", _strict_response_validation=False)
    stream = client.completions.create(
        model=BASE, prompt="a", max_tokens=250, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    second = live.post("/v1/completions", ask, headers=bearer("one"))
    stream.close()
    assert second.status_code == 429 and error_of(second)["code"] == "concurrency_limit_exceeded"


def test_a_priority_below_0_is_the_operators(live: Live) -> None:
    assert live.post("/v1/completions", ASK | {"priority": 5}).status_code == 200
    response = live.post("/v1/completions", ASK | {"priority": -5})
    assert response.status_code == 400 and error_of(response)["param"] == "priority"


def test_the_sdk_raises_the_right_classes(live: Live) -> None:
    live.services.bad_keys._buckets.clear()
    with pytest.raises(openai.AuthenticationError):
        live.client(api_key="bad").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        live.client().models.retrieve("ft:HuggingFaceTB/SmolLM2-135M:org:x:abc123")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        live.client().completions.create(model=BASE, prompt="x", n=0)
    assert bad.value.param == "n"


# --- the keys file and the address ---


def keys_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    return path


def test_a_keys_file(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    ring = load_keys(
        keys_file(
            tmp_path,
            f'[[key]]\nid = "alice"\nsha256 = "{digest}"\nscopes = ["infer", "train"]\nconcurrency = 3\n'
            'adapters = ["math"]\n',
        )
    )
    who = ring.find([b"Bearer secret"])
    assert who is not None and (who.id, who.owner, who.concurrency) == ("alice", "alice", 3)
    assert who.scopes == {Scope.INFER, Scope.TRAIN} and not who.may_use(BASE)
    assert ring.find([b"Bearer Secret"]) is None and ring.find([]) is None


@pytest.mark.parametrize(
    "text",
    ["", "x = 1", "[[key]]", '[[key]]\nid = "a"\nsha256 = "secret"', "[[key]\n",
     '[[key]]\nid = "a"\nsha256 = "{0}"\nscope = ["infer"]', '[[key]]\nid = "a"\nsha256 = "{0}"\nscopes = ["root"]',
     '[[key]]\nid = "a"\nsha256 = "{0}"\nconcurrency = 0', '[[key]]\nid = "a b"\nsha256 = "{0}"',
     '[[key]]\nid = "a"\nsha256 = "{0}"\n[[key]]\nid = "a"\nsha256 = "{1}"'],
)  # fmt: skip
def test_a_bad_keys_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="--api-keys"):
        load_keys(keys_file(tmp_path, text.replace("{0}", "0" * 64).replace("{1}", "1" * 64)))


@pytest.mark.parametrize(("host", "ok"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
                                          ("::", False), ("192.168.1.5", False), ("example.org", False)])  # fmt: skip
def test_a_public_address_needs_keys(host: str, ok: bool) -> None:
    assert is_loopback(host) == ok
    settings = ServerSettings(host=host)
    check_bind(settings, RING)
    check_bind(ServerSettings(host=host, insecure=True), KeyRing())
    if ok:
        check_bind(settings, KeyRing())
    else:
        with pytest.raises(ConfigError, match="--api-keys"):
            check_bind(settings, KeyRing())
