"""Which of the accepted formats a record is in, and its one internal form.

The format is told by a record's keys, the first that fits in the order of `FORMATS`; a data set has one format.
Keys that a format does not use are ignored in training and listed by `unused_keys`, so that `validate` can say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loquetier.errors import DataError
from loquetier.training.conversations import read_alpaca, read_sharegpt
from loquetier.training.example import IGNORE
from loquetier.training.messages import Chat, Place, check_learnable, read_messages, read_tools


@dataclass(frozen=True)
class Pair:
    """Plain text with TRL's meaning: loss on the completion and on the end token."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text: loss on all of it and on the end token."""

    text: str


@dataclass(frozen=True)
class TokenIds:
    """Tokens made elsewhere; labels are the token itself or -100, not shifted (Hugging Face's convention)."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


Form = Chat | Pair | Text | TokenIds


@dataclass(frozen=True)
class Format:
    """A way in which people write training records."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    read: Callable[[Mapping[str, Any], int], Form]


ACCEPTED = (
    "messages (OpenAI chat), conversations (ShareGPT), prompt and completion, instruction and output (alpaca), text, "
    "or input_ids and labels"
)


def detect(record: Any, number: int) -> Format:
    """The record's format; `number` is its 1-based number, for messages.

    Raises:
        DataError: not a dictionary, or no format has these keys; with what to do about common others.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"Example {number} is not a dictionary but {type(record).__name__}")
    for format_ in FORMATS:
        if format_.required <= record.keys():
            return format_
    keys = sorted(str(key) for key in record)
    raise DataError(f"Example {number} has keys {keys}; expected {ACCEPTED}{_hint(set(keys))}")


def normalize(record: Any, number: int) -> Form:
    """The record's internal form. Raises DataError, by example and message number."""
    format_ = detect(record, number)
    for key in sorted(record.keys() & _MEANINGFUL.keys() - format_.optional):
        if record[key] not in (None, "", []):
            raise Place(number).error(f"{key!r} is not supported in the {format_.name} format; {_MEANINGFUL[key]}")
    return format_.read(record, number)


def format_name(record: Any, number: int) -> str:
    """The format's name for people; prompt and completion as texts and as messages count as two."""
    name = detect(record, number).name
    is_chat = name == "prompt-completion" and not isinstance(record["prompt"], str)
    return "prompt-completion of messages" if is_chat else name


def unused_keys(record: Mapping[str, Any], number: int) -> tuple[str, ...]:
    """Keys that training does not look at, sorted."""
    format_ = detect(record, number)
    return tuple(sorted(str(key) for key in record.keys() - format_.required - format_.optional))


_MEANINGFUL = {
    "functions": "write them as 'tools'",
    "tools": "only chat messages can have tools",
    "images": "this is a text model",
    "image": "this is a text model",
    "videos": "this is a text model",
    "audio": "this is a text model",
    "chosen": "preference data cannot be trained on",
    "rejected": "preference data cannot be trained on",
}
"""Keys that change what a record means: training without them would teach something else."""


def _hint(keys: set[str]) -> str:
    if {"question", "answer"} <= keys:
        return " (rename 'question' to 'prompt' and 'answer' to 'completion')"
    if keys & {"chosen", "rejected", "preferred_output", "non_preferred_output"}:
        return " (preference data cannot be trained on)"
    if keys & {"data", "train", "examples", "records"} and len(keys) == 1:
        return " (write one record per line)"
    return ""


def _string(value: Any, key: str, number: int, otherwise: str = "") -> str:
    if not isinstance(value, str):
        raise DataError(f"Example {number}: {key!r} must be a string{otherwise}, not {type(value).__name__}")
    return value


def _read_chat(record: Mapping[str, Any], number: int) -> Chat:
    messages, learn = read_messages(record["messages"], number)
    check_learnable(messages, learn, number)
    return Chat(tuple(messages), tuple(learn), read_tools(record.get("tools"), number))


def _read_pair(record: Mapping[str, Any], number: int) -> Form:
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, (list, tuple)):
        prompt = _string(prompt, "prompt", number, " or a list of messages")
        return Pair(prompt, _string(completion, "completion", number, " like 'prompt'"))
    # Messages: as in TRL the prompt is context whoever wrote it. Of the completion the assistant's messages are
    # labels; TRL takes all of it, which differs only when a completion holds a user's or a tool's message.
    before, _ = read_messages(prompt, number, "prompt")
    after, learn = read_messages(completion, number, "completion")
    check_learnable(after, learn, number)
    tools = read_tools(record.get("tools"), number)
    return Chat((*before, *after), (*[False] * len(before), *learn), tools)


def _read_text(record: Mapping[str, Any], number: int) -> Text:
    return Text(_string(record["text"], "text", number))


def _read_ids(record: Mapping[str, Any], number: int) -> TokenIds:
    input_ids, labels = record["input_ids"], record["labels"]
    for key, ids in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(ids, (list, tuple)) or not all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
            raise DataError(f"Example {number}: {key!r} must be a list of integers")
    if negative := next((token for token in input_ids if token < 0), None):
        raise DataError(f"Example {number} has token id {negative}; 'input_ids' must not be negative")
    if len(input_ids) != len(labels):
        raise DataError(f"Example {number}: {len(input_ids)} input_ids but {len(labels)} labels")
    for at, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        if label not in (token, IGNORE):
            raise Place(number).error(
                f"label {label} at position {at} is neither the token there ({token}) nor {IGNORE}; "
                "labels are not shifted"
            )
    return TokenIds(tuple(input_ids), tuple(labels))


def _format(name: str, required: str, optional: str, read: Callable[[Mapping[str, Any], int], Form]) -> Format:
    return Format(name, frozenset(required.split()), frozenset(optional.split()), read)


FORMATS = (
    _format("OpenAI chat", "messages", "tools", _read_chat),
    _format("ShareGPT", "conversations", "system tools", read_sharegpt),
    _format("prompt-completion", "prompt completion", "tools", _read_pair),
    _format("alpaca", "instruction output", "input system history", read_alpaca),
    _format("text", "text", "", _read_text),
    _format("token ids", "input_ids labels", "attention_mask", _read_ids),
)
"""Richest first: public data sets often add a rendered `text`, or a bare `prompt`, to the conversation itself."""
