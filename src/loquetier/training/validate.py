"""All that is wrong with a training file, and what training on it would see, before a job is started."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from loquetier.errors import ConfigError, DataError
from loquetier.training.chat_labels import tools_are_shown
from loquetier.training.containers import FileLimits, detect_container
from loquetier.training.encode import Encoded, check_same_format, encode_form, nothing_to_learn, shares_a_token
from loquetier.training.example import Example
from loquetier.training.files import Record, iter_records
from loquetier.training.formats import Form, Pair, TokenIds, format_name, normalize, unused_keys
from loquetier.training.messages import Chat

Level = Literal["error", "warning"]
Segment = tuple[str, bool]
"""Text, and whether it is a label."""

FEW_EXAMPLES = 10
"""Fewer give a warning: hosted services refuse them."""
_SHOWN_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to mend (error: a job would refuse the data) or to know (warning)."""

    line: int
    """1-based; 0 for the data as a whole."""
    level: Level
    message: str


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Tokens per example, before any cut. All 0 without examples."""

    minimum: int
    median: float
    p95: int
    maximum: int
    total: int


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """What `validate` found."""

    format: str | None
    """The first record's format; None if no record has one."""
    num_examples: int
    """Records, good or bad."""
    problems: tuple[Problem, ...]
    """By line; at most `max_problems` of each level."""
    num_errors: int
    num_warnings: int
    tokens: TokenStatistics
    """Of the examples that can be encoded."""
    trained_tokens: int
    """Tokens of one epoch: what is left after the cut."""
    labelled_tokens: int
    """Tokens with a loss in one epoch."""
    max_seq_len: int
    num_truncated: int
    """Examples longer than `max_seq_len`; their ends are cut off."""
    num_cut_tokens: int
    num_without_labels: int
    """Examples of which nothing that is left is a label."""
    num_duplicates: int
    """Records equal to an earlier one."""
    samples: tuple[tuple[Segment, ...], ...]
    """The first three examples as the model would see them."""

    @property
    def ok(self) -> bool:
        """Whether a job would take the data."""
        return self.num_errors == 0


