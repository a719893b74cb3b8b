"""Chat messages in the one form that templates take: checked, without "weight", contents as strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from loquetier.errors import DataError, LoquetierError

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = frozenset({"role", "content", "weight", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking"})
_REQUIRED = frozenset({"role", "content", "weight"})
"""A null of any other key means that it is absent: SDKs and table files write one for each optional key."""


@dataclass(frozen=True)
class Chat:
    """A conversation, and which of its messages are labels."""

    messages: tuple[dict[str, Any], ...]
    learn: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] | None = None

    @property
    def has_tool_calls(self) -> bool:
        """Whether an assistant message calls a tool."""
        return any("tool_calls" in message for message in self.messages)


@dataclass(frozen=True)
class Place:
    """Where we are in the data, for error messages; numbers are 1-based."""

    example: int
    message: int = 0
    key: str = "messages"

    def error(self, text: str) -> DataError:
        """A DataError that begins with this place."""
        if not self.message:
            return DataError(f"Example {self.example}: {text}")
        inside = "" if self.key == "messages" else f" of {self.key!r}"
        return DataError(f"Example {self.example}, message {self.message}{inside}: {text}")


class Where(Protocol):
    """A place in what a user gave, which knows how to say so."""

    def error(self, text: str) -> LoquetierError:
        """The error to raise for `text`."""


def read_messages(value: Any, number: int, key: str = "messages") -> tuple[list[dict[str, Any]], list[bool]]:
    """Check OpenAI-style messages.

    Returns:
        The messages as a template takes them, and for each whether it is an assistant message of weight 1.

    Raises:
        DataError: with the example's and the message's number.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise Place(number).error(f"{key!r} must be a non-empty list of messages, not {_describe(value)}")
    messages, learn, extra = [], [], False
    for count, message in enumerate(value, 1):
        at = Place(number, count, key)
        messages.append(read_message(message, at))
        weight = _read_weight(message, at)
        is_answer = message["role"] == "assistant"
        extra |= "weight" in message and not is_answer
        learn.append(is_answer and weight == 1)
    # Where nothing is learnt at all, `check_learnable` says the more useful thing.
    if extra and any(learn):
        raise DataError(f'Example {number} contains an extra "weight": only assistant messages may have one')
    return messages, learn


def check_learnable(messages: list[dict[str, Any]], learn: list[bool], number: int) -> None:
    """Refuse a conversation in which nothing is a label."""
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(f"Example {number} has no assistant message, so 0 tokens are kept; at least 2 are needed")
    if not any(learn):
        raise DataError(f"Example {number} has no token to learn: every assistant message has weight 0")


def read_tools(value: Any, number: int) -> tuple[dict[str, Any], ...] | None:
    """The tools that the template shows; a JSON text of the list is read too, as tables hold it."""
    if value is None or value in ("", [], ()):
        return None
    if isinstance(value, str):
        value = parse_json(value, "'tools'", Place(number))
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise Place(number).error(f"'tools' must be a list of dictionaries, not {_describe(value)}")
    return tuple(dict(tool) for tool in value)


def tool_call(value: Any, at: Where) -> dict[str, Any]:
    """One call ``{"name", "arguments"}`` in the form of templates: arguments are a dictionary, not its JSON text."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise at.error("a tool call needs a function with a 'name'")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"arguments of tool call {value['name']!r}", at)
    if not isinstance(arguments, Mapping):
        raise at.error(
            f"arguments of tool call {value['name']!r} must be a JSON dictionary, not {_describe(arguments)}"
        )
    return {"type": "function", "function": {"name": value["name"], "arguments": dict(arguments)}}


def parse_json(text: str, what: str, at: Where) -> Any:
    """The value of a JSON text inside a record."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise at.error(f"{what} is not valid JSON: {error}") from error


def read_message(message: Any, at: Where) -> dict[str, Any]:
    """One message in the form of templates. Raises what ``at.error`` makes."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise at.error(f"'role' is missing or not a string; a message is a dictionary with one of {list(ROLES)}")
    if message["role"] not in ROLES:
        raise at.error(f"'role' is {message['role']!r}; it must be one of {list(ROLES)}")
    given = {k: v for k, v in message.items() if v is not None or k in _REQUIRED}
    if unknown := sorted(str(key) for key in given.keys() - _KEYS):
        hint = "; use 'tool_calls'" if "function_call" in unknown else ""
        raise at.error(f"unknown keys {unknown}; a message may have {sorted(_KEYS)}{hint}")
    calls = _read_calls(given, at)
    clean = {k: v for k, v in given.items() if k not in ("weight", "tool_calls", "content")}
    for key, value in clean.items():
        if not isinstance(value, str):
            raise at.error(f"{key!r} must be a string, not {type(value).__name__}")
    if calls:
        clean["tool_calls"] = calls
    clean["content"] = _read_content(given.get("content"), bool(calls), at)
    return clean


def _read_content(content: Any, has_calls: bool, at: Where) -> str:
    if isinstance(content, str):
        return content
    if content is None and has_calls:
        return ""
    if content is None:
        raise at.error("'content' is missing or null, which only an assistant message with 'tool_calls' may have")
    if not isinstance(content, (list, tuple)):
        raise at.error(f"'content' must be a string or a list of text parts, not {_describe(content)}")
    texts = []
    for count, part in enumerate(content, 1):
        if not isinstance(part, Mapping):
            raise at.error(f"'content' part {count} must be a dictionary, not {_describe(part)}")
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise at.error(
                f"'content' part {count} has type {part.get('type')!r}; only text parts "
                '{"type": "text", "text": "..."} are supported (no images, audio or files)'
            )
        texts.append(part["text"])
    return "".join(texts)


def _read_calls(message: Mapping[str, Any], at: Where) -> list[dict[str, Any]]:
    calls = message.get("tool_calls", [])
    if not isinstance(calls, (list, tuple)):
        raise at.error(f"'tool_calls' must be a list, not {_describe(calls)}")
    if calls and message["role"] != "assistant":
        raise at.error(f"'tool_calls' in a message of role {message['role']!r}; only assistant messages call tools")
    read = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        # The id, if any, is what a tool's answer refers to: some templates show it.
        named = {"id": call["id"]} if isinstance(call, Mapping) and isinstance(call.get("id"), str) else {}
        read.append({**named, **tool_call(function, at)})
    return read


def _read_weight(message: Mapping[str, Any], at: Where) -> int:
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise at.error(f"weight={weight!r} must be 0 or 1")
    return int(weight)


def _describe(value: Any) -> str:
    return (
        f"an empty {type(value).__name__}" if isinstance(value, (list, tuple)) and not value else type(value).__name__
    )
