"""Body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from loquetier.server.schemas.common import SamplingFields


class ChatRequest(SamplingFields):
    """OpenAI's chat request."""

    messages: list[Any]
    """Checked one by one in `conversation`."""
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
