"""Structured output: what a request asks for, compiled by llguidance within limits, as a constraint on its tokens."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from loquetier.engine.sampler import TokenConstraint
from loquetier.server.problems import ApiError, bad, overloaded, unsupported
from loquetier.server.schemas.common import SamplingFields

log = structlog.get_logger("loquetier.server.grammar")

MAX_SCHEMA_CHARS = 128 * 1024
MAX_TEXT_CHARS = 16 * 1024
"""Of a regex or a Lark grammar."""
MAX_CHOICES = 512
MAX_QUEUED = 16
COMPILE_SECONDS = 2.0
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write each value: a model that may write spaces may write them for ever."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One structure, and the field that asked for it."""

    kind: str
    """json, regex, choice or grammar."""
    value: Any
    field: str


@dataclass(slots=True, eq=False)
class GrammarConstraint:
    """One choice's place in a grammar."""

    matcher: LLMatcher
    vocab_size: int

    def allowed_V(self) -> npt.NDArray[np.bool_]:
        """See `TokenConstraint`; nothing is allowed once llguidance has run into a limit."""
        if self.matcher.is_error():
            log.warning("grammar_failed", reason=self.matcher.get_error()[:300])
            return np.zeros(self.vocab_size, dtype=np.bool_)
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self.vocab_size].astype(np.bool_)

    def observe(self, token_id: int) -> None:
        """See `TokenConstraint`."""
        self.matcher.consume_token(token_id)


class GrammarDesk:
    """Compiles grammars on one thread of its own; nothing is kept between requests, so nothing can fill up.

    Args:
        tokenizer: of the base; None = no structured output.
        eos_token_ids: the model's end tokens, which end a complete value.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_token_ids)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loquetier-grammar")
        self._queued = 0
        self._tokens: LLTokenizer | None = None
        """llguidance's view of the tokenizer; made when first needed, on the thread."""

    def close(self) -> None:
        """End the thread once what runs is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def constraint(self, body: SamplingFields) -> Callable[[], TokenConstraint] | None:
        """What limits the tokens of each choice of `body`, or None.

        Raises:
            ApiError: 400 what cannot be compiled within the limits, 503 too many at once.
        """
        wanted = wanted_of(body)
        if wanted is None:
            return None
        if self._tokenizer is None or not getattr(self._tokenizer, "is_fast", False) or not self._eos:
            raise unsupported(wanted.field, ": this base has no fast tokenizer with an end token")
        for name in ("min_tokens", "ignore_eos"):
            if getattr(body, name):
                raise bad(f"{name!r} contradicts {wanted.field!r}: the structure decides where it ends", name)
        grammar = grammar_of(wanted)
        matcher = await self._compile(grammar, wanted.field)
        return lambda: GrammarConstraint(matcher.deep_copy(), self._vocab_size)

    async def _compile(self, grammar: str, field: str) -> LLMatcher:
        if self._queued >= MAX_QUEUED:
            raise overloaded("too many structures are being compiled", COMPILE_SECONDS)
        future = self._thread.submit(self._matcher, grammar)
        self._queued += 1
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._done))
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                matcher = await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            future.cancel()
            raise bad(f"{field}: not compiled within {COMPILE_SECONDS:g} s; make it simpler", field) from None
        except ValueError as error:  # llguidance on a schema that is no JSON object, say
            raise _invalid(field, str(error)) from error
        if matcher.is_error():
            raise _invalid(field, matcher.get_error())
        return matcher

    def _done(self) -> None:
        self._queued -= 1

    def _matcher(self, grammar: str) -> LLMatcher:
        if self._tokens is None:
            from llguidance.hf import from_tokenizer

            self._tokens = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos)
        return LLMatcher(self._tokens, grammar, log_level=0, limits=LLParserLimits())


def _invalid(field: str, text: str) -> ApiError:
    return bad(f"{field}: {' '.join(text.split())}"[:500], field, "invalid_value")


def wanted_of(body: SamplingFields) -> Wanted | None:
    """The one structure that a request asks for. Raises ApiError: two, or none of the known kinds."""
    found = [
        Wanted(kind, value, field)
        for kind, field in (("json", "guided_json"), ("regex", "guided_regex"), ("choice", "guided_choice"),
                            ("grammar", "guided_grammar"))
        if (value := getattr(body, field)) is not None
    ]  # fmt: skip
    for kind, value in (body.structured_outputs or {}).items():
        if kind not in ("json", "regex", "choice", "grammar"):
            raise unsupported(f"structured_outputs.{kind[:40]}")
        if value is not None:
            found.append(Wanted(kind, value, "structured_outputs"))
    found += _of_format(body.response_format)
    if len(found) > 1:
        raise bad(f"{found[0].field!r} and {found[1].field!r} cannot be combined", found[1].field)
    return found[0] if found else None


def _of_format(response_format: dict[str, Any] | None) -> list[Wanted]:
    field = "response_format"
    kind = None if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return []
    if kind == "json_object":
        return [Wanted("json", {"type": "object"}, field)]
    if kind != "json_schema":
        raise bad(f"response_format.type {str(kind)[:40]!r} must be text, json_object or json_schema", field)
    holder = response_format.get("json_schema")
    if not isinstance(holder, dict) or not isinstance(holder.get("schema"), dict):
        raise bad("response_format.json_schema must have a 'schema'", "response_format.json_schema")
    return [Wanted("json", holder["schema"], field)]


def grammar_of(wanted: Wanted) -> str:
    """llguidance's form of a structure. Raises ApiError: of the wrong type, or too large."""
    value, field = wanted.value, wanted.field
    if wanted.kind == "json":
        schema = _schema(value, field)
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_STYLE)  # type: ignore[arg-type]
    if wanted.kind == "choice":
        if (
            not isinstance(value, list)
            or not 1 <= len(value) <= MAX_CHOICES
            or not all(isinstance(v, str) and 1 <= len(v) <= 512 for v in value)
        ):
            raise bad(f"{field} must be 1 to {MAX_CHOICES} non-empty strings of at most 512 characters", field)
        return LLMatcher.grammar_from_regex("|".join(re.escape(v) for v in value))
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TEXT_CHARS:
        raise bad(f"{field} must be a string of 1 to {MAX_TEXT_CHARS} characters", field)
    if wanted.kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    return LLMatcher.grammar_from_lark(value)


def _schema(value: Any, field: str) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_SCHEMA_CHARS:
        raise bad(f"{field}: the schema has {len(text)} characters; the limit is {MAX_SCHEMA_CHARS}", field)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad(f"{field} is not JSON: {error}", field) from error
    if not isinstance(schema, dict):
        raise bad(f"{field} must be a JSON schema as an object", field)
    # Another style than ours, or what is none of JSON Schema's, must not come in by llguidance's own extension.
    schema.pop("x-guidance", None)
    return json.dumps(schema)
