"""Which side does which work in a round, and in which order: A B A B, round by round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loquetier.bench.traffic import Traffic
from loquetier.bench.workload import Workload

Step = tuple[str, str]
"""A side and its task."""

HTTP: tuple[Step, ...] = (
    ("ours-http", "decode"),
    ("ours-http", "base"),
    ("vllm-lora", "decode"),
    ("vllm", "base"),
    ("ours-http", "decode"),
    ("ours-http", "base"),
    ("ours-http", "mixed"),
    ("ours-http", "single"),
    ("vllm", "single"),
    ("ours-http", "prefill"),
    ("vllm", "prefill"),
)
IN_PROCESS: tuple[Step, ...] = (
    ("ours", "roofline"),
    ("ours", "single"),
    ("ours", "decode"),
    ("ours", "base"),
    ("ours", "mixed"),
    ("peft", "decode"),
    ("ours", "decode"),
    ("ours", "base"),
    ("ours", "mixed"),
    ("ours", "prefill"),
    ("peft", "prefill"),
    ("ours", "train"),
    ("peft", "train"),
    ("ours", "both"),
    ("ours-steps", "overhead"),
)
"""Our short measurements stand on both sides of a peer's long one; a round's value is then their mean."""

TRAINING: tuple[Step, ...] = (
    ("ours-train", "train"),
    ("peft-train", "train"),
    ("ours-train", "pair"),
    ("ours-train", "pair_of_4"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a result is made of. Results of equal plans may be continued."""

    base: str = "smollm2-135m"
    dtype: str = "auto"
    threads: int = 2
    peers: tuple[str, ...] = ("peft", "vllm")
    """Besides us: "peft", "vllm"."""
    servers: bool = True
    """Measure servers too."""
    training: bool = True
    """Measure fine-tuning with its memory; PEFT's side takes 4 to 8 GB."""
    data: Path | None = None
    """GSM8K's training file; None: random words of the same lengths."""
    traffic: Traffic = field(default_factory=Traffic)
    workload: Workload = field(default_factory=Workload)
    """Training examples of the rows in which serving and training meet."""

    @property
    def steps(self) -> list[Step]:
        """One round."""
        found = [*(HTTP if self.servers else ()), *IN_PROCESS, *(TRAINING if self.training else ())]
        return [step for step in found if self.has(step[0])]

    def has(self, side: str) -> bool:
        """Whether a side takes part."""
        kind = side.split("-")[0]
        return kind == "ours" or kind in self.peers

    def as_json(self) -> dict[str, Any]:
        """For the result."""
        return asdict(self) | {"data": None if self.data is None else self.data.name, "peers": list(self.peers)}


def left(steps: Sequence[Step], samples: Sequence[dict[str, Any]], number: int) -> list[tuple[int, str, str]]:
    """Steps of round `number` that have no sample yet, each with a number of its own for drawing its prompts."""
    done = Counter((s["side"], s["task"]) for s in samples if s["round"] == number)
    found: list[tuple[int, str, str]] = []
    seen: Counter[Step] = Counter()
    for step in steps:
        if seen[step] >= done[step]:
            found.append((10 * number + seen[step], *step))
        seen[step] += 1
    return found
