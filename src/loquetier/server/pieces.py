"""How a stream's tokens become pieces: when the next one is due, and what goes into it together. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from loquetier.engine.request import TokenEvent

FEW_STREAMS = 4
SECONDS_PER_STREAM = 0.005
"""All streams together make 200 pieces a second then. On a CPU a piece costs the server 0.15 ms, and a client that
runs beside it 0.3 ms (the openai SDK), which the step's threads lack."""
LONGEST_INTERVAL = 0.1
"""Text that grows ten times a second still reads as flowing."""
WHOLE_INTERVAL = 0.25
"""Answers that are not streamed: nobody sees their tokens before the last one."""

Event = tuple[int, TokenEvent]
"""The prompt's index and what happened to one of its choices."""


def stream_interval(setting: float | None, num_streams: int) -> float:
    """Seconds between two pieces of a stream while `num_streams` requests are being answered; 0 = each token at once.

    Args:
        setting: what the operator wants; None = by the number of streams.
    """
    if setting is not None:
        return setting
    return min(LONGEST_INTERVAL, num_streams * SECONDS_PER_STREAM) if num_streams > FEW_STREAMS else 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """What a client is told at once of one choice."""

    prompt: int
    event: TokenEvent
    num_tokens: int
    """Generated tokens that it stands for."""


def joined(events: Iterable[Event]) -> list[Part]:
    """Events of one piece with the text of each choice together; those with log-probabilities stay apart."""
    found: list[Part] = []
    last: dict[tuple[int, int], int] = {}
    for part in apart(events):
        key = (part.prompt, part.event.index)
        at = last.get(key)
        if at is not None and _is_text(part.event) and _is_text(found[at].event):
            both = replace(part.event, text=found[at].event.text + part.event.text)
            found[at] = Part(part.prompt, both, found[at].num_tokens + part.num_tokens)
            continue
        last[key] = len(found)
        found.append(part)
    return found


def apart(events: Iterable[Event]) -> list[Part]:
    """Each event on its own, for clients who want to see every token."""
    return [Part(prompt, event, int(event.token_id is not None)) for prompt, event in events]


def _is_text(event: TokenEvent) -> bool:
    return event.logprob is None and event.prompt_logprobs is None and event.error is None
