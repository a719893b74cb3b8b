"""What README.md shows works: its Python blocks run, and so do the commands it marks as tested.

Marks are HTML comments on the line before a fence, invisible on the page:

    <!-- file: NAME -->   the block is a file that the commands and Python blocks read
    <!-- tested -->       the `loquetier ...` commands of this bash block are run, in order

Blocks run in the order of the page, in one directory, so that a later one may use what an earlier one wrote.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(
    r"(?:^<!--[ ]*(?P<mark>[^\n]*?)[ ]*-->\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    mark: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Command lines of a shell block, continuation lines joined, without comments and prompts."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def blocks(text: str) -> list[Block]:
    return [Block(m["language"], m["mark"] or "", m["text"]) for m in _BLOCK.finditer(text)]


def run(argv: list[str], directory: Path) -> str:
    """Run it, insist on success, return what it printed."""
    # Not `check=True`: the message must show what the reader of the page would have seen.
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(argv, cwd=directory, env=environ, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_blocks_are_found_with_their_marks() -> None:
    page = (
        "<!-- file: a.jsonl -->\n```json\n{}\n```\ntext\n```bash\nmake x\n```\n"
        "<!-- tested -->\n```bash\n$ loquetier a \\\n  --b 'c d'  # e\n```\n"
    )
    found = blocks(page)
    assert [(b.language, b.mark) for b in found] == [("json", "file: a.jsonl"), ("bash", ""), ("bash", "tested")]
    assert found[0].text == "{}\n"
    assert found[2].commands == [["loquetier", "a", "--b", "c d"]]


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_readme_works_as_written(tmp_path: Path) -> None:
    found = blocks(README.read_text(encoding="utf-8"))
    assert any(block.language == "python" for block in found), "README.md shows no Python"
    for number, block in enumerate(found):
        if block.mark.startswith("file:"):
            (tmp_path / block.mark.removeprefix("file:").strip()).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            script = tmp_path / f"block_{number}.py"
            script.write_text(block.text, encoding="utf-8")
            printed = run([sys.executable, script.name], tmp_path)
            for promised in re.findall(r"# +([A-Z]+!)", block.text):  # what a comment says a line prints
                assert promised in printed, f"the page promises {promised!r}, the program printed\n{printed}"
        elif block.mark == "tested":
            for command in block.commands:
                assert command[0] == "loquetier", f"only loquetier commands can be marked as tested, not {command}"
                run([sys.executable, "-c", "from loquetier.cli import main; main()", *command[1:]], tmp_path)
