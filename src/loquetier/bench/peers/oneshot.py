"""Measurements that live in a process each: training, for its peak of memory, and steps timed kernel by kernel."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loquetier.errors import EngineError

TRAINING: Mapping[tuple[str, str], tuple[str, dict[str, int]]] = {
    ("ours-train", "train"): ("ours", {"batch_size": 8, "steps": 2}),
    ("peft-train", "train"): ("peer", {"batch_size": 8, "steps": 1}),
    ("ours-train", "pair"): ("pair", {"batch_size": 1, "steps": 7}),
    ("ours-train", "pair_of_4"): ("pair", {"batch_size": 4, "steps": 1}),
}
"""What `loquetier.bench.training_sides` calls a side's task, and its sizes; one more step warms up. They are small, so
that three rounds of everything stay below 12 minutes on two cores."""

_WORDS = """
the a one two three six ten has have and of to in for each with how many much more than apples books boxes dollars hours
days week school children friends store buys sells gives left total money paid per cost costs half twice so
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShot:
    """Runs a process per measurement; it warms itself up.

    Raises:
        EngineError: the process failed; the end of what it printed is in the message.
    """

    side: str
    """"ours-train", "peft-train" or "ours-steps"."""
    python: Path
    environ: Mapping[str, str]
    threads: int
    base: str
    dtype: str
    data: Path
    """GSM8K's training file, or one like it."""
    directory: Path
    """For files between the processes."""

    def run(self, task: str, draw: int, new_tokens: int | None = None) -> dict[str, Any]:
        """One measurement; nothing where a warm-up is asked for."""
        if new_tokens is not None:
            return {}
        return self._steps() if self.side == "ours-steps" else self._training(task)

    def _training(self, task: str) -> dict[str, Any]:
        name, sizes = TRAINING[self.side, task]
        order = {"data": str(self.data.absolute()), "base": self.base, "dtype": self.dtype} | sizes
        printed = self._call("training_sides", name, json.dumps(order), "--threads", str(self.threads))
        found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
        return {key: value for key, value in found.items() if key not in ("task", "threads", "losses")}

    def _steps(self) -> dict[str, Any]:
        output = self.directory / "overhead.json"
        self._call("overhead", "--base", self.base, "--dtype", self.dtype, "--case", CASE, "--output", str(output))
        rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
        (row,) = (r for r in rows if r["case"] == CASE)
        return {"overhead": row["overhead"], "step_s": row["step_ms"] / 1e3, "kernels_s": row["kernels_ms"] / 1e3}

    def _call(self, module: str, *arguments: str) -> str:
        command = [str(self.python), "-m", f"loquetier.bench.{module}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(self.environ))
        if done.returncode:
            raise EngineError(f"{self.side} failed (exit code {done.returncode}): {done.stderr.strip()[-800:]}")
        return done.stdout


CASE = "16 streams, 4 adapters r=8"
"""Of `loquetier.bench.overhead`."""


def write_examples(path: Path, count: int, seed: int = 0) -> None:
    """Questions and answers of random words in GSM8K's format, about as long as its own."""
    rng, words = random.Random(seed), _WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            question = " ".join(rng.choices(words, k=rng.randint(25, 75)))
            answer = " ".join(rng.choices(words, k=rng.randint(50, 170)))
            print(json.dumps({"question": question, "answer": answer}), file=file)
