"""A request in the engine: what was asked, and each choice's growing answer. Engine thread only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from loquetier.adapters.registry import AdapterVersion
from loquetier.config import SamplingParams
from loquetier.engine.detokenize import IncrementalDetokenizer
from loquetier.engine.hold import Hold
from loquetier.engine.rows import Sequence
from loquetier.engine.sampler import SamplerState
from loquetier.engine.stopping import StopChecker, finish_reason
from loquetier.errors import LoquetierError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One choice has a new token. What the engine tells whoever asked; events of one choice come in order."""

    index: int
    """Which of the request's n choices."""
    token_id: int | None
    """None in an event that only ends the choice (abort, error)."""
    text: str
    """New text that is final; may be "" while a character or a stop string is undecided."""
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the text."""
    error: LoquetierError | None = None
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
    """On the first event, if asked for: per prompt token, None for the first one."""
    cached_tokens: int = 0
    """On the first event: prompt tokens whose K and V were in the prefix cache."""
    queue_seconds: float | None = None
    """On the first event: from the request's arrival to the step that computed its first rows."""


@dataclass(slots=True, eq=False)
class Choice:
    """One of a request's n answers in the making."""

    request: Request
    index: int
    seq: Sequence
    sampler: SamplerState
    detokenizer: IncrementalDetokenizer | None
    stop: StopChecker
    prompt_logprobs: dict[int, dict[int, float]] = field(default_factory=dict)
    """By prompt position; filled chunk by chunk."""
    is_first_event: bool = True
    arrived: float = field(default_factory=time.perf_counter)
    queue_seconds: float | None = None
    """From then to its first rows; None before."""
    error: LoquetierError | None = None
    """Set while a step runs, when this choice alone must end with it."""


@dataclass(slots=True, eq=False)
class Request:
    """One call of a client, running on one adapter version for all its life."""

    request_id: int
    hold: Hold
    """Of the version; the request waits until that is in the arena."""
    params: SamplingParams
    eos_token_ids: frozenset[int]
    sink: Callable[[TokenEvent], None]
    """Called on the engine thread; must not block."""
    choices: list[Choice] = field(default_factory=list)
    num_open: int = 0
    """Choices not finished yet."""

    @property
    def version(self) -> AdapterVersion:
        """What answers it."""
        return self.hold.version


def advance(choice: Choice, token_id: int, logprob: float | None, top: dict[int, float] | None) -> TokenEvent:
    """Take a sampled token into the answer: append it, grow the text, decide whether the choice ends."""
    seq, params = choice.seq, choice.request.params
    seq.tokens.append(token_id)
    choice.sampler.observe(token_id)
    max_tokens = seq.max_total_len - seq.prompt_len
    reason: FinishReason | None = finish_reason(
        token_id, seq.num_generated, params, choice.request.eos_token_ids, max_tokens
    )
    text = ""
    stop_reason: str | int | None = None
    if reason == "stop":
        stop_reason = token_id if token_id in params.stop_token_ids else None
    else:  # the token that ends the answer is not part of its text
        text = _grow(choice, token_id)
    if reason is not None and choice.stop.stopped is None:
        text += _flush(choice)
    if choice.stop.stopped is not None:
        reason, stop_reason = "stop", choice.stop.stopped
    prompt_logprobs, cached, waited = None, 0, None
    if choice.is_first_event:
        cached, waited = seq.num_cached or 0, choice.queue_seconds
        if seq.needs_prompt_logits:
            prompt_logprobs = (None, *(choice.prompt_logprobs[i] for i in range(1, seq.prompt_len)))
    choice.is_first_event = False
    return TokenEvent(
        choice.index,
        token_id,
        text,
        logprob,
        top,
        reason,
        stop_reason,
        prompt_logprobs=prompt_logprobs,
        cached_tokens=cached,
        queue_seconds=waited,
    )


def _grow(choice: Choice, token_id: int) -> str:
    if choice.detokenizer is None:
        return ""
    may_stop = choice.seq.num_generated > choice.request.params.min_tokens
    return choice.stop.push(choice.detokenizer.push(token_id), may_stop=may_stop)


def _flush(choice: Choice) -> str:
    if choice.detokenizer is None:
        return ""
    text = choice.stop.push(choice.detokenizer.flush())
    return text + choice.stop.flush()
