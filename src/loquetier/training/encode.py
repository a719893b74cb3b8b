"""From a record to tokens and labels.

Plain text means what it means in TRL; chats are labelled through the chat template, in `chat_labels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loquetier.errors import ConfigError, DataError
from loquetier.training.chat import tokenize
from loquetier.training.chat_labels import encode_chat
from loquetier.training.example import IGNORE, Example
from loquetier.training.formats import Form, Pair, Text, TokenIds, format_name, normalize
from loquetier.training.messages import Chat


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
    return Encoded(Example(tuple(tokens[:max_len]), tuple(learn[:max_len]), max(0, length - max_len)), length)


def _encode(form: Form, tokenizer: Any, max_len: int, number: int) -> tuple[list[int], list[bool], int]:
    if isinstance(form, Chat):
        return encode_chat(form, tokenizer, max_len, number)
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


def shares_a_token(pair: Pair, tokenizer: Any) -> bool:
    """Whether a token straddles the border of prompt and completion: by TRL's rule its part of the text is lost."""
    head = tokenize(tokenizer, pair.prompt, add_special_tokens=True)
    whole = tokenize(tokenizer, pair.prompt + pair.completion, add_special_tokens=True)
    return whole[: len(head)] != head


def _end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """`tokens` with the end token, once."""
    eos = tokenizer.eos_token_id
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, int(eos)]
