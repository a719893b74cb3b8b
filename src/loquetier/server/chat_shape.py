"""Chat answers as OpenAI's objects: whole, and chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loquetier.engine.request import TokenEvent
from loquetier.generation import Answer, Completion
from loquetier.server.logprobs import chat_logprob
from loquetier.server.orders import Order
from loquetier.server.text import TextDesk


@dataclass(slots=True)
class ChatShape:
    """One chat request's answer."""

    order: Order
    text: TextDesk
    created: int
    label: str
    """The version that answers."""
    prompt: Sequence[int]
    _begun: set[int] = field(default_factory=set)
    _is_first_chunk: bool = True

    @property
    def prompt_tokens(self) -> int:
        """For the usage."""
        return len(self.prompt)

    def shown_tokens(self, generated: int) -> int:
        """Completion tokens of the usage."""
        return generated

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The ``chat.completion`` without its usage."""
        answers = completions[0].answers
        found = self._frame("chat.completion")
        found["choices"] = [self._choice(index, answer) for index, answer in enumerate(answers)]
        if self.order.return_token_ids:
            found["prompt_token_ids"] = list(self.prompt)
        return found

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        logprobs = None
        if self.order.params.logprobs is not None:
            rows = zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True)
            logprobs = {"content": [chat_logprob(self.text, *row) for row in rows], "refusal": None}
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self.order.return_token_ids:
            choice["token_ids"] = list(answer.token_ids)
        return choice

    def chunks(self, prompt_index: int, event: TokenEvent) -> Iterator[dict[str, Any]]:
        """The ``chat.completion.chunk`` objects of one event, without usage."""
        del prompt_index
        if event.index not in self._begun:
            self._begun.add(event.index)
            yield self._chunk(event.index, {"role": "assistant", "content": ""})
        logprobs = None
        if event.logprob is not None and event.token_id is not None:
            entry = chat_logprob(self.text, event.token_id, event.logprob, event.top_logprobs or {})
            logprobs = {"content": [entry], "refusal": None}
        ids = [event.token_id] if self.order.return_token_ids and event.token_id is not None else None
        if event.text or logprobs or ids:
            yield self._chunk(event.index, {"content": event.text}, logprobs=logprobs, ids=ids)
        if event.finish_reason is not None:
            yield self._chunk(event.index, {}, reason=event.finish_reason, stop_reason=event.stop_reason)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        ids: list[int] | None = None,
        reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if reason is not None:
            choice["stop_reason"] = stop_reason
        if ids is not None:
            choice["token_ids"] = ids
        found = self.empty_chunk()
        found["choices"] = [choice]
        if self._is_first_chunk and self.order.return_token_ids:
            found["prompt_token_ids"] = list(self.prompt)
        self._is_first_chunk = False
        return found

    def empty_chunk(self) -> dict[str, Any]:
        """A chunk without choices, as the last one, which carries the usage."""
        return self._frame("chat.completion.chunk")

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.order.request_id,
            "object": kind,
            "created": self.created,
            "model": self.order.model,
            "choices": [],
            "model_version": self.label,
        }
