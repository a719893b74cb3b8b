"""`python -m loquetier.bench.stream_gap`: seconds between two tokens of a stream while a long example trains beside it.

One greedy stream on the base; one job with one long example on the replay tape. Gaps are taken from the example's first
rows to the last of its forward, and over as many steps of its backward; then the job is cancelled. A short job runs
first, so that the cost model has data. `--windows 0` lets the forward run in one step, as without windows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from random import Random
from typing import Any

import torch

from loquetier.adapters.spec import LoraSpec
from loquetier.base.loading import load_base
from loquetier.base.model import Base
from loquetier.config import MIB, EngineConfig, SamplingParams, TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.errors import EngineError
from loquetier.training.data import Example
from loquetier.training.job import FinetuneJob, JobStatus

WARM_UP_STEPS = 12


class _Bench:
    def __init__(self, base: str, tokens: int, windows: int, budget: float | None) -> None:
        loaded = load_base(base, dtype=torch.float32, device="cpu")
        config = EngineConfig(
            dtype="float32",
            device="cpu",
            kv_memory=256 * MIB,
            adapter_memory=256 * MIB,
            tape="replay",
            max_train_rows=windows or tokens,
            max_rows=2 * tokens,
            step_time_budget=budget,
        )
        self.engine = Engine(Base(loaded), config)
        self._rng = Random(0)
        self._tokens = tokens
        self._seen: list[float] = []

    def run(self) -> dict[str, Any]:
        """Seconds: gaps between the stream's tokens, alone and by phase of the long example."""
        params = SamplingParams(temperature=0, max_tokens=4096, ignore_eos=True)
        prompt = [self._rng.randrange(5, self.engine.base.vocab_size) for _ in range(16)]
        request = self.engine.add_request(
            prompt, self.engine.base.name, params, lambda event: self._seen.append(time.perf_counter())
        )
        for _ in range(WARM_UP_STEPS):
            self.engine.step()
        alone = self._gaps()
        warm_up = self._start("warm-up", 48, WARM_UP_STEPS)
        while not warm_up.status.is_final:
            self.engine.step()
        job = self._start("long", self._tokens, 1)
        self._gaps()
        steps, started = 0, time.perf_counter()
        while not self.engine.trainer.tape or self.engine.trainer.forward_left:
            self.engine.step()
            steps += 1
        seconds, forward = time.perf_counter() - started, self._gaps()
        for _ in range(WARM_UP_STEPS):
            self.engine.step()
        backward = self._gaps()
        self.engine.jobs.set_status(job, JobStatus.CANCELLED)
        self.engine.abort_request(request.request_id)
        self.engine.check_integrity()
        phases = {"alone": alone, "forward": forward, "backward": backward}
        return {"forward_steps": steps, "forward_seconds": seconds} | {
            f"{name}_{kind}": round(of(gaps), 4)
            for name, gaps in phases.items()
            for kind, of in (("median", statistics.median), ("longest", max))
        }

    def _start(self, name: str, tokens: int, steps: int) -> FinetuneJob:
        drawn = tuple(self._rng.randrange(5, self.engine.base.vocab_size) for _ in range(tokens))
        example = Example(drawn, (True,) * tokens)
        config = TrainingConfig(batch_size=1, max_steps=steps, publish="end")
        return self.engine.jobs.start(name, LoraSpec(r=8), config, (example,), (), lambda job, record: None)

    def _gaps(self) -> list[float]:
        """Between the tokens since the last call."""
        gaps = [b - a for a, b in zip(self._seen[:-1], self._seen[1:], strict=True)]
        self._seen = self._seen[-1:]
        if not gaps:
            raise EngineError("the stream got no two tokens in this phase")
        return gaps


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--windows", type=int, default=EngineConfig().max_train_rows, help="max_train_rows; 0 = one step"
    )
    parser.add_argument("--budget", type=float, help="step_time_budget in seconds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = _Bench(args.base, args.tokens, args.windows, args.budget).run()
    print(json.dumps({"tokens": args.tokens, "windows": args.windows, "budget": args.budget} | result, indent=1))


if __name__ == "__main__":
    main()
