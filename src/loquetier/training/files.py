"""Records of training files: JSON lines, a JSON array, CSV or parquet, also compressed.

One bad line does not hide the next: each is reported with its 1-based line. What makes the rest unreadable (a damaged
archive, a bomb) is raised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

from loquetier.errors import DataError
from loquetier.training.containers import FileLimits, detect_container, read_chunks
from loquetier.training.tables import is_csv_header, iter_csv, iter_parquet

__all__ = ["FileLimits", "Record", "iter_records", "read_records"]

_UTF8_BOM = b"\xef\xbb\xbf"
_HINT_CHARS = 20


@dataclass(frozen=True, slots=True)
class Record:
    """One record, or why there is none."""

    line: int
    """1-based: the line in the file; in a JSON array and in parquet, the count of the record."""
    value: dict[str, Any] | None
    error: DataError | None = None
    """Without file name and line, which the reader of this knows."""


def read_records(path: Path, limits: FileLimits | None = None) -> list[dict[str, Any]]:
    """All records of a file, whatever its container.

    Raises:
        DataError: the first problem, with its 1-based line; or a limit that the file exceeds.
    """
    records = []
    for record in iter_records(path, limits):
        if record.error is not None:
            raise DataError(f"{path}, line {record.line}: {record.error}") from record.error
        assert record.value is not None
        records.append(record.value)
    return records


def iter_records(path: Path, limits: FileLimits | None = None) -> Iterator[Record]:
    """Records one by one, bad ones with their error.

    Raises:
        DataError: nothing more can be read: not a file, damaged, not UTF-8 at all, or over a limit.
    """
    limits = limits or FileLimits()
    for record in _records(path, limits):
        _check_count(path, record.line, limits)
        yield record


def _records(path: Path, limits: FileLimits) -> Iterator[Record]:
    container = detect_container(path)
    if container == "parquet":
        yield from (Record(line, value) for line, value in enumerate(iter_parquet(path, limits), 1))
        return
    lines = _Lines(path, read_chunks(path, container, limits), limits.max_line_bytes)
    head = lines.peek()
    _refuse_other_encodings(path, head)
    text = head.removeprefix(_UTF8_BOM).lstrip()
    if text.startswith(b"[") and not _is_list_per_line(text):
        yield from _array(path, read_chunks(path, container, limits), limits)
    elif not text.startswith(b"{") and is_csv_header(text):
        for line, value, error in iter_csv(_decoded(path, lines), limits):
            yield Record(line, value, error)
    else:
        for line, raw, offset in lines:
            if raw.strip():
                yield _parse_line(line, raw, offset)
            else:
                _check_count(path, line, limits)


def _check_count(path: Path, line: int, limits: FileLimits) -> None:
    if line > limits.max_lines:
        raise DataError(f"{path} has more than {limits.max_lines} lines, the limit; split the file")


class _Lines:
    """Iterates (1-based line, bytes with the line's end, offset in the file) without ever holding more than a line."""

    def __init__(self, path: Path, chunks: Iterator[bytes], max_bytes: int) -> None:
        self._path, self._chunks, self._max_bytes = path, chunks, max_bytes
        self._buffer = bytearray()

    def peek(self) -> bytes:
        """The first bytes of the file, up to 4096 after leading white space."""
        while len(self._buffer.lstrip(b"\xef\xbb\xbf \t\r\n")) < 4096 and len(self._buffer) <= self._max_bytes:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._buffer += chunk
        return bytes(self._buffer[: self._max_bytes])

    def __iter__(self) -> Iterator[tuple[int, bytes, int]]:
        number, offset, searched = 1, 0, 0
        while True:
            end = self._buffer.find(b"\n", searched)
            if end < 0:
                searched = len(self._buffer)
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._buffer += chunk
                self._check(number, len(self._buffer) if b"\n" not in chunk else 0)
                continue
            self._check(number, end)
            raw = bytes(self._buffer[: end + 1])
            del self._buffer[: end + 1]
            yield number, raw.removeprefix(_UTF8_BOM) if number == 1 else raw, offset
            number, offset, searched = number + 1, offset + end + 1, 0
        if self._buffer:
            raw = bytes(self._buffer)
            yield number, raw.removeprefix(_UTF8_BOM) if number == 1 else raw, offset

    def _check(self, number: int, size: int) -> None:
        if size > self._max_bytes:
            raise DataError(
                f"{self._path}: line {number} has more than {self._max_bytes} bytes, the limit; is it one record per "
                "line?"
            )


def _refuse_other_encodings(path: Path, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        raise DataError(f"{path} is UTF-16 or UTF-32 (byte 0 is 0x{head[0]:02x}), or binary; save it as UTF-8")


def _is_list_per_line(text: bytes) -> bool:
    """Whether the file's first line is a complete JSON list of plain values: JSON lines gone wrong, not an array."""
    first, newline, rest = text.partition(b"\n")
    if not newline or not rest.lstrip().startswith(b"["):
        return False
    try:
        return isinstance(json.loads(first), list)
    except (ValueError, RecursionError):
        return False


def _decoded(path: Path, lines: _Lines) -> Iterator[str]:
    for number, raw, offset in lines:
        text, error = _decode(raw, offset)
        if error is not None:
            # A quoted field may run over lines: there is no telling where the next row begins.
            raise DataError(f"{path}, line {number}: {error}")
        yield text


def _decode(raw: bytes, offset: int) -> tuple[str, DataError | None]:
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        at = offset + error.start
        return "", DataError(f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {at} of the file; save it as UTF-8")


def _parse_line(number: int, raw: bytes, offset: int) -> Record:
    text, error = _decode(raw.strip(), offset + len(raw) - len(raw.lstrip()))
    if error is not None:
        return Record(number, None, error)
    try:
        value = _loads(text)
    except (ValueError, RecursionError) as reason:
        if not text.startswith("{"):
            return Record(number, None, _not_a_dictionary(number, text))
        return Record(number, None, DataError(f"line contains invalid json: {reason}"))
    if not isinstance(value, dict):
        return Record(number, None, _not_a_dictionary(number, text))
    return Record(number, value)


def _not_a_dictionary(number: int, text: str) -> DataError:
    hint = text[:_HINT_CHARS] + ("..." if len(text) > _HINT_CHARS else "")
    return DataError(
        f"Expected file to have JSONL format, where every line is a JSON dictionary. Line {number} is not a "
        f'dictionary (HINT: line starts with: "{hint}").'
    )


def _array(path: Path, chunks: Iterator[bytes], limits: FileLimits) -> Iterator[Record]:
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > limits.max_document_bytes:
            raise DataError(
                f"{path} is a JSON array of more than {limits.max_document_bytes} bytes, the limit; write JSON lines, "
                "one record per line, which have none"
            )
    text, error = _decode(bytes(data).removeprefix(_UTF8_BOM), len(_UTF8_BOM) * data.startswith(_UTF8_BOM))
    if error is not None:
        raise DataError(f"{path}: {error}")
    try:
        values = _loads(text)
    except (ValueError, RecursionError) as reason:
        raise DataError(f"{path} begins like a JSON array but contains invalid json: {reason}") from reason
    for number, value in enumerate(values, 1):
        if isinstance(value, dict):
            yield Record(number, value)
        else:
            yield Record(number, None, DataError(f"element {number} is not a dictionary but {type(value).__name__}"))


def _loads(text: str) -> Any:
    """JSON, strictly: no NaN, and no key twice, where every reader would take another value."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice!r}")
    return value


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a JSON value")
