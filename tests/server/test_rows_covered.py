"""Every row of the table of hostile inputs that applies here is a test that carries its number."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROWS = range(1, 53)
NOT_APPLICABLE = {50: "there is no dashboard: nothing that a client sends is ever shown as HTML"}
_NAME = re.compile(r"test_row_([0-9]+)_[a-z]")


def rows_of(root: Path) -> dict[int, list[str]]:
    """Row -> the tests that carry its number, as file::name."""
    found: dict[int, list[str]] = {}
    for path in sorted(root.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (match := _NAME.match(node.name)):
                found.setdefault(int(match[1]), []).append(f"{path.name}::{node.name}")
    return found


def test_every_row_has_a_test() -> None:
    found = rows_of(Path(__file__).parents[1])
    assert sorted(set(ROWS) - found.keys()) == sorted(NOT_APPLICABLE), "rows without a test, or no longer without one"
    assert found.keys() <= set(ROWS), "numbers that the table does not have"
