"""`validate` reports every problem with its line, counts what training would see, and never stops at the first."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.tiny import tiny_tokenizer
from typer.testing import CliRunner

from loquetier.errors import ConfigError, DataError
from loquetier.training.containers import FileLimits
from loquetier.training.data import encode_examples
from loquetier.training.validate import Problem, ValidationReport, statistics, validate
from loquetier.validate_view import print_report

FAR = 10_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def many(count: int) -> list[dict[str, Any]]:
    return [chat(f"question {i}", "a" * (i + 1)) for i in range(count)]


def messages(report: ValidationReport, level: str) -> list[tuple[int, str]]:
    return [(problem.line, problem.message) for problem in report.problems if problem.level == level]


def test_good_data(tokenizer: Any) -> None:
    report = validate(many(20), tokenizer, FAR)
    assert report.ok and report.problems == () and (report.num_errors, report.num_warnings) == (0, 0)
    assert (report.format, report.num_examples, report.num_duplicates) == ("OpenAI chat", 20, 0)
    examples = encode_examples(many(20), tokenizer, FAR)
    assert report.labelled_tokens == sum(example.num_labels for example in examples) == sum(range(2, 22))
    assert report.trained_tokens == report.tokens.total == sum(len(example.tokens) for example in examples)
    assert (report.num_truncated, report.num_cut_tokens, report.num_without_labels) == (0, 0, 0)
    assert len(report.samples) == 3
    assert report.samples[0] == (("<s>user:question 0</s><s>assistant:", False), ("a</s>", True))


def test_token_ids_that_the_tokenizer_does_not_have(tokenizer: Any) -> None:
    size = len(tokenizer)
    good, beyond, negative = ({"input_ids": [4, last], "labels": [-100, last]} for last in (size - 1, size, -1))
    report = validate([good, beyond, negative], tokenizer, FAR)
    assert messages(report, "error") == [
        (2, f"Example 2 has token id {size}; the tokenizer has {size} tokens"),
        (3, "Example 3 has token id -1; 'input_ids' must not be negative"),
    ]


BAD_LINES: list[tuple[bytes, str]] = [
    (json.dumps(chat("u", "good")).encode(), ""),
    (b"", ""),
    (b'{"messages": [}', "Invalid file format. Example 2 cannot be parsed. Error: line contains invalid json: "),
    (b'["a"]', "Example 3 cannot be parsed. Error: Expected file to have JSONL format"),
    (b'{"messages": [], "messages": []}', "duplicate key 'messages'"),
    (b'{"messages": "\xc3"}', "not UTF-8: byte 0xc3"),
    (json.dumps({"messages": [{"content": "x"}]}).encode(), "Example 6, message 1: 'role' is missing"),
    (json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(), "Example 7 has no assistant message"),
    (json.dumps(chat("u", "a", weight=0)).encode(), "Example 8 has no token to learn: every assistant message has"),
    (json.dumps({"prompt": "u", "completion": "a"}).encode(), "Example 9 is in the prompt-completion format, but Exa"),
    (json.dumps({"question": "u", "answer": "a"}).encode(), "Example 10 has keys ['answer', 'question']"),
    (json.dumps(chat("u", "also good")).encode(), ""),
]


def test_every_bad_line_is_listed(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in BAD_LINES))
    report = validate(path, tokenizer, FAR)
    expected = [(line, reason) for line, (_, reason) in enumerate(BAD_LINES, 1) if reason]
    assert [line for line, _ in messages(report, "error")] == [line for line, _ in expected]
    for (_, found), (_, reason) in zip(messages(report, "error"), expected, strict=True):
        assert reason in found
    assert (report.num_examples, report.num_errors, report.ok) == (11, 9, False)
    assert len(report.samples) == 2


def test_one_bad_line_among_many(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in many(3000)]
    lines[2345] = lines[2345][:-1]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    (problem,) = validate(path, tokenizer, FAR).problems
    assert (problem.line, problem.level) == (2346, "error") and problem.message.endswith("(line 2346)")


def test_problems_are_capped_but_counted(tokenizer: Any) -> None:
    report = validate([{"x": 1}] * 50 + many(1) * 50, tokenizer, FAR, max_problems=3)
    assert (report.num_errors, report.num_warnings, report.num_duplicates) == (50, 49, 49)
    assert [problem.line for problem in report.problems] == [1, 2, 3, 52, 53, 54]


@pytest.mark.parametrize(
    ("count", "least", "level", "message"),
    [
        (0, 1, "error", "Training file has 0 example(s), but must have at least 1 examples"),
        (1, 1, "warning", "Training file has only 1 example(s); fewer than 10 seldom teach much"),
        (9, 1, "warning", "Training file has only 9 example(s); fewer than 10 seldom teach much"),
        (9, 10, "error", "Training file has 9 example(s), but must have at least 10 examples"),
    ],
)
def test_few_examples(count: int, least: int, level: Any, message: str, tokenizer: Any) -> None:
    report = validate(many(count), tokenizer, FAR, min_examples=least)
    assert report.problems == (Problem(0, level, message),)
    assert report.ok == (level == "warning")


def test_truncation(tokenizer: Any) -> None:
    """27 tokens come before the answer of ``question N`` (N < 10): some answers are cut, some are gone."""
    records = [chat("question 0", "a" * length) for length in (1, 3, 5)] + [chat("question 0" * 3, "a")]
    examples = encode_examples(records[:1], tokenizer, FAR)
    before = len(examples[0].tokens) - 2
    report = validate(records, tokenizer, before + 3)
    assert (report.num_truncated, report.num_without_labels) == (3, 1)
    assert report.num_cut_tokens == report.tokens.total - report.trained_tokens
    assert report.labelled_tokens == 2 + 3 + 3
    assert messages(report, "warning")[1:] == [
        (2, f"Example 2 has {before + 4} tokens; the last 1 are cut off (max_seq_len={before + 3})"),
        (3, f"Example 3 has {before + 6} tokens; the last 3 are cut off (max_seq_len={before + 3})"),
    ]
    ((line, message),) = messages(report, "error")
    assert line == 4 and message.startswith(f"Example 4 has no token to learn within max_seq_len={before + 3}")
    assert "".join(text for text, _ in report.samples[2]).endswith("assistant:aaa")


def test_all_longer_than_the_limit(tokenizer: Any) -> None:
    report = validate(many(12), tokenizer, 5)
    assert report.num_without_labels == report.num_truncated == report.num_errors == 12
    assert not report.ok and report.samples == () and report.labelled_tokens == 0


def test_duplicates_and_unused_keys(tokenizer: Any) -> None:
    records = [chat("u", "a") | {"id": 1}, chat("u", "b") | {"id": 2}, chat("u", "a") | {"id": 3}]
    report = validate(records, tokenizer, FAR)
    assert messages(report, "warning")[1:] == [
        (1, "keys ['id'] are not used in training (said once)"),
        (3, "Example 3 repeats line 1"),
    ]
    assert report.ok and report.num_duplicates == 1


def test_a_template_that_ignores_tools(tokenizer: Any) -> None:
    records = [record | {"tools": [{"type": "function"}]} for record in many(12)]
    assert messages(validate(records, tokenizer, FAR), "warning") == [
        (1, "the base's chat template ignores 'tools' (said once)")
    ]
    shows = tiny_tokenizer()
    shows.chat_template = "{{ tools | tojson }}" + shows.chat_template
    assert validate(records, shows, FAR).problems == ()


@pytest.mark.real
def test_a_token_across_the_border_of_prompt_and_completion() -> None:
    """TRL warns of it too: "ab" is one token, so that its tokens beyond the prompt's one are none."""
    from loquetier.base.loading import load_tokenizer

    records = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " b"}]
    report = validate(records, load_tokenizer("smollm2-135m"), FAR)
    assert [line for line, message in messages(report, "warning") if "lies across" in message] == [1]


