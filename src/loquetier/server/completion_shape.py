"""Text completions as OpenAI's objects: whole, and chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loquetier.engine.detokenize import IncrementalDetokenizer
from loquetier.engine.request import TokenEvent
from loquetier.generation import Answer, Completion
from loquetier.server.logprobs import completion_logprobs, split_prompt
from loquetier.server.orders import Order
from loquetier.server.text import TextDesk, text_offsets


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt as it was given and as the model sees it."""

    tokens: tuple[int, ...]
    text: str
    """Shown by `echo`."""


@dataclass(slots=True)
class _Offsets:
    """Where the next token of a choice begins in its text."""

    detokenizer: IncrementalDetokenizer | None
    length: int

    def next(self, token: int) -> int:
        at = self.length
        if self.detokenizer is not None:
            self.length += len(self.detokenizer.push(token))
        return at


@dataclass(slots=True)
class CompletionShape:
    """One completion request's answer; choice ``i * n + j`` is answer j of prompt i."""

    order: Order
    text: TextDesk
    created: int
    label: str
    """The version that answers."""
    prompts: Sequence[PromptText]
    echo: bool
    hides_answer: bool
    """max_tokens was 0: the one token that had to be generated is not shown."""
    _begun: set[int] = field(default_factory=set)
    _offsets: dict[int, _Offsets] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """For the usage: each prompt once."""
        return sum(len(p.tokens) for p in self.prompts)

    def shown_tokens(self, generated: int) -> int:
        """Completion tokens of the usage."""
        return 0 if self.hides_answer else generated

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The ``text_completion`` without its usage."""
        found = self.empty_chunk()
        n = self.order.params.n
        found["choices"] = [
            self._choice(i * n + j, self.prompts[i], completion, answer)
            for i, completion in enumerate(completions)
            for j, answer in enumerate(completion.answers)
        ]
        return found

    def _choice(self, index: int, prompt: PromptText, completion: Completion, answer: Answer) -> dict[str, Any]:
        text = (prompt.text if self.echo else "") + ("" if self.hides_answer else answer.text)
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(prompt, completion, answer),
            "finish_reason": "length" if self.hides_answer else answer.finish_reason,
            "stop_reason": None if self.hides_answer else answer.stop_reason,
        }
        if self.order.return_token_ids:
            choice["token_ids"] = [] if self.hides_answer else list(answer.token_ids)
            choice["prompt_token_ids"] = list(prompt.tokens)
        return choice

    def _logprobs(self, prompt: PromptText, completion: Completion, answer: Answer) -> dict[str, Any] | None:
        if self.order.params.logprobs is None:
            return None
        tokens: list[int] = []
        chosen: list[float | None] = []
        top: list[Any] = []
        if self.echo and completion.prompt_logprobs is not None:
            tokens += prompt.tokens
            chosen, top = split_prompt(prompt.tokens, completion.prompt_logprobs)
        if not self.hides_answer:
            tokens += answer.token_ids
            chosen += answer.logprobs
            top += answer.top_logprobs
        offsets = self._text_offsets(prompt, tokens)
        return completion_logprobs(self.text, tokens, chosen, top, offsets)

    def _text_offsets(self, prompt: PromptText, tokens: Sequence[int]) -> list[int]:
        if self.text.tokenizer is None:
            return [0] * len(tokens)
        offsets = text_offsets(self.text.tokenizer, tokens, self.order.params.skip_special_tokens)
        return offsets if self.echo else [len(prompt.text) + at for at in offsets]

    def chunks(self, prompt_index: int, event: TokenEvent) -> Iterator[dict[str, Any]]:
        """The chunks of one event, without usage."""
        index = prompt_index * self.order.params.n + event.index
        prompt = self.prompts[prompt_index]
        is_first = index not in self._begun
        self._begun.add(index)
        text = "" if self.hides_answer else event.text
        if is_first and self.echo:
            text = prompt.text + text
        logprobs = self._event_logprobs(index, prompt, event, is_first)
        shows_ids = self.order.return_token_ids and event.token_id is not None and not self.hides_answer
        if not (text or logprobs or shows_ids or event.finish_reason is not None):
            return
        reason: str | None = "length" if self.hides_answer else event.finish_reason
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if reason is not None:
            choice["stop_reason"] = None if self.hides_answer else event.stop_reason
        if self.order.return_token_ids:
            choice["token_ids"] = [event.token_id] if shows_ids else []
            if is_first:
                choice["prompt_token_ids"] = list(prompt.tokens)
        found = self.empty_chunk()
        found["choices"] = [choice]
        yield found

    def _event_logprobs(
        self, index: int, prompt: PromptText, event: TokenEvent, is_first: bool
    ) -> dict[str, Any] | None:
        if event.logprob is None or event.token_id is None:
            return None
        tokens: list[int] = [event.token_id]
        chosen: list[float | None] = [event.logprob]
        top: list[dict[int, float] | None] = [event.top_logprobs]
        if self.hides_answer:
            tokens, chosen, top = [], [], []
        if is_first and self.echo and event.prompt_logprobs is not None:
            prompt_chosen, prompt_top = split_prompt(prompt.tokens, event.prompt_logprobs)
            tokens, chosen, top = [*prompt.tokens, *tokens], [*prompt_chosen, *chosen], [*prompt_top, *top]
        at = self._offset_counter(index, prompt)
        return completion_logprobs(self.text, tokens, chosen, top, [at.next(token) for token in tokens])

    def _offset_counter(self, index: int, prompt: PromptText) -> _Offsets:
        if index not in self._offsets:
            detokenizer = None
            if self.text.tokenizer is not None:
                detokenizer = IncrementalDetokenizer(self.text.tokenizer, (), self.order.params.skip_special_tokens)
            self._offsets[index] = _Offsets(detokenizer, 0 if self.echo else len(prompt.text))
        return self._offsets[index]

    def empty_chunk(self) -> dict[str, Any]:
        """An answer without choices; as the last chunk it carries the usage."""
        return {
            "id": self.order.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.order.model,
            "choices": [],
            "model_version": self.label,
        }
