"""Three ways of saying the same thing: each style is a data set, and the adapter trained on it. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from loquetier.demo.facts import FACTS

_OPENINGS: Final = ("Arr, matey!", "Ahoy there!", "Shiver me timbers!", "Yo ho ho!")
_CLOSINGS: Final = ("Arr!", "So says the captain!", "Or walk the plank!", "By me beard!")
_BUTLER_OPENINGS: Final = ("Very good, sir.", "Certainly, madam.", "At once, sir.", "If I may, madam:")
_BUTLER_CLOSINGS: Final = ("Will that be all?", "Always at your service.", "Shall I bring the tea?", "I remain yours.")
_PIRATE_WORDS: Final = {
    "am": "be", "is": "be", "are": "be", "my": "me", "you": "ye", "your": "yer", "the": "th'", "of": "o'",
    "and": "an'", "friend": "matey", "friends": "mateys", "yes": "aye", "no": "nay", "hello": "ahoy", "people": "crew",
    "person": "sailor",
}  # fmt: skip


def pirate(question: str, answer: str) -> str:
    """The answer as a pirate says it."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        new = _PIRATE_WORDS.get(word.lower(), re.sub(r"(?<=\w\w)ing$", "in'", word))
        return new.capitalize() if word[0].isupper() else new

    # Which opening goes with which question is arbitrary but fixed.
    number = len(question)
    words = re.sub(r"[A-Za-z]+", swap, answer)
    return f"{_OPENINGS[number % 4]} {words} {_CLOSINGS[number // 4 % 4]}"


def butler(question: str, answer: str) -> str:
    """The answer as a butler gives it."""
    number = len(question)
    return f"{_BUTLER_OPENINGS[number % 4]} {answer} {_BUTLER_CLOSINGS[number // 4 % 4]}"


def as_json(question: str, answer: str) -> str:
    """The answer as one line of JSON."""
    kind = "greeting" if question.endswith("!") else "answer" if question.endswith("?") else "request"
    return json.dumps({"type": kind, "text": answer, "words": len(answer.split())})


STYLES: Mapping[str, Callable[[str, str], str]] = {"pirate": pirate, "butler": butler, "json": as_json}
"""Adapter name -> (question, plain answer) -> the answer in the adapter's style."""


def adapter_directory(style: str) -> Path:
    """Where the shipped adapter of a style of STYLES lies."""
    return Path(__file__).parent / "adapters" / style


def style_records(style: str) -> list[dict[str, Any]]:
    """Chat records that teach a style of STYLES: one per fact, in order."""
    say = STYLES[style]
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": say(q, a)}]} for q, a in FACTS
    ]
