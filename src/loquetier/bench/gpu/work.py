"""The requests, adapters and jobs of the sections, on one engine."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.bench.gpu.shapes import Shape, wait
from loquetier.config import SamplingParams, TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.engine.request import TokenEvent
from loquetier.errors import EngineError, LoquetierError
from loquetier.training.data import Example
from loquetier.training.job import FinetuneJob, StepRecord


@dataclass(slots=True)
class Heard:
    """When the tokens of one request came."""

    times: list[float] = field(default_factory=list)
    error: LoquetierError | None = None

    def __call__(self, event: TokenEvent) -> None:
        """The request's sink."""
        self.error = self.error or event.error
        if event.token_id is not None:
            self.times.append(time.perf_counter())


def load_adapters(engine: Engine, ranks: Sequence[int], prefix: str) -> list[str]:
    """Random all-linear adapters, drawn on the device; returns their names."""
    names = []
    for number, rank in enumerate(ranks):
        spec = LoraSpec(r=rank, alpha=2.0 * rank)
        modules = resolve_modules(spec, engine.base.targets)
        generator = torch.Generator(engine.base.device).manual_seed(number)

        def draw(*size: int, _from: torch.Generator = generator) -> torch.Tensor:
            return 0.01 * torch.randn(*size, generator=_from, device=_from.device)

        factors = {
            m.target.path: (draw(rank, m.target.in_features), draw(m.target.out_features, rank)) for m in modules
        }
        names.append(f"{prefix}{number}")
        engine.adapters.load(names[-1], spec, modules, factors)
    return names


def prompts(shape: Shape, count: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, lengths spread over the shape's range."""
    rng = random.Random(seed)
    return [[rng.randrange(3, shape.vocab) for _ in range(rng.randint(*shape.prompt))] for _ in range(count)]


def submit(engine: Engine, shape: Shape, count: int, models: Sequence[str], new_tokens: int = 0) -> list[Heard]:
    """Greedy requests that never stop early, spread over the models in turn."""
    heard = []
    for number, prompt in enumerate(prompts(shape, count)):
        params = SamplingParams(temperature=0, max_tokens=new_tokens or shape.new_tokens, ignore_eos=True)
        heard.append(Heard())
        engine.add_request(prompt, models[number % len(models)], params, heard[-1])
    return heard


def check(heard: Sequence[Heard], tokens: int) -> None:
    """Every request got all its tokens. Raises EngineError."""
    for h in heard:
        if h.error is not None or len(h.times) != tokens:
            raise EngineError(f"a request got {len(h.times)} of {tokens} tokens: {h.error}")


def examples(shape: Shape, count: int, seed: int = 0, tokens: int = 0) -> tuple[Example, ...]:
    """Random examples, each token but the first a label."""
    rng, length = random.Random(seed), tokens or shape.train_tokens
    return tuple(
        Example(tuple(rng.randrange(3, shape.vocab) for _ in range(length)), (True,) * length) for _ in range(count)
    )


def start_job(engine: Engine, name: str, rows: Sequence[Example], batch: int, steps: int) -> list[StepRecord]:
    """A rank-8 job; returns the list that its records are appended to."""
    records: list[StepRecord] = []

    def listen(_job: FinetuneJob, record: StepRecord | None) -> None:
        if record is not None:
            records.append(record)

    config = TrainingConfig(batch_size=batch, max_steps=steps, shuffle=False, publish="end", learning_rate=1e-4)
    engine.jobs.start(name, LoraSpec(r=8, alpha=16.0), config, tuple(rows), (), listen)
    return records


def run(engine: Engine, shape: Shape) -> float:
    """Seconds until nothing is left to do."""
    wait(shape)
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    wait(shape)
    engine.check_integrity()
    return time.perf_counter() - started
