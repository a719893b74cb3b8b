"""What both sides of the learning comparison are told, and what each gives back."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loquetier.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRun:
    """The settings of one fine-tuning, the same for everybody. float32, LoRA on all linears, no dropout, AdamW."""

    base: str = "smollm2-135m"
    steps: int = 60
    """Optimizer steps; each example is seen once."""
    batch_size: int = 2
    """Examples per micro-batch."""
    accumulation: int = 2
    """Micro-batches per optimizer step."""
    learning_rate: float = 5e-4
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    rank: int = 8
    alpha: int = 16
    max_tokens: int = 512
    """Longer examples are cut at the end."""
    held_out: int = 24
    """Examples that are never trained on."""
    eval_every: int = 15
    """Optimizer steps between two looks at the held-out part; there is one before the first step too."""
    seed: int = 0
    """Chooses and orders the examples, and seeds the initial weights."""

    @property
    def num_train(self) -> int:
        """Examples trained on."""
        return self.steps * self.batch_size * self.accumulation


@dataclass(slots=True)
class Curve:
    """Losses are means over labelled tokens: of the whole optimizer step, before its update; of the held-out part."""

    train_loss: list[float] = field(default_factory=list)
    """Of step 1, 2, ..."""
    held_out_loss: list[tuple[int, float]] = field(default_factory=list)
    """(optimizer steps done, loss)."""


Records = Sequence[Mapping[str, str]]
"""Prompt-completion records."""


def read_gsm8k(path: Path, run: LearningRun) -> tuple[Records, Records, dict[str, Any]]:
    """Training records in their order, held-out records, and which file they came from.

    Raises:
        DataError: no such file, not UTF-8, not GSM8K's format, or too few examples.
    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").split("\n")  # not splitlines: a JSON string may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path.name!r}: {error}. Give the path of GSM8K's training file in JSON lines with "
            "'question' and 'answer': grade_school_math/data/train.jsonl of the repository openai/grade-school-math"
        ) from error
    wanted = run.num_train + run.held_out
    records = [_record(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if len(records) < wanted:
        raise DataError(
            f"{path.name!r} has {len(records)} examples, the run needs {wanted}: {run.num_train} to train on and "
            f"{run.held_out} held out. Lower steps, batch_size, accumulation or held_out."
        )
    chosen = random.Random(run.seed).sample(records, wanted)
    source = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), "examples": len(records)}
    return chosen[run.held_out :], chosen[: run.held_out], source


def _record(line: str, number: int) -> dict[str, str]:
    try:
        row = json.loads(line)
        question, answer = row["question"], row["answer"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"line {number} is not a JSON object with 'question' and 'answer': {error!r}") from error
    # The completion begins with a space, so that no token straddles the border.
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}
