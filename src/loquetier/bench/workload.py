"""What the benchmark asks of everybody: the same prompts, the same adapters, the same training examples."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from loquetier.adapters.peft_write import write_adapter
from loquetier.adapters.spec import LinearTarget, LoraSpec, resolve_modules
from loquetier.training.data import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes of one round."""

    num_requests: int = 8
    num_adapters: int = 4
    new_tokens: int = 32
    num_examples: int = 12
    batch_size: int = 4
    rank: int = 8
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Prompts of 32 to 128 random tokens; request i runs on adapter ``i % num_adapters``."""
        rng = random.Random(self.seed)
        return [[rng.randrange(5, vocab_size) for _ in range(rng.randint(32, 128))] for _ in range(self.num_requests)]

    def examples(self, vocab_size: int) -> tuple[Example, ...]:
        """Examples of 32 to 256 random tokens, a third of each prompt without loss: lengths as in instruction data."""
        rng = random.Random(self.seed + 1)
        examples = []
        for _ in range(self.num_examples):
            length = rng.randint(32, 256)
            tokens = tuple(rng.randrange(5, vocab_size) for _ in range(length))
            examples.append(Example(tokens, tuple(i >= length // 3 for i in range(length))))
        return tuple(examples)

    @property
    def output_tokens(self) -> int:
        """Tokens generated per round."""
        return self.num_requests * self.new_tokens


def write_adapters(workload: Workload, targets: tuple[LinearTarget, ...], directory: Path) -> dict[str, Path]:
    """PEFT directories with small random weights on every linear, so that both sides read the same files."""
    paths = {f"a{i}": directory / f"a{i}" for i in range(workload.num_adapters)}
    for number, path in enumerate(paths.values()):
        write_random_adapter(path, targets, workload.rank, workload.seed + number)
    return paths


def write_random_adapter(directory: Path, targets: tuple[LinearTarget, ...], rank: int, seed: int) -> None:
    """One PEFT directory: LoRA of `rank` on every linear, both factors small and random, so that it changes answers."""
    spec = LoraSpec(r=rank, alpha=2.0 * rank)
    modules = resolve_modules(spec, targets)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        m.target.path: (
            torch.randn(m.rank, m.target.in_features, generator=generator) * 0.02,
            torch.randn(m.target.out_features, m.rank, generator=generator) * 0.02,
        )
        for m in modules
    }
    write_adapter(directory, spec=spec, modules=modules, factors=factors, base_name=None)
