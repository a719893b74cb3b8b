"""`loquetier bench`: our engine and PEFT do the same work in turn, A B A B; medians, spread and ratios, as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loquetier.base.hardware import detect_hardware
from loquetier.base.loading import load_base
from loquetier.bench.ours import Ours
from loquetier.bench.peft_peer import PeftPeer
from loquetier.bench.workload import Workload, write_adapters
from loquetier.config import EngineConfig, resolve


def run(
    base: str,
    *,
    dtype: str,
    rounds: int,
    with_peer: bool,
    tell: Callable[[str], None],
    workload: Workload | None = None,
) -> dict[str, Any]:
    """Measure and return the result; `tell` gets one line per measurement."""
    workload = workload or Workload()
    config = resolve(
        # No prefix cache: rounds repeat the same prompts, which the peer computes each time.
        EngineConfig(dtype=dtype, kv_memory=1 << 30, adapter_memory=1 << 29, prefix_cache=False),  # type: ignore[arg-type]
        detect_hardware(),
    )
    torch_dtype = getattr(torch, config.dtype)
    ours = Ours(load_base(base, dtype=torch_dtype, device=config.device), config, workload)
    with tempfile.TemporaryDirectory() as directory:
        adapters = write_adapters(workload, ours.engine.base.targets, Path(directory))
        ours.load(adapters)
        # A second copy of the base: surgery changes the first, and the peer must run on the untouched model.
        peer = None
        if with_peer:
            peer = PeftPeer(load_base(base, dtype=torch_dtype, device=config.device), adapters, workload)
    tasks: dict[str, Callable[[], float]] = {
        "serve_base": lambda: ours.serve(on_adapters=False),
        "serve": ours.serve,
        "train": ours.train,
        "both": ours.both,
    }
    if peer is not None:
        tasks |= {"peft_serve": peer.serve, "peft_train": peer.train}
    seconds = _interleaved(tasks, rounds, tell)
    return {
        "machine": machine(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "base": base,
        "dtype": config.dtype,
        "rounds": rounds,
        "workload": asdict(workload) | {"train_tokens": _train_tokens(ours)},
        "seconds": seconds,
        "summary": summarize(seconds, workload.output_tokens, _train_tokens(ours)),
    }


def _interleaved(
    tasks: dict[str, Callable[[], float]], rounds: int, tell: Callable[[str], None]
) -> dict[str, list[float]]:
    for name, task in tasks.items():
        tell(f"warm-up {name}: {task():.2f} s")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(rounds):
        for name, task in tasks.items():
            seconds[name].append(task())
            tell(f"round {i + 1}/{rounds} {name}: {seconds[name][-1]:.2f} s")
    return seconds


def summarize(seconds: dict[str, list[float]], output_tokens: int, train_tokens: int) -> dict[str, float]:
    """Rates from medians. A peer's "both" is what one has today: serve, then train, one after the other."""
    m = {name: statistics.median(values) for name, values in seconds.items()}
    summary = {
        "serve_tokens_per_s": output_tokens / m["serve"],
        "serve_base_tokens_per_s": output_tokens / m["serve_base"],
        "lora_tax": 1 - m["serve_base"] / m["serve"],
        "train_tokens_per_s": train_tokens / m["train"],
        "both_seconds": m["both"],
        "one_after_the_other_seconds": m["serve"] + m["train"],
    }
    if "peft_serve" in m:
        summary |= {
            "peft_serve_tokens_per_s": output_tokens / m["peft_serve"],
            "peft_train_tokens_per_s": train_tokens / m["peft_train"],
            "peft_both_seconds": m["peft_serve"] + m["peft_train"],
            "serve_ratio": m["peft_serve"] / m["serve"],
            "train_ratio": m["peft_train"] / m["train"],
            "both_ratio": (m["peft_serve"] + m["peft_train"]) / m["both"],
        }
    return summary


def _train_tokens(ours: Ours) -> int:
    return sum(e.num_rows for e in ours.workload.examples(ours.engine.base.vocab_size))


def machine() -> dict[str, Any]:
    """What a result must say about where it was measured."""
    import transformers

    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """Short hash of the checked-out commit, if any."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def save(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
