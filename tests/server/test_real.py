"""SmolLM2-135M-Instruct behind the server: the stock SDK's chat answer is the runtime's own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.server.live import serving

from loquetier.config import EngineConfig, SamplingParams
from loquetier.runtime import Runtime

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat_over_a_socket() -> None:
    with Runtime("smollm2-135m", config=EngineConfig(dtype="float32")) as runtime, serving(runtime) as live:
        expected = runtime.generate(MESSAGES, params=SamplingParams(temperature=0.0, max_tokens=12)).text
        options: dict[str, Any] = {"model": "smollm2-135m", "messages": MESSAGES, "max_tokens": 12, "temperature": 0.0}
        whole = live.client(timeout=120).chat.completions.create(**options)
        assert whole.choices[0].message.content == expected and "Paris" in expected
        assert asyncio.run(_streamed(f"{live.url}/v1", options)) == expected


async def _streamed(url: str, options: dict[str, Any]) -> str:
    """The same through the SDK's asynchronous client."""
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        stream = await client.chat.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
