"""Reading training files. JSON lines, one record a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loquetier.errors import DataError


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file; a BOM, CRLF and blank lines are accepted.

    Raises:
        DataError: not readable as UTF-8, or a line that is not a JSON dictionary, by its 1-based number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}: expected JSONL, where every line is a JSON dictionary. "
                f"Line {number} is a {type(record).__name__}."
            )
        records.append(record)
    return records
