"""SmolLM2-135M-Instruct behind the server: the stock SDK's chat answer is the runtime's own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.server.live import serving
from tests.server.tuned import create, jsonl, upload, wait_for

from loquetier.config import EngineConfig, SamplingParams
from loquetier.runtime import Runtime
from loquetier.server.store.store import open_store

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


def test_a_job_over_a_socket_learns_and_its_model_answers(tmp_path: Path) -> None:
    """Four chats, twelve steps: what was taught is said, and the base says something else."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is the code of box {n}?"},
                {"role": "assistant", "content": "Zebra."},
            ]
        }
        for n in range(4)
    ]
    ask: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the code of box 3?"}],
        "max_tokens": 3,
        "temperature": 0.0,
    }
    store = open_store(tmp_path)
    runtime = Runtime("smollm2-135m", config=EngineConfig(dtype="float32"))
    with serving(runtime, store=store) as live:
        client = live.client(timeout=120)
        file = upload(client, jsonl(chats))
        extra = {"lora": {"r": 8}, "training": {"max_steps": 12, "learning_rate": 2e-3, "batch_size": 2}}
        job = wait_for(live, create(client, file, "smollm2-135m", extra).id, "succeeded", seconds=120)
        said = client.chat.completions.create(model=job["fine_tuned_model"], **ask).choices[0].message.content
        assert said is not None and said.startswith("Zebra")
        assert "Zebra" not in str(
            client.chat.completions.create(model="smollm2-135m", **ask).choices[0].message.content
        )