def validate(
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    max_seq_len: int,
    *,
    min_examples: int = 1,
    max_problems: int = 100,
    limits: FileLimits | None = None,
) -> ValidationReport:
    """Read and encode every record as a job would, and go on after a bad one.

    Args:
        data: a file in any container that `files` reads, or records.
        max_seq_len: tokens after which examples are cut.
        min_examples: fewer are an error; fewer than 10 a warning.

    Raises:
        DataError: the file cannot be opened. ConfigError: a limit below 1.
    """
    for name, value in (("max_seq_len", max_seq_len), ("min_examples", min_examples), ("max_problems", max_problems)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    check = _Check(tokenizer, max_seq_len, max_problems)
    if isinstance(data, (str, os.PathLike)):
        detect_container(Path(data))  # a file that cannot be opened is the caller's mistake, not the data's
        records = iter_records(Path(data), limits)
    else:
        records = (Record(line, value) for line, value in enumerate(data, 1))  # type: ignore[arg-type]
    try:
        for record in records:
            check.add(record)
    except DataError as error:
        check.report(0, "error", f"{error}; nothing after this was read")
    check.count(min_examples)
    return check.result()


@dataclass
class _Check:
    """Collects a report, record by record, in memory that does not grow with the text."""

    tokenizer: Any
    max_seq_len: int
    max_problems: int
    format: str | None = None
    num_examples: int = 0
    problems: dict[Level, list[Problem]] = field(default_factory=lambda: {"error": [], "warning": []})
    counts: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    seen: dict[bytes, int] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    samples: list[tuple[Segment, ...]] = field(default_factory=list)

    def report(self, line: int, level: Level, message: str) -> None:
        self.counts[level] += 1
        if len(self.problems[level]) < self.max_problems:
            self.problems[level].append(Problem(line, level, message))

    def add(self, record: Record) -> None:
        self.num_examples += 1
        if record.error is not None:
            text = f"Invalid file format. Example {self.num_examples} cannot be parsed. Error: {record.error}"
            self.report(record.line, "error", f"{text} (line {record.line})")
            return
        try:
            form = normalize(record.value, self.num_examples)
            name = format_name(record.value, self.num_examples)
            self.format = self.format or name
            check_same_format(name, self.format, self.num_examples)
            encoded = encode_form(form, self.tokenizer, self.max_seq_len, self.num_examples)
            self._check_ids(form, encoded)
        except DataError as error:
            self.report(record.line, "error", str(error))
            return
        assert record.value is not None
        self._look_for_duplicates(record.line, form)
        self._look_at_keys(record.line, record.value, form)
        self._measure(record.line, encoded)

    def _check_ids(self, form: Form, encoded: Encoded) -> None:
        """A job asks the base, which is not loaded here; its embedding has at least the tokenizer's ids."""
        if isinstance(form, TokenIds) and self.tokenizer is not None:
            size, highest = len(self.tokenizer), max(encoded.example.tokens)
            if highest >= size:
                raise DataError(f"Example {self.num_examples} has token id {highest}; the tokenizer has {size} tokens")

    def _report_once(self, line: int, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            self.report(line, "warning", f"{message} (said once)")

    def _look_for_duplicates(self, line: int, form: Form) -> None:
        """By what is trained on: two records that differ in an unused id only are one."""
        first = self.seen.setdefault(hashlib.blake2b(repr(form).encode(), digest_size=16).digest(), line)
        if first != line:
            self.counts["duplicate"] += 1
            self.report(line, "warning", f"Example {self.num_examples} repeats line {first}")

    def _look_at_keys(self, line: int, value: Mapping[str, Any], form: Form) -> None:
        if unused := unused_keys(value, self.num_examples):
            self._report_once(line, f"keys {list(unused)} are not used in training")
        if isinstance(form, Chat) and form.tools and not tools_are_shown(form, self.tokenizer):
            self._report_once(line, "the base's chat template ignores 'tools'")
        if isinstance(form, Pair) and shares_a_token(form, self.tokenizer):
            text = "a token lies across the end of 'prompt' and the start of 'completion', and the text in it is lost"
            self.report(
                line, "warning", f"Example {self.num_examples}: {text}; begin 'completion' with a space or line"
            )

    def _measure(self, line: int, encoded: Encoded) -> None:
        example, number = encoded.example, self.num_examples
        self.lengths.append(encoded.length)
        self.counts["trained"] += len(example.tokens)
        self.counts["labelled"] += example.num_labels
        cut = encoded.length - len(example.tokens)
        if cut:
            self.counts["truncated"] += 1
            self.counts["cut"] += cut
        if example.num_labels == 0:
            self.counts["unlabelled"] += 1
            self.report(line, "error", nothing_to_learn(encoded, self.max_seq_len, number))
            return
        if cut:
            limit = f"max_seq_len={self.max_seq_len}"
            text = f"Example {number} has {encoded.length} tokens; the last {cut} are cut off ({limit})"
            self.report(line, "warning", text)
        if len(self.samples) < _SHOWN_EXAMPLES:
            self.samples.append(segments(example, self.tokenizer))

    def count(self, min_examples: int) -> None:
        """Judge the number of examples."""
        if self.num_examples < min_examples:
            limit = f"must have at least {min_examples} examples"
            self.report(0, "error", f"Training file has {self.num_examples} example(s), but {limit}")
        elif self.num_examples < FEW_EXAMPLES:
            text = f"Training file has only {self.num_examples} example(s); fewer than {FEW_EXAMPLES} seldom teach much"
            self.report(0, "warning", text)

    def result(self) -> ValidationReport:
        problems = sorted(self.problems["error"] + self.problems["warning"], key=lambda problem: problem.line)
        return ValidationReport(
            format=self.format,
            num_examples=self.num_examples,
            problems=tuple(problems),
            num_errors=self.counts["error"],
            num_warnings=self.counts["warning"],
            tokens=statistics(self.lengths),
            trained_tokens=self.counts["trained"],
            labelled_tokens=self.counts["labelled"],
            max_seq_len=self.max_seq_len,
            num_truncated=self.counts["truncated"],
            num_cut_tokens=self.counts["cut"],
            num_without_labels=self.counts["unlabelled"],
            num_duplicates=self.counts["duplicate"],
            samples=tuple(self.samples),
        )


def statistics(lengths: list[int]) -> TokenStatistics:
    """Statistics of lengths; p95 by nearest rank: 95 % of the examples are at most this long."""
    if not lengths:
        return TokenStatistics(0, 0.0, 0, 0, 0)
    ordered = sorted(lengths)
    middle = len(ordered) // 2
    median = float(ordered[middle]) if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return TokenStatistics(ordered[0], median, p95, ordered[-1], sum(ordered))


def segments(example: Example, tokenizer: Any) -> tuple[Segment, ...]:
    """Runs of labels and of others, decoded; ids as text if there is no tokenizer."""
    learn = (False, *example.learn[1:])  # nothing predicts the first token
    return tuple(_runs(example.tokens, learn, tokenizer))


def _runs(tokens: tuple[int, ...], learn: tuple[bool, ...], tokenizer: Any) -> Iterator[Segment]:
    for is_label, run in groupby(zip(tokens, learn, strict=True), key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        if tokenizer is None:
            yield " ".join(map(str, ids)) + " ", is_label
        else:
            yield tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), is_label
