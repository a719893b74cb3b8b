"""The prefix cache over HTTP: usage, metrics, whose cache it is, and what must not change with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.fixtures import BASE, base_dir, runtime
from tests.server.live import Live, serving, wait_until

from loquetier.runtime import Runtime
from loquetier.server.auth import KeyRing, Principal, Scope

__all__ = ["base_dir", "runtime"]

OWNERS = ("anna", "bert")
RING = KeyRing(
    tuple(
        (hashlib.sha256(f"{owner}-key".encode()).hexdigest(), Principal(id=owner, owner=owner, scopes=frozenset(Scope)))
        for owner in OWNERS
    )
)


@pytest.fixture(scope="module")
def live(runtime: Runtime) -> Iterator[Live]:
    with serving(runtime, RING, "anna-key") as found:
        yield found


def cached(live: Live, prompt: str, who: str = "anna", **fields: Any) -> int:
    """Cached tokens of a completion's usage."""
    body = {"model": BASE, "prompt": prompt, "max_tokens": 2} | fields
    answer = live.post("/v1/completions", body, headers={"Authorization": f"Bearer {who}-key"})
    assert answer.status_code == 200, answer.text
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_usage_tells_what_was_cached(live: Live) -> None:
    text = "a prompt of forty tokens, one per byte.."
    assert len(live.runtime.encode(text)) == 40
    assert [cached(live, text) for _ in range(2)] == [0, 32]
    answer = live.client().completions.create(model=BASE, prompt=[text, text + "!"], max_tokens=1, n=2)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 64, "each prompt once, whatever n is"
    stream = live.client().completions.create(
        model=BASE, prompt=text, max_tokens=1, stream=True, stream_options={"include_usage": True}
    )
    usage = list(stream)[-1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 32


def test_conversations_grow_on_what_was_said(live: Live) -> None:
    messages: list[Any] = [{"role": "user", "content": "tell me a story about a fox and a crow"}]
    first = live.client().chat.completions.create(model="math", messages=messages, max_tokens=20, temperature=0)
    again = live.client().chat.completions.create(model="math", messages=messages, max_tokens=20, temperature=0)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == (again.usage.prompt_tokens - 1) // 16 * 16
    assert again.choices[0].message.content == first.choices[0].message.content


def test_every_owner_and_salt_has_a_cache_of_its_own(live: Live) -> None:
    text = "what anna asked is nobody else's business"
    assert cached(live, text) == 0
    assert cached(live, text, "bert") == 0
    assert cached(live, text, cache_salt="pepper") == 0
    assert cached(live, text, model="math") == 0
    assert cached(live, text) == cached(live, text, "bert") == cached(live, text, cache_salt="pepper") == 32


def test_echo_with_logprobs_is_computed_in_full(live: Live) -> None:
    text = "every token of this prompt has a logprob"
    fields = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answers = []
    for _ in range(2):
        answers.append(live.post("/v1/completions", {"model": BASE, "prompt": text} | fields).json())
    shown = [a["choices"][0]["logprobs"]["token_logprobs"] for a in answers]
    assert len(shown[0]) == 41 and shown[0] == shown[1]
    assert [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers] == [0, 0]
    assert cached(live, text) == 32


def test_metrics_count_tokens(live: Live) -> None:
    def counted(name: str) -> float:
        page = live.http("GET", "/metrics").text
        lines = [line for line in page.splitlines() if line.startswith(f'{name}{{model_name="{BASE}"')]
        return float(lines[0].rsplit(" ", 1)[1])

    names = [f"{p}:prefix_cache_{what}_total" for p in ("vllm", "loquetier") for what in ("queries", "hits")]

    def beat() -> list[float]:
        return [counted(name) for name in names]

    cached(live, "counted in tokens, twice the same words.")
    stats = live.runtime.stats()
    wait_until(lambda: beat() == 2 * [stats.prefix_queries, stats.prefix_hits], "the next heartbeat's numbers")
    cached(live, "counted in tokens, twice the same words.")
    expected = [stats.prefix_queries + 40, stats.prefix_hits + 32]
    wait_until(lambda: beat() == 2 * expected, "the next heartbeat's numbers")
