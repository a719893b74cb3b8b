"""Chat messages of a request, checked and brought into the form that templates (and training) take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loquetier.server.problems import ApiError, bad, unsupported
from loquetier.server.schemas.chat import ChatRequest
from loquetier.training.messages import read_message

_EMPTY_IN_ECHOES = frozenset({"refusal", "annotations", "audio", "function_call", "reasoning", "reasoning_content"})
"""Keys of an answer's message that clients send back; empty ones say nothing."""


@dataclass(frozen=True, slots=True)
class At:
    """A message's place, for errors."""

    index: int

    def error(self, text: str) -> ApiError:
        """A 400 that names the message."""
        return bad(f"messages[{self.index}]: {text}"[:1000], f"messages[{self.index}]", "invalid_value")


def read_conversation(messages: list[Any], max_messages: int) -> list[dict[str, Any]]:
    """The messages as a template takes them. Raises ApiError that names the first bad one."""
    if not messages:
        raise bad("messages must hold at least one message", "messages", "invalid_value")
    if len(messages) > max_messages:
        raise bad(f"{len(messages)} messages; one request may have {max_messages}", "messages", "invalid_value")
    return [_read(message, At(index)) for index, message in enumerate(messages)]


def _read(message: Any, at: At) -> dict[str, Any]:
    if isinstance(message, dict):
        message = {k: v for k, v in message.items() if v not in (None, [], {}) or k not in _EMPTY_IN_ECHOES}
        if message.get("role") == "tool" and not message.get("tool_call_id"):
            raise at.error("a message of role 'tool' needs 'tool_call_id'")
    return read_message(message, at)


def tools_of(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the template shows. Raises ApiError: a choice that would need forced output."""
    if body.tool_choice not in (None, "auto", "none"):
        raise unsupported("tool_choice", " but as 'auto' or 'none'")
    if body.parallel_tool_calls is False and body.tools:
        raise unsupported("parallel_tool_calls", " as false")
    for index, tool in enumerate(body.tools or ()):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise bad(f"tools[{index}]: must be a function with a name", f"tools[{index}]", "invalid_value")
    return None if body.tool_choice == "none" else body.tools or None
