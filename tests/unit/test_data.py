"""Records become tokens and labels; what cannot is refused by its 1-based number."""

from __future__ import annotations

from typing import Any

import pytest
from tests.tiny import BOS, EOS, tiny_tokenizer

from loquetier.errors import DataError
from loquetier.training.data import (
    Example,
    batches,
    check_examples,
    encode_example,
    encode_examples,
    epoch_order,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def text_ids(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def labels(example: Example) -> list[int | None]:
    """Token where it is a label, else None; the first is never one."""
    return [t if learn else None for t, learn in zip(example.tokens[1:], example.learn[1:], strict=True)]


# --- forms ---


def test_text(tokenizer: Any) -> None:
    example = encode_example({"text": "abc"}, tokenizer, 100)
    assert list(example.tokens) == [*text_ids("abc"), EOS]
    assert labels(example) == [*text_ids("bc"), EOS]
    assert (example.num_rows, example.num_labels) == (3, 3)
    assert example.label_rows.tolist() == [0, 1, 2] and example.label_targets.tolist() == [*text_ids("bc"), EOS]


def test_prompt_and_completion(tokenizer: Any) -> None:
    example = encode_example({"prompt": "ab", "completion": "cd"}, tokenizer, 100)
    assert list(example.tokens) == [*text_ids("abcd"), EOS]
    assert labels(example) == [None, *text_ids("cd"), EOS]
    assert example.label_rows.tolist() == [1, 2, 3]


def test_prompt_and_completion_keep_the_prompts_own_tokens() -> None:
    """TRL's rule where a token would straddle the border: the prompt as tokenized alone, then what is beyond it."""

    class Merging:
        eos_token_id = EOS

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert add_special_tokens
            return {"input_ids": [BOS, *{"ab": [10, 11], "abcd": [10, 12, 13]}[text]]}

    example = encode_example({"prompt": "ab", "completion": "cd"}, Merging(), 100)
    assert list(example.tokens) == [BOS, 10, 11, 13, EOS]
    assert labels(example) == [None, None, 13, EOS]


def test_empty_completion_teaches_the_end(tokenizer: Any) -> None:
    assert labels(encode_example({"prompt": "ab", "completion": ""}, tokenizer, 100)) == [None, EOS]


def chat(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more} for role, content in turns]}


def turn_ids(role: str, content: str) -> list[int]:
    return [BOS, *text_ids(f"{role}:{content}"), EOS]


def test_messages_learn_assistant_turns_with_their_end(tokenizer: Any) -> None:
    record = chat(("system", "s"), ("user", "u"), ("assistant", "xy"), ("user", "v"), ("assistant", "z"))
    example = encode_example(record, tokenizer, 1000)
    turns = [(m["role"], m["content"]) for m in record["messages"]]
    assert list(example.tokens) == [t for role, content in turns for t in turn_ids(role, content)]
    assert [t for t in labels(example) if t is not None] == [*text_ids("xy"), EOS, *text_ids("z"), EOS]
    # What is learnt comes right after what a request's prompt ends with.
    first = example.label_rows[0]
    prompt = tokenizer.apply_chat_template(record["messages"][:2], tokenize=False, add_generation_prompt=True)
    assert list(example.tokens[: first + 1]) == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_messages_with_weight_0_are_context_only(tokenizer: Any) -> None:
    record = chat(("user", "u"), ("assistant", "no"), ("user", "v"), ("assistant", "yes"))
    record["messages"][1]["weight"] = 0
    record["messages"][3]["weight"] = 1
    example = encode_example(record, tokenizer, 1000)
    assert [t for t in labels(example) if t is not None] == [*text_ids("yes"), EOS]


def test_an_unlearned_greeting_may_come_first(tokenizer: Any) -> None:
    record = chat(("assistant", "hello"), ("user", "u"), ("assistant", "yes"))
    record["messages"][0]["weight"] = 0
    example = encode_example(record, tokenizer, 1000)
    assert list(example.tokens[: len(turn_ids("assistant", "hello"))]) == turn_ids("assistant", "hello")
    assert [t for t in labels(example) if t is not None] == [*text_ids("yes"), EOS]


def test_turns_after_the_last_assistant_turn_are_dropped(tokenizer: Any) -> None:
    short, long = (("user", "u"), ("assistant", "a")), (("user", "u"), ("assistant", "a"), ("user", "more"))
    assert encode_example(chat(*short), tokenizer, 100) == encode_example(chat(*long), tokenizer, 100)


