"""What a caller holds while an answer is being made: a stream of events, and the finished answer."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from loquetier.engine.request import FinishReason, TokenEvent
from loquetier.errors import LoquetierError


@dataclass(slots=True)
class Answer:
    """One choice of a request."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, the one that ended the answer included."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it, if one did."""
    logprobs: list[float] = field(default_factory=list)
    """Per token, if asked for; under the model's raw logits."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request."""

    model: str
    """The version that answered, ``name@number``, or the base's name."""
    prompt_token_ids: tuple[int, ...]
    answers: tuple[Answer, ...]
    """In order of choice; n of them."""
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
    cached_tokens: int = 0
    """Prompt tokens that the first answer found in the prefix cache."""

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first answer's tokens."""
        return self.answers[0].token_ids

    @property
    def num_generated(self) -> int:
        """Tokens generated over all answers."""
        return sum(len(a.token_ids) for a in self.answers)


class Collector:
    """Builds the `Completion` out of events."""

    def __init__(self, model: str, prompt: list[int], n: int) -> None:
        self._model, self._prompt = model, tuple(prompt)
        self._answers = [Answer() for _ in range(n)]
        self._prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
        self._cached_tokens = 0
        self.num_open = n

    def add(self, event: TokenEvent) -> None:
        """Take one event in.

        Raises:
            LoquetierError: the event says that the request failed.
        """
        if event.error is not None:
            raise event.error
        answer = self._answers[event.index]
        answer.text += event.text
        if event.token_id is not None:
            answer.token_ids.append(event.token_id)
        if event.logprob is not None:
            answer.logprobs.append(event.logprob)
            answer.top_logprobs.append(event.top_logprobs or {})
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = event.prompt_logprobs
        if event.index == 0:
            self._cached_tokens += event.cached_tokens
        if event.finish_reason is not None:
            answer.finish_reason, answer.stop_reason = event.finish_reason, event.stop_reason
            self.num_open -= 1

    def completion(self) -> Completion:
        """The answer, once `num_open` is 0."""
        return Completion(self._model, self._prompt, tuple(self._answers), self._prompt_logprobs, self._cached_tokens)


class GenerationHandle:
    """A request under way. Iterate it for events as they come, or ask for the `result`."""

    def __init__(
        self,
        model: str,
        prompt: list[int],
        n: int,
        events: queue.SimpleQueue[TokenEvent],
        abort: Callable[[], None],
    ) -> None:
        self.model = model
        """The version that answers."""
        self.events = events
        self._collector = Collector(model, prompt, n)
        self._abort = abort
        self._error: LoquetierError | None = None

    def __iter__(self) -> Iterator[TokenEvent]:
        """Events in order until every choice is finished. Leaving the loop early aborts the request.

        Raises:
            LoquetierError: the request failed.
        """
        if self._error is not None:
            raise self._error
        try:
            while self._collector.num_open:
                event = self.events.get()
                self._error = event.error
                self._collector.add(event)
                yield event
        finally:
            if self._collector.num_open:
                self.abort()

    def __del__(self) -> None:
        """Nobody can read the answer any more: do not go on computing it."""
        if self._collector.num_open and self._error is None:
            self._abort()

    def result(self) -> Completion:
        """Wait for the end and return the whole answer.

        Raises:
            LoquetierError: the request failed.
        """
        for _ in self:
            pass
        return self._collector.completion()

    def abort(self) -> None:
        """End the request before the next step; its choices finish with reason "abort"."""
        self._abort()
