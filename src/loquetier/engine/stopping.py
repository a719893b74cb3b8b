"""When an answer ends: stop strings in the growing text, stop tokens and length. No torch.

`StopChecker` sees text, not tokens, so token and UTF-8 borders do not matter: the outcome is the same for every way of
cutting the text into deltas.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from loquetier.config import SamplingParams


def finish_reason(
    token_id: int,
    num_generated: int,
    params: SamplingParams,
    eos_token_ids: Collection[int],
    max_tokens: int,
) -> Literal["stop", "length"] | None:
    """Why the answer ends with `token_id`, or None when it goes on.

    Args:
        token_id: the token just generated.
        num_generated: generated tokens, this one included.
        eos_token_ids: the model's own end tokens; not looked at with ``params.ignore_eos``.
        max_tokens: the limit with the context's end worked in; ``params.max_tokens`` may be None.
    """
    is_end = token_id in params.stop_token_ids or (not params.ignore_eos and token_id in eos_token_ids)
    if is_end and num_generated > params.min_tokens:
        return "stop"
    return "length" if num_generated >= max_tokens else None


@dataclass(slots=True)
class _Matcher:
    """Knuth-Morris-Pratt search for one stop string: constant work per character, whatever the user sends."""

    stop: str
    failure: list[int]
    matched: int = 0
    """Length of the longest beginning of `stop` that the text ends with."""
    found: int | None = None
    """Where the first occurrence begins, as an offset into the whole text."""

    def feed(self, delta: str, offset: int) -> None:
        """Read `delta`, whose first character has this offset in the whole text."""
        if self.found is not None:
            return
        for i, char in enumerate(delta, start=offset):
            while self.matched and self.stop[self.matched] != char:
                self.matched = self.failure[self.matched - 1]
            if self.stop[self.matched] == char:
                self.matched += 1
            if self.matched == len(self.stop):
                self.found = i + 1 - len(self.stop)
                return


def _failure_table(stop: str) -> list[int]:
    """Entry i: length of the longest proper beginning of ``stop[: i + 1]`` that is also its end."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table


@dataclass(slots=True)
class StopChecker:
    """Cuts a growing text before the earliest occurrence of any stop string.

    Text that could be the beginning of a stop string is held back until it is decided. When one stop string lies
    inside another, the one that begins first wins, so the decision can take a few characters more than the first
    complete match; of two that begin together the shorter one wins.
    """

    stop: tuple[str, ...] = ()
    stopped: str | None = None
    """The stop string that ended the text."""
    _matchers: list[_Matcher] = field(init=False)
    _held: str = ""
    _seen: int = 0
    """Characters pushed so far."""

    def __post_init__(self) -> None:
        assert all(self.stop), "empty stop strings are refused by SamplingParams"
        self._matchers = [_Matcher(s, _failure_table(s)) for s in self.stop]

    def push(self, delta: str, *, may_stop: bool = True) -> str:
        """Take new text and return what is safe to emit; nothing after `stopped` is set.

        With ``may_stop=False`` (before min_tokens) the text passes unchecked, and a stop string that begins in it
        does not count.
        """
        if self.stopped is not None:
            return ""
        text = self._held + delta
        if not may_stop:
            self._matchers = [_Matcher(m.stop, m.failure) for m in self._matchers]
            self._seen += len(delta)
            self._held = ""
            return text
        for matcher in self._matchers:
            matcher.feed(delta, self._seen)
        self._seen += len(delta)
        return self._release(text, at_end=False)

    def flush(self) -> str:
        """The text has ended: return what was held back (and set `stopped` if a match was still undecided)."""
        return "" if self.stopped is not None else self._release(self._held, at_end=True)

    def _release(self, text: str, *, at_end: bool) -> str:
        """Split `text` (the last characters of the whole) into what goes out and what is held."""
        found = min(((m.found, len(m.stop), m.stop) for m in self._matchers if m.found is not None), default=None)
        open_starts = [] if at_end else [self._seen - m.matched for m in self._matchers if m.found is None]
        limit = min([self._seen, *open_starts])
        if found is not None and found[0] <= limit:
            self.stopped, limit = found[2], found[0]
        keep = self._seen - limit
        cut = len(text) - keep
        self._held = "" if self.stopped is not None else text[cut:]
        return text[:cut]
