"""The benchmark's work on our engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from loquetier.adapters.peft_io import read_adapter
from loquetier.adapters.spec import LoraSpec
from loquetier.base.loading import LoadedBase
from loquetier.base.model import Base
from loquetier.bench.workload import Workload
from loquetier.config import EngineConfig, SamplingParams, TrainingConfig
from loquetier.engine.engine import Engine


class Ours:
    """One engine that serves, trains, and does both at once."""

    def __init__(self, loaded: LoadedBase, config: EngineConfig, workload: Workload) -> None:
        self.engine = Engine(Base(loaded), config)
        self.workload = workload
        self._prompts = workload.prompts(self.engine.base.vocab_size)
        self._examples = workload.examples(self.engine.base.vocab_size)

    def load(self, adapters: Mapping[str, Path]) -> None:
        """Serve these PEFT directories."""
        for name, path in adapters.items():
            weights = read_adapter(path, self.engine.base.targets)
            self.engine.adapters.load(name, weights.spec, weights.modules, weights.factors)

    def serve(self, *, on_adapters: bool = True) -> float:
        """Seconds to answer every request."""
        self._submit(on_adapters)
        return self._run()

    def train(self) -> float:
        """Seconds to train one adapter on every example once."""
        self._start_job()
        return self._run()

    def both(self) -> float:
        """Seconds to do both, in the same steps."""
        self._submit(on_adapters=True)
        self._start_job()
        return self._run()

    def _submit(self, on_adapters: bool) -> None:
        w = self.workload
        params = SamplingParams(temperature=0, max_tokens=w.new_tokens, ignore_eos=True)
        for i, prompt in enumerate(self._prompts):
            model = f"a{i % w.num_adapters}" if on_adapters else self.engine.base.name
            self.engine.add_request(prompt, model, params, lambda event: None)

    def _start_job(self) -> None:
        w = self.workload
        config = TrainingConfig(batch_size=w.batch_size, shuffle=False, publish="end", learning_rate=1e-4)
        spec = LoraSpec(r=w.rank, alpha=2.0 * w.rank)
        name = f"trained-{self.engine.totals.steps}"
        self.engine.jobs.start(name, spec, config, self._examples, (), lambda job, record: None)

    def _run(self) -> float:
        started = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        seconds = time.perf_counter() - started
        for name in [n for n in self.engine.registry.names if n.startswith("trained-")]:
            self.engine.adapters.unload(name)
        return seconds
