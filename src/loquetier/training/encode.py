"""From a record to tokens and labels.

Loss masks of chats are made through the chat template: a conversation is rendered up to each answer and through it,
and both must be a prefix of the whole, token for token. An answer's labels are its text and the template's end marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loquetier.errors import ConfigError, DataError
from loquetier.training.chat import render_chat, render_text, special_text, tokenize
from loquetier.training.example import IGNORE, Example
from loquetier.training.formats import Form, Pair, Text, TokenIds, format_name, normalize
from loquetier.training.messages import Chat, Place


@dataclass(frozen=True)
class Encoded:
    """An example as a job would see it."""

    example: Example
    """Cut to the given length; its labels may all be cut off."""
    length: int
    """Tokens before the cut."""


def encode_example(record: Mapping[str, Any], tokenizer: Any, max_len: int, number: int = 1) -> Example:
    """Encode one record, in any of the formats of `formats.FORMATS`; what is longer than `max_len` is cut at its end.

    Args:
        number: 1-based number of the record, for messages.

    Raises:
        DataError: unknown form, wrong types, nothing to learn, or fewer than 2 tokens.
    """
    encoded = encode_form(normalize(record, number), tokenizer, max_len, number)
    if encoded.example.num_labels == 0:
        raise DataError(nothing_to_learn(encoded, max_len, number))
    return encoded.example


def nothing_to_learn(encoded: Encoded, max_len: int, number: int) -> str:
    """What is wrong with an example that has no label left."""
    return (
        f"Example {number} has no token to learn within max_seq_len={max_len} (its length is {encoded.length}); "
        "raise max_seq_len or give it an answer"
    )


def encode_examples(records: Sequence[Mapping[str, Any]], tokenizer: Any, max_len: int) -> tuple[Example, ...]:
    """Encode all records, which must be of one format; the error names the first bad one. At least one is needed."""
    if not records:
        raise DataError("the data has 0 examples; at least 1 is needed")
    examples, first = [], ""
    for number, record in enumerate(records, 1):
        examples.append(encode_example(record, tokenizer, max_len, number))
        name = format_name(record, number)
        first = first or name
        check_same_format(name, first, number)
    return tuple(examples)


def check_same_format(name: str, first: str, number: int) -> None:
    """Refuse a record of another format than the first: labels would mean two things in one job."""
    if name != first:
        raise DataError(
            f"Example {number} is in the {name} format, but Example 1 is in the {first} format; "
            "write all examples in one"
        )


def encode_form(form: Form, tokenizer: Any, max_len: int, number: int) -> Encoded:
    """Tokens and labels of a normalised record.

    Raises:
        DataError: fewer than 2 tokens, or text that this tokenizer or its template cannot take.
    """
    if tokenizer is None and not isinstance(form, TokenIds):
        raise DataError(f"Example {number} is text, but the base has no tokenizer; give input_ids and labels")
    try:
        tokens, learn, length = _encode(form, tokenizer, max_len, number)
    except ConfigError as error:
        raise DataError(f"Example {number}: {error}") from error
    if length < 2:
        raise DataError(f"Example {number} has {length} token(s); at least 2 are needed")
    return Encoded(Example(tuple(tokens[:max_len]), tuple(learn[:max_len])), length)


def _encode(form: Form, tokenizer: Any, max_len: int, number: int) -> tuple[list[int], list[bool], int]:
    if isinstance(form, Chat):
        return _encode_chat(form, tokenizer, max_len, number)
    if isinstance(form, Pair):
        tokens, learn = _encode_pair(form, tokenizer)
    elif isinstance(form, Text):
        tokens = _end(tokenizer, tokenize(tokenizer, form.text, add_special_tokens=True))
        learn = [True] * len(tokens)
    else:
        tokens, learn = list(form.input_ids), [label != IGNORE for label in form.labels]
    return tokens, learn, len(tokens)


def _encode_pair(pair: Pair, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """TRL's rule: the prompt's own tokens, then what prompt + completion has beyond that many, then the end token.

    TRL tokenizes both texts, masks as many tokens as the prompt alone has, and appends the end token unless the
    completion ends with it. Only where a token straddles the border do the two tokenizations differ before the mask's
    end (TRL warns then): here the prompt keeps its own tokens, those that a request with this prompt will bring.
    """
    head = tokenize(tokenizer, pair.prompt, add_special_tokens=True)
    whole = tokenize(tokenizer, pair.prompt + pair.completion, add_special_tokens=True)
    answer = _end(tokenizer, whole[len(head) :])
    return [*head, *answer], [False] * len(head) + [True] * len(answer)


def _end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """`tokens` with the end token, once."""
    eos = tokenizer.eos_token_id
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, int(eos)]


def _encode_chat(chat: Chat, tokenizer: Any, max_len: int, number: int) -> tuple[list[int], list[bool], int]:
    """What comes after the last label is dropped: it would cost rows and teach nothing."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"Example {number}: chat messages, but the base's tokenizer has no chat template; use 'text', or 'prompt' "
            "and 'completion'"
        )
    last = max(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
    messages = chat.messages[: last + 1]
    _check_calls_are_shown(chat, tokenizer, number)
    whole = render_chat(tokenizer, messages, add_generation_prompt=False, tools=chat.tools)
    learn = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Every answer is checked, also one of weight 0: a later render that changes it would move what follows.
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True, tools=chat.tools)
        after = whole
        if i != last:
            after = render_chat(tokenizer, messages[: i + 1], add_generation_prompt=False, tools=chat.tools)
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise Place(number, i + 1).error(
                "the chat template is not prefix-stable (rendering one more message changes earlier tokens), so "
                "labels cannot be placed; use 'prompt' and 'completion'"
            )
        if chat.learn[i]:
            end = _answer_end(tokenizer, after, len(before))
            learn[len(before) : end] = [True] * (end - len(before))
        if len(after) >= max_len:
            break  # the rest is cut off, and each answer costs two renders of all that is before it
    return whole, learn, len(whole)


def _answer_end(tokenizer: Any, tokens: list[int], start: int) -> int:
    """Where the labels of the answer ``tokens[start:]`` end: after its end marker.

    Some templates put a line break behind the marker. Generation stops at the marker, so that nothing would ever
    produce the break: learning it is wasted.
    """
    special = special_text(tokenizer).ids
    for at in range(len(tokens) - 1, start, -1):
        if tokens[at] in special:
            is_blank = not tokenizer.decode(tokens[at + 1 :]).strip()
            return at + 1 if is_blank else len(tokens)
    return len(tokens)


def _check_calls_are_shown(chat: Chat, tokenizer: Any, number: int) -> None:
    if not chat.has_tool_calls:
        return
    bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in chat.messages]
    if render_text(tokenizer, list(chat.messages), False, chat.tools) == render_text(
        tokenizer, bare, False, chat.tools
    ):
        raise DataError(
            f"Example {number} has tool_calls, but the base's chat template does not show them: the model would learn "
            "an empty answer; write the call into 'content'"
        )


def tools_are_shown(chat: Chat, tokenizer: Any) -> bool:
    """Whether the chat template makes anything of the tools of `chat`."""
    messages = list(chat.messages)
    return render_text(tokenizer, messages, False, chat.tools) != render_text(tokenizer, messages, False)