def test_input_ids_and_labels(tokenizer: Any) -> None:
    example = encode_example({"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, -100]}, tokenizer, 100)
    assert example.tokens == (5, 6, 7, 8)
    assert labels(example) == [None, 7, None]


def test_a_tokenizer_without_eos_adds_none(tokenizer: Any) -> None:
    bare = tiny_tokenizer()
    bare.eos_token = None
    assert list(encode_example({"text": "abc"}, bare, 100).tokens) == text_ids("abc")


# --- truncation ---


def test_truncation_cuts_the_end(tokenizer: Any) -> None:
    whole = encode_example({"prompt": "ab", "completion": "cdef"}, tokenizer, 100)
    cut = encode_example({"prompt": "ab", "completion": "cdef"}, tokenizer, 4)
    assert cut.tokens == whole.tokens[:4] and cut.learn == whole.learn[:4]


def test_truncation_that_leaves_no_label_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"Example 1 .*max_seq_len=3 .*length is 7"):
        encode_example({"prompt": "abc", "completion": "def"}, tokenizer, 3)


# --- errors ---


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "not a dictionary but str"),
        (None, "not a dictionary but NoneType"),
        ({}, r"has keys \[\]"),
        ({"prompt": "x"}, r"has keys \['prompt'\]"),
        ({"input_ids": [4, 5]}, "has keys"),
        ({"text": 3}, "'text' must be a string, not int"),
        ({"prompt": None, "completion": "x"}, "'prompt' must be a string"),
        ({"prompt": "x", "completion": ["y"]}, "'completion' must be a string"),
        ({"text": ""}, r"1 token\(s\); at least 2"),
        ({"messages": []}, "non-empty list"),
        ({"messages": "hi"}, "non-empty list"),
        ({"messages": ["hi"]}, "message 1: 'role'"),
        ({"messages": [{"content": "x"}]}, "message 1: 'role'"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant"}]}, "message 2: 'content'"),
        ({"messages": [{"role": "user", "content": ["parts"]}]}, "message 1: 'content'"),
        (chat(("assistant", "x"), weight=0.5), r"message 1: weight=0.5 must be 0 or 1"),
        (chat(("assistant", "x"), weight=None), r"message 1: weight=None must be 0 or 1"),
        (chat(("user", "x")), "at least 2"),
        (chat(("user", "x"), ("assistant", "y"), weight=0), "no token to learn"),
        ({"input_ids": [4, 5], "labels": [4]}, "2 input_ids but 1 labels"),
        ({"input_ids": "ab", "labels": [4, 5]}, "'input_ids' must be a list of integers"),
        ({"input_ids": [4, 5.0], "labels": [4, 5]}, "'input_ids' must be a list of integers"),
        ({"input_ids": [4, 5], "labels": [True, 5]}, "'labels' must be a list of integers"),
        ({"input_ids": [4, 5, 6], "labels": [5, 6, -100]}, "label 5 at position 0 .*not shifted"),
        ({"input_ids": [4, 5], "labels": [4, -100]}, "no token to learn"),
        ({"input_ids": [4, -5], "labels": [4, -100]}, "token id -5; 'input_ids' must not be negative"),
        (chat(("assistant", "x"), ("user", "u"), ("assistant", "y")), 'message 1: an answer to nothing.*"weight": 0'),
    ],
)
def test_bad_records_are_named_by_number_and_reason(record: Any, reason: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"Example 3.*{reason}"):
        encode_examples([{"text": "fine"}, {"text": "too"}, record], tokenizer, 100)


def test_no_records(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="0 examples"):
        encode_examples([], tokenizer, 100)


def test_chat_without_a_template() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match=r"Example 1.*no chat template"):
        encode_example(chat(("user", "u"), ("assistant", "a")), bare, 100)


@pytest.mark.parametrize(
    "template",
    [
        # Names the number of messages first, as templates that fold the history do.
        "{{ messages | length }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}",
        # Drops earlier assistant turns, as templates of reasoning models do with their thoughts.
        "{% for m in messages %}"
        "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}"
        "{% endfor %}",
    ],
    ids=["count first", "drops history"],
)
def test_a_template_that_is_not_prefix_stable_is_refused(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    record = chat(("user", "u"), ("assistant", "long answer"), ("user", "v"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"Example 7, message \d: .*not prefix-stable"):
        encode_example(record, tokenizer, 100, 7)


# --- what a step could not run ---


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        ((), "0 examples"),
        ((Example((1, 2), (True, True)), Example((1, 300), (True, True))), r"Example 2 has token id 300.*\[0, 300\)"),
        ((Example((1, -1), (True, True)),), "Example 1 has token id -1"),
        ((Example((1, 2), (True, False)),), "Example 1 has no token to learn"),
    ],
)
def test_check_examples(examples: tuple[Example, ...], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        check_examples(examples, 300)


# --- order ---


def test_order_is_a_pure_seeded_permutation() -> None:
    order = epoch_order(50, seed=1, epoch=2, shuffle=True)
    assert sorted(order) == list(range(50))
    assert order == epoch_order(50, seed=1, epoch=2, shuffle=True)
    others = [epoch_order(50, seed=2, epoch=2, shuffle=True), epoch_order(50, seed=1, epoch=3, shuffle=True)]
    assert order not in others and others[0] != others[1]
    assert epoch_order(4, seed=1, epoch=9, shuffle=False) == [0, 1, 2, 3]


def test_order_never_changes_between_releases() -> None:
    """A job that resumes after an upgrade must see the same data."""
    assert epoch_order(8, seed=0, epoch=0, shuffle=True) == FIRST_ORDER


FIRST_ORDER = [1, 2, 6, 0, 3, 4, 5, 7]


def test_batches_cover_each_epoch_once() -> None:
    found = list(batches(7, 3, seed=5, shuffle=True, epochs=2))
    assert [len(b) for b in found] == [3, 3, 1, 3, 3, 1]
    assert [n for b in found[:3] for n in b] == epoch_order(7, seed=5, epoch=0, shuffle=True)
    assert [n for b in found[3:] for n in b] == epoch_order(7, seed=5, epoch=1, shuffle=True)


def test_batches_for_ever() -> None:
    endless = batches(2, 5, seed=0, shuffle=False, epochs=None)
    assert [next(endless) for _ in range(100)] == [[0, 1]] * 100
