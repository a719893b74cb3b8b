"""From a user's examples to token rows with labels. One example is one sequence; nothing is padded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from loquetier.errors import DataError

IGNORE = -100
"""Label of a token that is not predicted, as everywhere in this field."""


@dataclass(frozen=True)
class Example:
    """Tokens, and for each of them whether the model shall learn to produce it."""

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]
    """``learn[i]``: token i is a label. ``learn[0]`` has no effect: nothing predicts the first token."""

    @property
    def num_rows(self) -> int:
        """Rows it takes in a step: the last token is predicted but predicts nothing."""
        return len(self.tokens) - 1

    @property
    def num_labels(self) -> int:
        """Rows with a loss."""
        return len(self.label_rows)

    @cached_property
    def label_rows(self) -> npt.NDArray[np.int64]:
        """Rows with a loss, counted inside the example: row i predicts token i + 1."""
        return np.flatnonzero(np.asarray(self.learn[1:], dtype=bool))

    @cached_property
    def label_targets(self) -> npt.NDArray[np.int64]:
        """The token that each of `label_rows` shall predict."""
        return np.asarray(self.tokens, dtype=np.int64)[self.label_rows + 1]


def encode_example(record: Mapping[str, Any], tokenizer: Any, max_len: int, number: int = 1) -> Example:
    """Encode one record.

    Accepts ``{"messages": [...]}`` (loss on assistant turns, ``weight`` 0/1), ``{"prompt": str, "completion": str}``
    (TRL's meaning: loss on the completion and EOS), ``{"text": str}`` (loss on everything and EOS), and
    ``{"input_ids": [...], "labels": [...]}`` with -100 for no loss.

    Args:
        number: 1-based number of the record, for messages.

    Raises:
        DataError: unknown form, wrong types, nothing to learn, or fewer than 2 tokens.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"Example {number} is not a dictionary but {type(record).__name__}")
    keys = set(record)
    if "messages" in keys:
        tokens, learn = _encode_chat(record["messages"], tokenizer, number)
    elif {"prompt", "completion"} <= keys:
        tokens, learn = _encode_pair(record["prompt"], record["completion"], tokenizer, number)
    elif "text" in keys:
        text = _string(record["text"], "text", number)
        tokens = [*_encode(tokenizer, text), *_eos(tokenizer)]
        learn = [True] * len(tokens)
    elif {"input_ids", "labels"} <= keys:
        tokens, learn = _take_ids(record["input_ids"], record["labels"], number)
    else:
        raise DataError(
            f"Example {number} has keys {sorted(keys)}; expected messages, prompt and completion, text, "
            "or input_ids and labels"
        )
    example = Example(tuple(tokens[:max_len]), tuple(learn[:max_len]))
    if len(example.tokens) < 2:
        raise DataError(f"Example {number} has {len(example.tokens)} token(s); at least 2 are needed")
    if example.num_labels == 0:
        raise DataError(
            f"Example {number} has no token to learn within max_seq_len={max_len} (its length is {len(tokens)}); "
            "raise max_seq_len or give it an answer"
        )
    return example


def encode_examples(records: Sequence[Mapping[str, Any]], tokenizer: Any, max_len: int) -> tuple[Example, ...]:
    """Encode all records; the error names the first bad one. At least one is needed."""
    if not records:
        raise DataError("the data has 0 examples; at least 1 is needed")
    return tuple(encode_example(r, tokenizer, max_len, n) for n, r in enumerate(records, 1))


def check_examples(examples: Sequence[Example], vocab_size: int) -> None:
    """Refuse what a step could not run.

    Raises:
        DataError: no example, an example without a label, or a token id that the base does not have.
    """
    if not examples:
        raise DataError("the data has 0 examples; at least 1 is needed")
    for number, example in enumerate(examples, 1):
        if example.num_labels == 0:
            raise DataError(f"Example {number} has no token to learn")
        if min(example.tokens) < 0 or max(example.tokens) >= vocab_size:
            bad = next(t for t in example.tokens if not 0 <= t < vocab_size)
            raise DataError(f"Example {number} has token id {bad}; ids must be in [0, {vocab_size})")


