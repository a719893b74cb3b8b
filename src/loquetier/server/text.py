"""Text to tokens and back, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from loquetier.engine.detokenize import IncrementalDetokenizer, token_bytes
from loquetier.errors import ConfigError
from loquetier.server.problems import ApiError, bad
from loquetier.training.chat import render_chat, tokenize

T = TypeVar("T")


class TextDesk:
    """The tokenizer, on threads of its own: a large prompt takes seconds, and the event loop must not wait.

    Args:
        tokenizer: of the base; None = only token ids are served.
        max_context: longer prompts are refused, by their number of characters before they are tokenized.
    """

    def __init__(self, tokenizer: Any, base_name: str, max_context: int) -> None:
        self.tokenizer = tokenizer
        self._base_name = base_name
        self._max_context = max_context
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1) if tokenizer is not None else 1
        self._max_chars = max_context * longest
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="loquetier-text")

    def close(self) -> None:
        """End the threads once what is queued is done."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises ApiError: too long, no tokenizer, not Unicode."""
        self._check(len(text), "prompt")
        return await self._run(lambda: tokenize(self.tokenizer, text, add_special_tokens=add_special_tokens), "prompt")

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, through the model's own template. Raises ApiError."""
        rest = [tools, [m.get("tool_calls") for m in messages]]
        self._check(sum(len(m["content"]) for m in messages) + len(msgspec.json.encode(rest)), "messages")
        if self.tokenizer.chat_template is None:
            raise bad(f"base {self._base_name!r} has no chat template; use /v1/completions", "messages")
        return await self._run(
            lambda: render_chat(self.tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools),
            "messages",
        )

    async def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids. Raises ApiError: no tokenizer."""
        self._check(0, "tokens")

        def work() -> str:
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

        return await self._run(work, "tokens")

    async def offsets(self, tokens: Sequence[int], skip_special_tokens: bool) -> list[int]:
        """Where each token begins in the text of all of them."""
        if self.tokenizer is None:
            return [0] * len(tokens)
        return await self._run(lambda: text_offsets(self.tokenizer, tokens, skip_special_tokens), "prompt")

    def piece(self, token_id: int) -> str:
        """One token as text; bytes that are no UTF-8 on their own as ``bytes:\\xe2\\x82``, as OpenAI shows them."""
        if self.tokenizer is None:
            return f"token_id:{token_id}"
        raw = token_bytes(self.tokenizer, token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def raw(self, token_id: int) -> bytes:
        """One token's bytes."""
        return b"" if self.tokenizer is None else token_bytes(self.tokenizer, token_id)

    def _check(self, num_chars: int, param: str) -> None:
        if self.tokenizer is None:
            raise bad(f"base {self._base_name!r} has no tokenizer; give token ids", param)
        if num_chars > self._max_chars:
            raise bad(
                f"the {param} has {num_chars} characters, more than any {self._max_context} tokens (the model's "
                "context) can have",
                param,
                "context_length_exceeded",
            )

    async def _run(self, work: Callable[[], T], param: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except ConfigError as error:
            raise ApiError(400, str(error), code=error.code, param=param) from error


def text_offsets(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool) -> list[int]:
    """Characters of the text before each token; a token inside a character begins where the character does."""
    detokenizer = IncrementalDetokenizer(tokenizer, (), skip_special_tokens)
    found: list[int] = []
    length = 0
    for token in tokens:
        found.append(length)
        length += len(detokenizer.push(token))
    return found
