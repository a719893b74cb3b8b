"""What every side is asked: the same prompts, adapters and lengths; fresh prompts in every round.

Prompts are random token ids, so that nothing needs a data set and no prefix cache can answer for an earlier round.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loquetier.adapters.spec import LinearTarget
from loquetier.bench.workload import write_random_adapter

TaskName = Literal["decode", "base", "mixed", "single", "prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request."""

    model: str | None
    """An adapter's name; None = the base."""
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Sizes of the requests of one round. Greedy, and no answer ends early."""

    streams: int = 16
    """Requests at once."""
    adapters: int = 4
    """Request i of ``decode`` runs on adapter ``i % adapters``."""
    rank: int = 8
    mixed_ranks: tuple[int, ...] = (4, 8, 16, 64) * 4
    """Ranks of the adapters of ``mixed``, one per request."""
    new_tokens: int = 64
    shortest_prompt: int = 32
    longest_prompt: int = 200
    long_prompt: int = 1000
    """Tokens of the prompt of ``prefill``, which is answered with one token."""
    seed: int = 0

    @property
    def uniform_names(self) -> tuple[str, ...]:
        """Adapters of ``decode``."""
        return tuple(f"a{i}" for i in range(self.adapters))

    @property
    def mixed_names(self) -> tuple[str, ...]:
        """Adapters of ``mixed``."""
        return tuple(f"m{i}" for i in range(len(self.mixed_ranks)))

    def asks(self, task: TaskName, draw: int, allowed: Sequence[int], new_tokens: int | None = None) -> list[Ask]:
        """The requests of `task`, the same for every side.

        Args:
            draw: chooses the prompts' tokens, other ones for each task; their lengths are those of every draw.
            allowed: token ids that prompts are made of.
            new_tokens: instead of the task's own, for a warm-up.
        """
        tokens = random.Random(f"{self.seed} {task} {draw}")
        one = new_tokens or self.new_tokens
        if task == "prefill":
            return [Ask(model=None, prompt=_draw(tokens, allowed, self.long_prompt), new_tokens=1)]
        if task == "single":
            return [Ask(model=None, prompt=_draw(tokens, allowed, self.shortest_prompt), new_tokens=one)]
        names: tuple[str | None, ...] = {
            "decode": self.uniform_names,
            "mixed": self.mixed_names,
            "base": (None,),
        }[task]
        return [
            Ask(model=names[i % len(names)], prompt=_draw(tokens, allowed, length), new_tokens=one)
            for i, length in enumerate(self.lengths)
        ]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each stream's prompt."""
        rng = random.Random(self.seed)
        return [rng.randint(self.shortest_prompt, self.longest_prompt) for _ in range(self.streams)]

    def write_adapters(self, targets: tuple[LinearTarget, ...], directory: Path) -> dict[str, Path]:
        """PEFT directories of all adapters, on every linear, by name."""
        ranks = dict.fromkeys(self.uniform_names, self.rank) | dict(
            zip(self.mixed_names, self.mixed_ranks, strict=True)
        )
        for number, (name, rank) in enumerate(ranks.items()):
            write_random_adapter(directory / name, targets, rank, self.seed + number)
        return {name: directory / name for name in ranks}


def _draw(rng: random.Random, allowed: Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(rng.choices(allowed, k=length))
