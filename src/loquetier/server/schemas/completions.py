"""Body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from loquetier.server.schemas.common import SamplingFields


class CompletionRequest(SamplingFields):
    """OpenAI's completion request."""

    prompt: Any
    """A string, a list of strings, a list of token ids, or a list of such lists; checked in `orders`."""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None
