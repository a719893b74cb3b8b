"""The benchmark's work on our engine, in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loquetier.adapters.peft_io import read_adapter
from loquetier.adapters.spec import LoraSpec
from loquetier.base.loading import LoadedBase
from loquetier.base.model import Base
from loquetier.bench import roofline
from loquetier.bench.roofline import ModelSize
from loquetier.bench.traffic import Ask, TaskName, Traffic
from loquetier.bench.workload import Workload
from loquetier.config import EngineConfig, SamplingParams, TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.errors import EngineError


class Ours:
    """One engine that serves, trains, and does both at once."""

    def __init__(self, loaded: LoadedBase, config: EngineConfig, traffic: Traffic, workload: Workload) -> None:
        self.engine = Engine(Base(loaded), config)
        self.size = ModelSize.of(loaded, self.engine.base.targets)
        self._traffic, self._workload = traffic, workload
        self._allowed: Sequence[int] = allowed_tokens(loaded)
        self._examples = workload.examples(self.engine.base.vocab_size)
        self._trained = 0

    def load(self, adapters: Mapping[str, Path]) -> None:
        """Serve these PEFT directories."""
        for name, path in adapters.items():
            weights = read_adapter(path, self.engine.base.targets)
            self.engine.adapters.load(name, weights.spec, weights.modules, weights.factors)

    def run(self, task: str, draw: int, new_tokens: int | None = None) -> dict[str, Any]:
        """One measurement. `new_tokens`: shorter answers, for a warm-up."""
        if task == "roofline":
            return roofline.measure(self.size, self.engine.base.dtype)
        if task == "train":
            self._start_job()
            return {"seconds": self._until_idle(), "tokens": sum(e.num_rows for e in self._examples)}
        if task == "both":
            self._start_job()
            return self.serve("decode", draw, new_tokens)
        assert task in ("decode", "base", "mixed", "single", "prefill"), task
        return self.serve(task, draw, new_tokens)  # type: ignore[arg-type]

    def serve(self, task: TaskName, draw: int, new_tokens: int | None = None) -> dict[str, Any]:
        """Answer the task's requests, submitted together, and end what trains beside them."""
        asks = self._traffic.asks(task, draw, self._allowed, new_tokens)
        arrived: list[list[float]] = [self._submit(ask) for ask in asks]
        started = time.perf_counter()
        seconds = self._until_idle()
        return answered(asks, arrived, started, seconds)

    def _submit(self, ask: Ask) -> list[float]:
        """Times of the answer's tokens, filled while the engine runs."""
        times: list[float] = []
        params = SamplingParams(temperature=0, max_tokens=ask.new_tokens, ignore_eos=True)
        self.engine.add_request(
            list(ask.prompt),
            ask.model or self.engine.base.name,
            params,
            lambda event: times.append(time.perf_counter()),
        )
        return times

    def _start_job(self) -> None:
        w = self._workload
        config = TrainingConfig(batch_size=w.batch_size, shuffle=False, publish="end", learning_rate=1e-4)
        spec = LoraSpec(r=w.rank, alpha=2.0 * w.rank)
        self._trained += 1
        name = f"trained-{self._trained}"
        self.engine.jobs.start(name, spec, config, self._examples, (), lambda job, record: None)

    def _until_idle(self) -> float:
        started = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        seconds = time.perf_counter() - started
        for name in [n for n in self.engine.registry.names if n.startswith("trained-")]:
            self.engine.adapters.unload(name)
        return seconds


def allowed_tokens(loaded: LoadedBase) -> Sequence[int]:
    """Token ids that prompts may be made of: no special ones, where the base has a tokenizer that knows them."""
    special = set(loaded.tokenizer.all_special_ids if loaded.tokenizer is not None else ())
    return [t for t in range(int(loaded.model.config.vocab_size)) if t not in special]


def answered(asks: Sequence[Ask], arrived: Sequence[Sequence[float]], started: float, seconds: float) -> dict[str, Any]:
    """A sample of answers whose tokens came at these times, one list per request.

    Raises:
        EngineError: an answer is not as long as asked.
    """
    for ask, times in zip(asks, arrived, strict=True):
        if len(times) != ask.new_tokens:
            raise EngineError(f"an answer has {len(times)} tokens where {ask.new_tokens} were asked for")
    sample = {
        "seconds": seconds,
        "tokens": tokens_of(asks),
        "first_token_s": statistics.median(times[0] - started for times in arrived),
    }
    if all(ask.new_tokens > 1 for ask in asks):
        sample["token_s"] = statistics.median((t[-1] - t[0]) / (len(t) - 1) for t in arrived)
    return sample


def tokens_of(asks: Sequence[Ask]) -> int:
    """What a sample counts: generated tokens, or the prompt's where one token is asked for (prefill)."""
    return sum(ask.new_tokens if ask.new_tokens > 1 else len(ask.prompt) for ask in asks)


def open_ours(setup: Mapping[str, Any], loaded: LoadedBase, config: EngineConfig) -> Ours:
    """From what the benchmark's main process sends to a worker."""
    ours = Ours(loaded, config, Traffic(**setup["traffic"]), Workload(**setup["workload"]))
    ours.load({name: Path(path) for name, path in setup["adapters"].items()})
    return ours