def epoch_order(num_examples: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Example numbers of one epoch; a pure function of its arguments, so that a resumed job repeats it."""
    order = list(range(num_examples))
    if shuffle:
        random.Random(f"loquetier-{seed}-{epoch}").shuffle(order)
    return order


def batches(num_examples: int, batch: int, *, seed: int, shuffle: bool, epochs: int | None) -> Iterator[list[int]]:
    """Example numbers of each optimizer step; the last batch of an epoch may be shorter. ``epochs=None``: for ever."""
    epoch = 0
    while epochs is None or epoch < epochs:
        order = epoch_order(num_examples, seed=seed, epoch=epoch, shuffle=shuffle)
        for at in range(0, num_examples, batch):
            yield order[at : at + batch]
        epoch += 1


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=True)["input_ids"])


def _eos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _string(value: Any, key: str, number: int) -> str:
    if not isinstance(value, str):
        raise DataError(f"Example {number}: {key!r} must be a string, not {type(value).__name__}")
    return value


def _encode_pair(prompt: Any, completion: Any, tokenizer: Any, number: int) -> tuple[list[int], list[bool]]:
    """TRL: the prompt's own tokens, then what prompt+completion has beyond them, then EOS."""
    prompt, completion = _string(prompt, "prompt", number), _string(completion, "completion", number)
    head, whole = _encode(tokenizer, prompt), _encode(tokenizer, prompt + completion)
    tokens = [*head, *whole[len(head) :], *_eos(tokenizer)]
    return tokens, [False] * len(head) + [True] * (len(tokens) - len(head))


def _take_ids(input_ids: Any, labels: Any, number: int) -> tuple[list[int], list[bool]]:
    """Labels are the tokens themselves or -100, not shifted (Hugging Face's convention)."""
    for key, ids in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(ids, (list, tuple)) or not all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
            raise DataError(f"Example {number}: {key!r} must be a list of integers")
    if len(input_ids) != len(labels):
        raise DataError(f"Example {number}: {len(input_ids)} input_ids but {len(labels)} labels")
    for at, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        if label not in (token, IGNORE):
            raise DataError(
                f"Example {number}: label {label} at position {at} is neither the token there ({token}) nor {IGNORE}; "
                "labels are not shifted"
            )
    return list(input_ids), [label != IGNORE for label in labels]


def _encode_chat(messages: Any, tokenizer: Any, number: int) -> tuple[list[int], list[bool]]:
    """Render growing prefixes through the model's own template; an assistant turn's new tokens are its labels."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"Example {number}: 'messages' must be a non-empty list")
    if tokenizer.chat_template is None:
        raise DataError(f"Example {number}: chat messages, but the base's tokenizer has no chat template; use 'text'")
    tokens: list[int] = []
    learn: list[bool] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"Example {number}, message {i + 1}: 'role' is missing or not a string")
        if not isinstance(message.get("content"), str):
            raise DataError(f"Example {number}, message {i + 1}: 'content' is missing or not a string")
        if message.get("weight", 1) not in (0, 1):
            raise DataError(f"Example {number}, message {i + 1}: weight={message['weight']!r} must be 0 or 1")
        if message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True)
        after = render_chat(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if before[: len(tokens)] != tokens or after[: len(before)] != before:
            raise DataError(
                f"Example {number}, message {i + 1}: the chat template is not prefix-stable (rendering one more "
                "message changes earlier tokens), so labels cannot be placed; use 'prompt' and 'completion'"
            )
        is_learnt = message.get("weight", 1) == 1
        learn += [False] * (len(before) - len(tokens)) + [is_learnt] * (len(after) - len(before))
        tokens = after
    return tokens, learn


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation through the model's own template."""
    plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    text = tokenizer.apply_chat_template(plain, add_generation_prompt=add_generation_prompt, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
