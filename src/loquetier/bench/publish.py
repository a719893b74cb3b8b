"""`python -m loquetier.bench.publish`: how long a publish holds up the engine, beside one plain copy of the same bytes.

Both are timed between the engine's steps, where publishes happen: with nothing else to do, and while streams are being
answered. Under load the copy is timed right after a step too, since what the step left of the caches counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loquetier.adapters.spec import LoraSpec
from loquetier.base.loading import load_base
from loquetier.base.model import Base
from loquetier.bench.run import commit, machine
from loquetier.bench.workload import Workload
from loquetier.config import MIB, EngineConfig, SamplingParams, TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.training.job import FinetuneJob, JobStatus

TARGET_MS = 2.0
"""A publish shall take less than this plus one copy."""


class PublishBench:
    """One engine with one job (r, all-linear) that stands still: only its publishes run."""

    def __init__(self, base: str, dtype: str, rank: int) -> None:
        self.engine = Engine(
            Base(load_base(base, dtype=getattr(torch, dtype), device="cpu")),
            EngineConfig(dtype=dtype, device="cpu", kv_memory=256 * MIB, adapter_memory=512 * MIB),  # type: ignore[arg-type]
        )
        examples = Workload(num_examples=1).examples(self.engine.base.vocab_size)
        config, spec = TrainingConfig(publish="every_step"), LoraSpec(r=rank, alpha=2.0 * rank)
        self.job: FinetuneJob = self.engine.jobs.start("job", spec, config, examples, (), lambda job, record: None)
        self.engine.jobs.set_status(self.job, JobStatus.PAUSED)
        arena = self.engine.arena
        self._weights = arena.flat(self.job.slot)
        self._copied = torch.empty_like(self._weights)
        self.num_bytes = arena.slot_bytes(self.job.slot)

    def publish(self) -> None:
        """What ends an optimizer step of a job that publishes."""
        self.engine.jobs.publisher.publish(self.job)

    def copy(self) -> None:
        """The adapter's bytes, once, to memory that was written before."""
        self._copied.copy_(self._weights)

    def idle(self, count: int) -> dict[str, list[float]]:
        """Milliseconds of `count` publishes and copies, in turn."""
        return _in_turn(count, {"publish": self.publish, "copy": self.copy}, lambda: None)

    def streaming(self, count: int, streams: int) -> dict[str, list[float]]:
        """The same, each after a step in which every stream got a token; half of the streams run on the adapter."""
        params = SamplingParams(temperature=0, max_tokens=2 * count + 64, ignore_eos=True)
        for i in range(streams):
            model = self.job.name if i % 2 else self.engine.base.name
            self.engine.add_request([5 + i] * 32, model, params, lambda event: None)
        while self.engine.scheduler.num_waiting or self.engine.totals.decode_rows == 0:
            self.engine.step()
        milliseconds = _in_turn(count, {"publish": self.publish, "copy": self.copy}, self.engine.step)
        for request_id in list(self.engine.serving.requests):
            self.engine.abort_request(request_id)
        return milliseconds


def _in_turn(
    count: int, tasks: dict[str, Callable[[], object]], between: Callable[[], object]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(count):
        for name, task in tasks.items():
            between()
            started = time.perf_counter()
            task()
            found[name].append(1000 * (time.perf_counter() - started))
    return found


def summarize(milliseconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and extremes, and whether the medians meet the target."""
    result: dict[str, Any] = {
        f"{name}_ms": {"median": statistics.median(m), "min": min(m), "max": max(m), "count": len(m)}
        for name, m in milliseconds.items()
    }
    over = result["publish_ms"]["median"] - result["copy_ms"]["median"]
    return result | {"publish_over_copy_ms": over, "meets_target": over < TARGET_MS}


def measure(base: str, dtype: str, rank: int, count: int, streams: int) -> dict[str, Any]:
    """Run both parts; JSON-ready."""
    bench = PublishBench(base, dtype, rank)
    bench.idle(3)  # the first publishes touch memory for the first time
    idle, streaming = bench.idle(count), bench.streaming(count, streams)
    publisher = bench.engine.jobs.publisher
    return {
        "machine": machine(),
        "commit": commit(),
        "base": base,
        "dtype": dtype,
        "rank": rank,
        "streams": streams,
        "adapter_bytes": bench.num_bytes,
        "target_ms_over_copy": TARGET_MS,
        "idle": summarize(idle),
        "streaming": summarize(streaming),
        "engine_says": {"publishes": publisher.count, "mean_ms": 1000 * publisher.took.total / publisher.count},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--count", type=int, default=60, help="Publishes, and copies, per part.")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("bench-output/publish.json"))
    args = parser.parse_args()
    result = measure(args.base, args.dtype, args.rank, args.count, args.streams)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
