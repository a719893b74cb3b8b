"""Conversations in the two older shapes, ShareGPT and alpaca, made into chat messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loquetier.training.messages import Chat, Place, check_learnable, parse_json, read_messages, read_tools, tool_call

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "claude", "model"), "assistant"),
    "system": "system",
    "function_call": "assistant",
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


def read_sharegpt(record: Mapping[str, Any], number: int) -> Chat:
    """``{"conversations": [{"from", "value"}], "system"?, "tools"?}``; turns with "role" and "content" are read too.

    Labels are the turns of "gpt" and its synonyms and of "function_call", whose value is the JSON text of a call
    ``{"name", "arguments"}`` or of a list of calls.

    Raises:
        DataError: with the example's and the turn's number.
    """
    turns = record["conversations"]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise Place(number).error('\'conversations\' must be a non-empty list of turns {"from", "value"}')
    translated = [_message(turn, Place(number, count, "conversations")) for count, turn in enumerate(turns, 1)]
    messages, learn = read_messages(translated, number, "conversations")
    if record.get("system"):
        (system,), _ = read_messages([{"role": "system", "content": record["system"]}], number, "system")
        messages, learn = [system, *messages], [False, *learn]
    check_learnable(messages, learn, number)
    return Chat(tuple(messages), tuple(learn), read_tools(record.get("tools"), number))


def _message(turn: Any, at: Place) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise at.error(f"a turn must be a dictionary, not {type(turn).__name__}")
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker.lower() not in _SHAREGPT_ROLES:
        raise at.error(f"'from' is {speaker!r}; it must be one of {sorted(_SHAREGPT_ROLES)}")
    if not isinstance(value, str):
        raise at.error(f"'value' must be a string, not {type(value).__name__}")
    message: dict[str, Any] = {"role": _SHAREGPT_ROLES[speaker.lower()], "content": value}
    if "weight" in turn:
        message["weight"] = turn["weight"]
    if speaker.lower() == "function_call":
        calls = parse_json(value, "the value of a function_call", at)
        calls = calls if isinstance(calls, list) else [calls]
        message |= {"content": None, "tool_calls": [tool_call(call, at) for call in calls]}
    return message


def read_alpaca(record: Mapping[str, Any], number: int) -> Chat:
    """``{"instruction", "output", "input"?, "system"?, "history"?: [[question, answer]]}``.

    The user's message is the instruction and, if there is any input, a new line and the input. All answers are
    labels, those in the history too.

    Raises:
        DataError: with the example's number and the key.
    """
    at = Place(number)
    texts = {key: record.get(key) for key in ("instruction", "input", "output", "system")}
    for key, value in texts.items():
        if not isinstance(value, str) and not (value is None and key in ("input", "system")):
            raise at.error(f"{key!r} must be a string, not {type(value).__name__}")
    turns = [("system", texts["system"])] if texts["system"] else []
    for pair in record.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise at.error("'history' must be a list of [question, answer] pairs of strings")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    question = "\n".join(filter(None, (texts["instruction"], texts["input"])))
    turns += [("user", question), ("assistant", texts["output"])]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    return Chat(messages, tuple(role == "assistant" for role, _ in turns))
