"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loquetier.server.text import TextDesk

PromptLogprobs = Sequence[Mapping[int, float] | None]


def completion_logprobs(
    text: TextDesk,
    tokens: Sequence[int],
    chosen: Sequence[float | None],
    top: Sequence[Mapping[int, float] | None],
    offsets: Sequence[int],
) -> dict[str, Any]:
    """``{tokens, token_logprobs, top_logprobs, text_offset}``; the first prompt token has null."""
    return {
        "tokens": [text.piece(t) for t in tokens],
        "token_logprobs": list(chosen),
        "top_logprobs": [
            None if own is None else _by_text(text, {token: own} | dict(others or {}))
            for token, own, others in zip(tokens, chosen, top, strict=True)
        ],
        "text_offset": list(offsets),
    }


def _by_text(text: TextDesk, logprobs: Mapping[int, float]) -> dict[str, float]:
    """Two tokens may have one text: the likelier one is shown."""
    found: dict[str, float] = {}
    for token, logprob in logprobs.items():
        piece = text.piece(token)
        found[piece] = max(logprob, found.get(piece, logprob))
    return found


def split_prompt(
    tokens: Sequence[int], rows: PromptLogprobs
) -> tuple[list[float | None], list[dict[int, float] | None]]:
    """The engine's rows (the actual token first) as chosen logprobs and alternatives."""
    chosen = [None if row is None else row[token] for token, row in zip(tokens, rows, strict=True)]
    return chosen, [None if row is None else dict(row) for row in rows]


def chat_logprob(text: TextDesk, token: int, logprob: float, top: Mapping[int, float]) -> dict[str, Any]:
    """One entry of ``logprobs.content``."""
    return _entry(text, token, logprob) | {"top_logprobs": [_entry(text, t, lp) for t, lp in top.items()]}


def _entry(text: TextDesk, token: int, logprob: float) -> dict[str, Any]:
    return {"token": text.piece(token), "logprob": logprob, "bytes": list(text.raw(token))}
