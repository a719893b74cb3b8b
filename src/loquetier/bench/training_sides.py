"""One side of the training benchmark, in a process of its own: `python -m loquetier.bench.training_sides SIDE ...`.

A process for each measurement, so that its peak of resident memory is that side's alone. It prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from loquetier.adapters.spec import LoraSpec
from loquetier.base.loading import load_base
from loquetier.bench.learning import LearningRun, Records, read_gsm8k
from loquetier.bench.live_bytes import resident_bytes
from loquetier.bench.trainer_peer import TrainerPeer
from loquetier.config import EngineConfig, TrainingConfig
from loquetier.finetuning import FinetuneHandle
from loquetier.runtime import Runtime
from loquetier.training.data import encode_examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a side is asked to train. The first optimizer step warms up; the others are timed."""

    data: str
    base: str = "smollm2-135m"
    dtype: str = "bfloat16"
    steps: int = 3
    batch_size: int = 8
    rank: int = 8
    max_tokens: int = 512
    seed: int = 0
    autocast: bool = True
    """The peer's Trainer runs under ``bf16=True``, the faster way on bfloat16 weights."""

    def run(self) -> LearningRun:
        """The same in the words of the learning comparison, whose peer and data these are."""
        return LearningRun(
            base=self.base, steps=self.steps + 1, batch_size=self.batch_size, accumulation=1, warmup_ratio=0.0,
            schedule="constant", rank=self.rank, alpha=2 * self.rank, max_tokens=self.max_tokens, held_out=0,
            seed=self.seed,
        )  # fmt: skip


def ours(task: Task) -> dict[str, Any]:
    """One job on our runtime, as `loquetier finetune` runs it."""
    with _runtime(task) as runtime:
        times: list[float] = []
        handle = _start(runtime, task, _records(task), "one", lambda: times.append(time.perf_counter()))
        history = handle.wait()
        tape = handle.estimate.tape if handle.estimate is not None else None
    return _timed([r.num_tokens for r in history], [r.loss for r in history], times) | {"tape": tape}


def pair(task: Task) -> dict[str, Any]:
    """Two jobs at once, and the same two one after the other, in turn; wall time from first call to last end."""
    records = _records(task)
    half = len(records) // 2
    seconds: dict[str, list[float]] = {"one_after_the_other": [], "at_once": []}
    with _runtime(task) as runtime:
        tokens = sum(e.num_rows for e in encode_examples(records, runtime.tokenizer, task.max_tokens))
        _start(runtime, task, records[: task.batch_size], "warm").wait()
        for _ in range(2):
            for name, found in seconds.items():
                started = time.perf_counter()
                jobs: list[FinetuneHandle] = []
                for part in (records[:half], records[half:]):
                    jobs.append(_start(runtime, task, part, f"{name}-{len(jobs)}"))
                    if name == "one_after_the_other":
                        jobs[-1].wait()
                for job in jobs:
                    job.wait()
                found.append(time.perf_counter() - started)
    best = {name: min(found) for name, found in seconds.items()}
    return {"tokens": tokens, "seconds": seconds, "gain": best["one_after_the_other"] / best["at_once"]}


def peer(task: Task) -> dict[str, Any]:
    """PEFT and Trainer, stock: same data in the same order, batch and dtype."""
    loaded = load_base(task.base, dtype=getattr(torch, task.dtype), device="cpu")
    trainer = TrainerPeer(loaded, task.run())
    records = _records(task)
    rows = [len(row["input_ids"]) - 1 for row in trainer.encode(records)]
    size = task.batch_size
    times: list[float] = []
    curve = trainer.train(
        records, (), lambda _: None, on_step=lambda: times.append(time.perf_counter()), autocast=task.autocast
    )
    tokens = [sum(rows[at : at + size]) for at in range(0, len(rows), size)]
    return _timed(tokens, curve.train_loss, times)


SIDES: Mapping[str, Callable[[Task], dict[str, Any]]] = {"ours": ours, "peer": peer, "pair": pair}


def _runtime(task: Task) -> Runtime:
    return Runtime(task.base, config=EngineConfig(dtype=task.dtype, device="cpu"))  # type: ignore[arg-type]


def _records(task: Task) -> Records:
    return read_gsm8k(Path(task.data), task.run())[0]


def _start(
    runtime: Runtime, task: Task, records: Records, name: str, on_step: Callable[[], None] = lambda: None
) -> FinetuneHandle:
    run = task.run()
    training = TrainingConfig(
        learning_rate=run.learning_rate, batch_size=task.batch_size, max_grad_norm=run.max_grad_norm,
        max_seq_len=task.max_tokens, shuffle=False, publish="end",
    )  # fmt: skip
    spec = LoraSpec(r=task.rank, alpha=2.0 * task.rank)
    callback = lambda event: on_step() if event.kind == "step" else None  # noqa: E731
    return runtime.finetune(name, records, lora=spec, training=training, callbacks=[callback])


def _timed(tokens: list[int], losses: list[float], times: list[float]) -> dict[str, Any]:
    """Rates of the steps after the first; tokens are rows computed without padding, the same for every side."""
    seconds = [b - a for a, b in pairwise(times)]
    assert len(tokens) == len(losses) == len(times), "one record per optimizer step"
    return {
        "tokens": tokens[1:],
        "seconds": seconds,
        "tokens_per_s": sum(tokens[1:]) / sum(seconds),
        "losses": losses,
    }


def main() -> None:
    """Run one side; the last line of the output is its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("task", help="the fields of `Task` as JSON")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = Task(**json.loads(args.task))
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)  # what a Trainer may leave goes with it
        result = SIDES[args.side](task)
    result |= {"threads": torch.get_num_threads(), "peak_bytes": resident_bytes("VmHWM"), "task": asdict(task)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
