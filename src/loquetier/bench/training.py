"""`python -m loquetier.bench.training gsm8k_train.jsonl`: fine-tuning speed and memory beside PEFT + Trainer.

The sides run in turn, A B A B, each measurement in a process of its own: same base, examples, order, batch, dtype and
threads, stock settings for the peer (its padding included). Rates are unpadded tokens per second of the steps after
the first; memory is the process's peak of resident memory, the loading of the model included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loquetier.bench.run import commit, machine, save
from loquetier.bench.training_sides import Task
from loquetier.errors import EngineError

Tell = Callable[[str], None]


def measure(task: Task, *, rounds: int, threads: int, tell: Tell, with_pair: bool = True) -> dict[str, Any]:
    """The whole comparison; `tell` gets a line per measurement.

    Raises:
        EngineError: a side failed, or the first step's losses say that the sides do not train the same.
    """
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for number in range(rounds):
        for side, found in results.items():
            found.append(measure_side(side, task, threads))
            tell(f"round {number + 1}/{rounds} {side}: {found[-1]['tokens_per_s']:.0f} tok/s, "
                 f"peak {found[-1]['peak_bytes'] / 2**20:.0f} MiB")  # fmt: skip
    _expect_same_work(results["ours"][0], results["peer"][0])
    pairs = {}
    for size in (task.batch_size, 1) if with_pair else ():
        pairs[f"batch_{size}"] = measure_side("pair", _pair_task(task, size), threads)
        tell(f"two jobs, batch {size}: {pairs[f'batch_{size}']['gain']:.2f} times one after the other")
    return {
        "machine": machine()
        | {"threads": threads, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY")}
        | {name: version(name) for name in ("peft", "accelerate")},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "task": asdict(replace(task, data=Path(task.data).name)),
        "results": _without_task(results),
        "pairs": {name: {k: v for k, v in found.items() if k != "task"} for name, found in pairs.items()},
        "summary": summarize(results) | {f"pair_gain_{name}": found["gain"] for name, found in pairs.items()},
    }


def measure_side(side: str, task: Task, threads: int) -> dict[str, Any]:
    """Run one side in its own process. Raises EngineError with what it wrote last."""
    environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
    task = replace(task, data=str(Path(task.data).resolve()))
    command = [sys.executable, "-m", f"{__package__}.training_sides", side, json.dumps(asdict(task))]
    done = subprocess.run(
        [*command, "--threads", str(threads)], capture_output=True, text=True, check=False, env=environ
    )
    if done.returncode:
        raise EngineError(f"{side} failed (exit code {done.returncode}): {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _pair_task(task: Task, batch_size: int) -> Task:
    """Work for two jobs: about as many examples whatever the batch."""
    return replace(task, batch_size=batch_size, steps=max(3, 2 * (task.batch_size // batch_size) - 1))


def _expect_same_work(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    """B is zero at first, so the first loss is the base's own on the same tokens: alike up to bfloat16's rounding."""
    a, b = ours["losses"][0], peer["losses"][0]
    if ours["tokens"] != peer["tokens"] or abs(a - b) > 0.02 * abs(b):
        raise EngineError(
            f"the sides differ: first loss {a:.4f} and {b:.4f}, tokens {ours['tokens']}, {peer['tokens']}"
        )


def _without_task(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    return {side: [{k: v for k, v in r.items() if k != "task"} for r in found] for side, found in results.items()}


def summarize(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians over the rounds, and ours against the peer's."""
    rate = {side: statistics.median(r["tokens_per_s"] for r in found) for side, found in results.items()}
    peak = {side: statistics.median(r["peak_bytes"] for r in found) for side, found in results.items()}
    return {
        **{f"{side}_tokens_per_s": value for side, value in rate.items()},
        **{f"{side}_peak_bytes": value for side, value in peak.items()},
        "speed_ratio": rate["ours"] / rate["peer"],
        "memory_ratio": peak["ours"] / peak["peer"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = Task(data="")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="GSM8K's training file, JSON lines with question and answer")
    parser.add_argument("--base", default=defaults.base)
    parser.add_argument("--dtype", default=defaults.dtype, choices=("bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=defaults.steps, help="timed optimizer steps of a measurement")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-autocast", action="store_true", help="the peer runs without bf16=True")
    parser.add_argument("--no-pair", action="store_true", help="without two jobs at once")
    parser.add_argument("--output", type=Path, default=Path("bench-output/training.json"))
    args = parser.parse_args(arguments)
    task = Task(data=str(args.data), base=args.base, dtype=args.dtype, steps=args.steps, batch_size=args.batch_size,
                autocast=not args.no_autocast)  # fmt: skip
    try:
        result = measure(
            task, rounds=args.rounds, threads=args.threads, with_pair=not args.no_pair,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    except EngineError as error:
        sys.exit(str(error))
    save(result, args.output)
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