def test_what_ends_the_reading_is_a_problem(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [*many(12), chat("u" * 2000, "a"), *many(1)])))
    report = validate(path, tokenizer, FAR, limits=FileLimits(max_line_bytes=1000))
    assert report.num_examples == 12
    ((line, message),) = messages(report, "error")
    assert line == 0 and "line 13 has more than 1000 bytes" in message and "nothing after this was read" in message


def test_wrong_arguments(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        validate(tmp_path / "no.jsonl", tokenizer, FAR)
    with pytest.raises(ConfigError, match="max_seq_len=0 must be at least 1"):
        validate([], tokenizer, 0)


def test_token_ids_need_no_tokenizer() -> None:
    report = validate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], None, FAR)
    assert report.ok and report.samples == ((("5 ", False), ("6 7 ", True)),)


@given(st.lists(st.integers(1, 50), min_size=1))
def test_statistics(lengths: list[int]) -> None:
    found = statistics(lengths)
    assert (found.minimum, found.maximum, found.total) == (min(lengths), max(lengths), sum(lengths))
    # Nearest rank: the smallest length that at least 95 % do not pass.
    share = [sum(other <= length for other in lengths) / len(lengths) for length in sorted(lengths)]
    assert found.p95 == next(n for n, part in zip(sorted(lengths), share, strict=True) if part >= 0.95)
    assert sum(length <= found.median for length in lengths) >= len(lengths) / 2
    assert sum(length >= found.median for length in lengths) >= len(lengths) / 2


