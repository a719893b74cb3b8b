"""One client for every server: OpenAI's own SDK, streaming, all requests at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from loquetier.bench.ours import tokens_of
from loquetier.bench.traffic import Ask
from loquetier.errors import ConfigError, EngineError


def check_client() -> None:
    """Raises ConfigError where the SDK is not installed."""
    if find_spec("openai") is None:
        raise ConfigError("servers are measured with the openai SDK: install the dev extra, or leave servers out")


def drive(port: int, base: str, asks: Sequence[Ask]) -> dict[str, Any]:
    """Answer all requests at once; a sample as `ours.answered` makes it.

    Args:
        base: model name of a request without an adapter.

    Raises:
        EngineError: an answer is not as long as asked.
    """
    return asyncio.run(_drive(port, base, asks))


async def _drive(port: int, base: str, asks: Sequence[Ask]) -> dict[str, Any]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        await client.models.list()  # the connection pool is made
        started, own = time.perf_counter(), time.process_time()
        answers = await asyncio.gather(*(_one(client, ask, ask.model or base) for ask in asks))
        seconds, own = time.perf_counter() - started, time.process_time() - own
    firsts, lasts = zip(*answers, strict=True)
    middle = len(asks) // 2
    sample = {
        "seconds": seconds,
        "tokens": tokens_of(asks),
        "first_token_s": sorted(t - started for t in firsts)[middle],
        "client_cpu_s": own,  # taken from the server's cores
    }
    if all(ask.new_tokens > 1 for ask in asks):
        gaps = sorted((b - a) / (ask.new_tokens - 1) for a, b, ask in zip(firsts, lasts, asks, strict=True))
        sample["token_s"] = gaps[middle]
    return sample


async def _one(client: Any, ask: Ask, model: str) -> tuple[float, float]:
    """Times of the first and the last piece of text. (A server may put several tokens into one piece.)"""
    first = last = None
    count = 0
    stream = await client.completions.create(
        model=model,
        prompt=list(ask.prompt),
        max_tokens=ask.new_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices:
            last = time.perf_counter()
            first = first or last
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
    if first is None or last is None or count != ask.new_tokens:
        raise EngineError(f"{model}: an answer has {count} tokens where {ask.new_tokens} were asked for")
    return first, last
