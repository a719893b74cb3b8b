"""Records of CSV and parquet files. A null is an absent key: in a table every row has every column."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loquetier.errors import DataError
from loquetier.training.containers import FileLimits, import_pyarrow, open_file

_COLUMNS = frozenset({"messages", "conversations", "prompt", "completion", "instruction", "output", "text", "question"})
_ROWS = 64
"""Rows of a parquet file that are decoded at once."""


def is_csv_header(head: bytes) -> bool:
    """Whether the first line names a column that training data has."""
    line = head.split(b"\n", 1)[0].decode("utf-8", errors="replace")
    try:
        return bool(_COLUMNS & {name.strip() for name in next(csv.reader([line.strip()]), [])})
    except csv.Error:
        return False


def iter_csv(lines: Iterable[str], limits: FileLimits) -> Iterator[tuple[int, dict[str, Any] | None, DataError | None]]:
    """Rows under a header as (1-based line where the row ends, record, error). Comma separated, quoted with ".

    Raises:
        DataError: quotes that do not end, or a field over the limit: the rows after it cannot be told apart.
    """
    # The csv module's one setting is the process's; raised only, so that no other reader loses by it.
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_line_bytes))
    reader = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        if len(set(header)) != len(header):
            raise DataError(f"the CSV header names a column twice: {header}")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                problem = f"the row has {len(row)} fields, but the header has {len(header)}"
                yield reader.line_num, None, DataError(problem)
            elif (size := max(map(len, row))) > limits.max_line_bytes:
                problem = f"a field has {size} characters, more than {limits.max_line_bytes}, the limit"
                yield reader.line_num, None, DataError(problem)
            else:
                yield reader.line_num, dict(zip(header, row, strict=True)), None
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} is not valid CSV: {error}") from error


def iter_parquet(path: Path, limits: FileLimits) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file.

    Raises:
        DataError: pyarrow is missing, the file is damaged, or it is larger than `limits` allow once decoded.
    """
    arrow, parquet = import_pyarrow("pyarrow"), import_pyarrow("pyarrow.parquet")
    size = 0
    with open_file(path) as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=_ROWS):
                size += batch.nbytes
                if size > limits.max_bytes:
                    raise DataError(f"{path} has more than {limits.max_bytes} bytes once decoded, the limit; split it")
                yield from (_without_nulls(row) for row in batch.to_pylist())
        # pyarrow reports damage in many ways, OSError among them; none of them is the disk's.
        except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is a damaged parquet file: {error}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