record_like = st.dictionaries(
    st.sampled_from(["messages", "prompt", "completion", "text", "input_ids", "labels", "tools", "weight", "x"]),
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "content", "weight", "tool_calls", "type", "text"]), inner)
        ),
        max_leaves=6,
    ),
    max_size=4,
)


@given(records=st.lists(record_like | st.none() | st.text(max_size=3), max_size=5))
def test_any_records_are_judged_as_a_job_would(records: list[Any], tokenizer: Any) -> None:
    """The report says ok exactly when `encode_examples` takes the data, whatever the data is."""
    report = validate(records, tokenizer, FAR)
    try:
        encode_examples(records, tokenizer, FAR)
    except DataError:
        assert not report.ok
    else:
        assert report.ok


# --- for people ---


def shown(report: ValidationReport, **settings: Any) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=200, **settings))
    return out.getvalue()


def test_view(tokenizer: Any) -> None:
    text = shown(validate([*many(3), {"x": "[red]\x1b[2J"}, {"\x1b[2J": 1}], tokenizer, FAR, max_problems=1))
    assert "line 4: error: Example 4 has keys ['x']" in text and "... and 1 more" in text
    assert "<s>user:question 0</s><s>assistant:⟦a</s>⟧" in text
    assert "2 error(s), 1 warning(s): a job would refuse this data" in text
    assert "min 30, median 31, p95 32, max 32" in text


def test_the_view_prints_no_control_characters_of_the_file(tokenizer: Any) -> None:
    text = shown(validate([{"text": "a\x1b[2J\x07b\x9b1m"}, {"text": "x\n\ty"}], tokenizer, FAR))
    assert not {"\x1b", "\x07", "\x9b"} & set(text)
    assert r"a⟦\x1b[2J\x07b\x9b1m</s>⟧" in text


def test_long_samples_are_shortened(tokenizer: Any) -> None:
    text = shown(validate([{"text": "a" * 5000}], tokenizer, FAR))
    assert text.count("a") < 1500 and "characters ...]" in text


@pytest.mark.real
def test_command(tmp_path: Path) -> None:
    from loquetier.cli import app

    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, many(12))))
    good = CliRunner().invoke(app, ["validate", str(path)])
    assert good.exit_code == 0 and "0 error(s), 0 warning(s): ready to train" in good.output
    path.write_text('{"x": 1}\n')
    bad = CliRunner().invoke(app, ["validate", str(path), "--json"])
    assert bad.exit_code == 1
    report = json.loads(bad.output)
    assert not report["ok"] and report["problems"][1]["line"] == 1
