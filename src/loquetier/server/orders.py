"""From a validated body to a frozen, bounded order for the engine. The engine never sees raw JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loquetier.config import SamplingParams
from loquetier.engine.sampler import TokenConstraint
from loquetier.errors import ConfigError
from loquetier.server.problems import bad, unsupported
from loquetier.server.schemas.chat import ChatRequest
from loquetier.server.schemas.common import REFUSED, SamplingFields
from loquetier.server.schemas.completions import CompletionRequest
from loquetier.server.settings import ServerSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Streaming:
    """How a stream is told."""

    usage: bool = False
    """A last chunk with the usage."""
    continuous: bool = False
    """The usage so far on every chunk (vLLM)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One request, ready to be queued but for its prompts' tokens."""

    request_id: str
    model: str
    params: SamplingParams
    priority: int = 0
    streaming: Streaming | None = None
    """None: one answer at the end."""
    return_token_ids: bool = False
    cache_salt: str | None = None
    """Only requests with the same one share KV pages, besides having the same owner."""
    constrain: Callable[[], TokenConstraint] | None = None
    """Makes what limits the tokens of one choice, where a structure is asked for."""


def refuse_unsupported(body: Any) -> None:
    """400 for the first known field of `body` that asks for something we do not do."""
    for name, value in (body.model_extra or {}).items():
        if name in REFUSED and not any(type(value) is type(v) and value == v for v in REFUSED[name]):
            raise unsupported(name)


def streaming_of(body: SamplingFields) -> Streaming | None:
    """What kind of answer is wanted. Raises ApiError: stream_options without stream."""
    if not body.stream:
        if body.stream_options is not None:
            raise bad("'stream_options' is only allowed with 'stream': true", "stream_options")
        return None
    options = body.stream_options
    usage = options is not None and options.include_usage
    return Streaming(usage=usage, continuous=usage and options is not None and options.continuous_usage_stats)


def chat_params(body: ChatRequest, vocab_size: int) -> SamplingParams:
    """Sampling options of a chat request. Raises ApiError."""
    if body.top_logprobs and not body.logprobs:
        raise bad("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    if body.max_completion_tokens is None and body.max_tokens == 0:
        raise bad("max_tokens must be at least 1", "max_tokens")
    limit = body.max_completion_tokens or body.max_tokens
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return _params(body, vocab_size, limit, name, (body.top_logprobs or 0) if body.logprobs else None, None)


def completion_params(body: CompletionRequest, vocab_size: int) -> SamplingParams:
    """Sampling options of a completion request; max_tokens 0 becomes 1, whose token is not shown. Raises ApiError."""
    if body.suffix:
        raise unsupported("suffix", ": the models here complete text, they do not fill in")
    n = body.n or 1
    if body.best_of is not None:
        if body.best_of < n:
            raise bad(f"best_of ({body.best_of}) must be at least n ({n})", "best_of")
        if body.best_of > n:
            raise unsupported("best_of", " above n: ask for n answers with logprobs and choose")
        if body.stream:
            raise bad("'best_of' cannot be combined with 'stream'", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise bad("max_tokens 0 is only allowed with 'echo': true", "max_tokens")
    limit = 16 if body.max_tokens is None else body.max_tokens
    echoed = body.logprobs if body.echo else None
    if limit == 0 and body.min_tokens:
        raise bad("min_tokens must not be above max_tokens (0)", "min_tokens")
    return _params(body, vocab_size, max(1, limit), "max_tokens", body.logprobs, echoed)


def _params(
    body: SamplingFields,
    vocab_size: int,
    max_tokens: int | None,
    max_name: str,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise bad(f"min_tokens ({min_tokens}) must not be above {max_name} ({max_tokens})", "min_tokens")
    for token in body.stop_token_ids or ():
        if token >= vocab_size:
            raise bad(f"stop_token_ids: {token} is not in [0, {vocab_size})", "stop_token_ids")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=_or(body.temperature, 1.0),
            top_k=_or(body.top_k, 0),
            top_p=_or(body.top_p, 1.0),
            min_p=_or(body.min_p, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            logit_bias=_bias(body.logit_bias or {}, vocab_size),
            stop=stop,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            n=body.n or 1,
            seed=body.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=_or(body.skip_special_tokens, True),
        )
    except ConfigError as error:  # bounds that the schema does not know
        raise bad(str(error)) from error


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise bad(f"logit_bias: {key[:40]!r} is not a token id in [0, {vocab_size})", "logit_bias")
        found[int(key)] = value
    return found


def check_size(num_prompts: int, n: int, settings: ServerSettings) -> None:
    """Bounds before anything is built per answer. Raises ApiError."""
    if num_prompts > settings.max_prompts:
        raise bad(f"{num_prompts} prompts; one request may have {settings.max_prompts}", "prompt")
    if num_prompts * n > settings.max_choices:
        raise bad(f"{num_prompts} prompts times n={n}: one request may have {settings.max_choices} answers", "n")
