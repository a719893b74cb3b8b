"""A thousand adapters, room for eight: Zipf traffic, loads, unloads and a job that publishes; every answer is checked.

``python -m tests.scale.zipf`` (``make zipf``) is the whole of it; `make test` runs a small one.

An answer proves its adapter and its version: adapters are random, and the greedy tokens with their log-probabilities
are compared with those that the same weights gave alone in another runtime. `Expected.check_distinct` makes sure that
no two of them could be taken for each other.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tests.tiny import save_tiny

from loquetier import EngineConfig, LoraSpec, Runtime, SamplingParams, TrainingConfig
from loquetier.adapters.peft_write import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from loquetier.adapters.spec import resolve_modules
from loquetier.config import MIB
from loquetier.errors import AdapterNotFoundError
from loquetier.generation import Completion

SPEC = LoraSpec(r=32, alpha=32, target_modules="all-linear")
"""131,072 bytes in the arena on the tiny base: a MiB is room for exactly eight."""
PROMPT = [70, 71, 72, 73]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
TOLERANCE = 2e-3
"""Of a log-probability: the row's neighbours in a batch move it by 1e-4 at most (float32)."""
_TOKENS = [[number % 250 + 5, number * 7 % 250 + 5, number * 31 % 250 + 5] for number in range(400)]
DATA = [{"input_ids": tokens, "labels": tokens} for tokens in _TOKENS]
"""Nothing that could be learnt: the weights never come to rest, and each version says something else."""
LIVE = "live"

Signature = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Scale:
    """How much of it."""

    adapters: int
    requests: int
    job_steps: int
    clients: int = 16
    churned: int = 10
    """Adapters that are unloaded and loaded again, with other weights each time."""
    exponent: float = 1.1


SMALL = Scale(adapters=100, requests=400, job_steps=6, clients=12, churned=4)
FULL = Scale(adapters=1000, requests=10_000, job_steps=100)


@dataclass
class Report:
    """What happened."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    loads: int = 0
    evictions: int = 0
    reloads: int = 0
    load_ms: float = 0.0
    live_versions: int = 0
    most_resident: int = 0
    longest_wait: float = 0.0
    rss_mb: list[float] = field(default_factory=list)
    """At every tenth of the requests."""


def signature(done: Completion) -> Signature:
    answer = done.answers[0]
    assert answer.logprobs is not None
    return tuple(answer.token_ids), tuple(answer.logprobs)


def same(one: Signature, other: Signature) -> bool:
    return one[0] == other[0] and bool(np.allclose(one[1], other[1], atol=TOLERANCE))


@dataclass
class Expected:
    """What each set of weights says, by the directory it was loaded from or the job's version."""

    said: dict[str, Signature] = field(default_factory=dict)

    def check_distinct(self) -> None:
        """No two adapters could be mistaken for each other, and few versions of the job for the one after them."""
        alike = 0
        for (one, a), (other, b) in pairwise(sorted(self.said.items(), key=lambda item: item[1])):
            if same(a, b):
                assert one.startswith(LIVE) and other.startswith(LIVE), f"{one} and {other} say the same"
                alike += 1
        versions = sum(label.startswith(LIVE) for label in self.said)
        assert alike <= versions // 5, f"{alike} of {versions} versions of the job say what another one says"


def make_adapters(base: Path, root: Path, count: int) -> list[Path]:
    """PEFT directories of random adapters, each of its own seed."""
    with Runtime(str(base), config=config()) as runtime:
        modules = resolve_modules(SPEC, runtime._engine.base.targets)
        name = runtime.base_name
    found = []
    for seed in range(count):
        g = torch.Generator().manual_seed(1000 + seed)
        factors: dict[str, Any] = {
            m.target.path: (
                0.05 * torch.randn(m.rank, m.target.in_features, generator=g),
                0.3 * torch.randn(m.target.out_features, m.rank, generator=g),
            )
            for m in modules
        }
        found.append(root / f"{seed:05}")
        if seed == 0:
            write_adapter(found[0], spec=SPEC, modules=modules, factors=factors, base_name=name)
            continue
        found[-1].mkdir()  # not made durable: a thousand times four fsyncs take longer than the whole run
        shutil.copy(found[0] / CONFIG_NAME, found[-1])
        named = {
            f"base_model.model.{path}.lora_{part}.weight": tensor
            for path, pair in factors.items()
            for part, tensor in zip("AB", pair, strict=True)
        }
        save_file(named, found[-1] / WEIGHTS_NAME, {"format": "pt"})
    return found


def config(**settings: Any) -> EngineConfig:
    limits: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": 4 * MIB, "adapter_memory": MIB}
    return EngineConfig(**(limits | settings))


def expectations(base: Path, directories: list[Path], steps: int) -> Expected:
    """What every adapter says in a runtime with room for all, and every version of the job, trained without traffic."""
    expected = Expected()
    with Runtime(str(base), config=config(adapter_memory=(len(directories) // 8 + 2) * MIB)) as runtime:
        for directory in directories:
            runtime.load_adapter(directory.name, directory)
        asked = [(directory, runtime.submit(PROMPT, directory.name, GREEDY)) for directory in directories]
        for directory, handle in asked:
            expected.said[str(directory)] = signature(handle.result())
        assert runtime.stats().adapters.evictions == 0
    with Runtime(str(base), config=config(adapter_memory=(steps + 8) * MIB // 8, keep_versions=steps)) as runtime:
        train(runtime, steps).wait(600)
        for number in runtime.versions(LIVE):
            label = f"{LIVE}@{number}"
            expected.said[label] = signature(runtime.generate(PROMPT, label, GREEDY))
    return expected


def train(runtime: Runtime, steps: int) -> Any:
    training = TrainingConfig(batch_size=4, max_steps=steps, learning_rate=1e-2)
    return runtime.finetune(LIVE, DATA, lora=SPEC, training=training)


class Storm:
    """Clients, somebody who loads and unloads, and a job, all at once."""

    def __init__(self, runtime: Runtime, directories: list[Path], scale: Scale) -> None:
        self.runtime, self.scale = runtime, scale
        self.directories, self.spare = directories[: scale.adapters], directories[scale.adapters :]
        self.names = [f"org/adapter:{n:05}" for n in range(scale.adapters)]
        self.loaded_from: dict[str, str] = {}
        """By label: the directory of these weights."""
        self.answers: list[tuple[str, Signature]] = []
        self.report = Report()
        self._numbers = iter(self._zipf())
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def _zipf(self) -> list[int]:
        weights = 1.0 / np.arange(1, self.scale.adapters + 1) ** self.scale.exponent
        rng = np.random.default_rng(0)
        order = rng.permutation(self.scale.adapters)  # the popular ones lie anywhere in the list
        return list(order[rng.choice(self.scale.adapters, self.scale.requests, p=weights / weights.sum())])

    def load(self, number: int, directory: Path) -> None:
        info = self.runtime.load_adapter(self.names[number], directory)
        self.loaded_from[f"{info.name}@{info.version}"] = str(directory)

    def run(self) -> Report:
        for number, directory in enumerate(self.directories):
            self.load(number, directory)
        began = time.monotonic()
        job = train(self.runtime, self.scale.job_steps)
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(self.scale.clients)]
        churn = threading.Thread(target=self._churn)
        for thread in (*threads, churn):
            thread.start()
        for thread in threads:
            thread.join()
        self._is_over.set()
        churn.join()
        if not job.status.is_final:
            job.cancel()
        self.report.seconds = time.monotonic() - began
        # A step that found no room is not published, so that numbers and steps part; alone, version n is step n.
        self.loaded_from |= {f"{LIVE}@{number}": f"{LIVE}@{step}" for step, number in job.job.versions.items()}
        self.report.live_versions = max(self.runtime.versions(LIVE), default=0)
        return self._finished()

    def _client(self, number: int) -> None:
        mine = random.Random(number)
        while True:
            with self._lock:
                wanted = next(self._numbers, None)
                if len(self.answers) * 10 >= self.scale.requests * len(self.report.rss_mb):
                    self.report.rss_mb.append(rss_mb())
            if wanted is None:
                return
            self._ask(LIVE if mine.random() < 0.05 else self.names[wanted])

    def _ask(self, name: str) -> None:
        began = time.monotonic()
        try:
            done = self.runtime.generate(PROMPT, name, GREEDY)
        except AdapterNotFoundError as error:  # between an unload and its load, or before the job's first publish
            assert name == LIVE or name in self.names[: self.scale.churned], error
            with self._lock:
                self.report.errors["not loaded just now"] += 1
            return
        with self._lock:
            self.answers.append((done.model, signature(done)))
            assert done.model.partition("@")[0] == name
            self.report.longest_wait = max(self.report.longest_wait, time.monotonic() - began)

    def _churn(self) -> None:
        mine = random.Random(99)
        while not self._is_over.wait(0.02):
            number = mine.randrange(self.scale.churned)
            self.runtime.unload_adapter(self.names[number])
            self.load(number, mine.choice(self.spare))
            self.report.reloads += 1
            self.report.most_resident = max(self.report.most_resident, self.runtime.stats().adapters_resident)

    def _finished(self) -> Report:
        totals = self.runtime.stats().adapters
        self.report.loads, self.report.evictions = totals.loads, totals.evictions
        self.report.load_ms = 1000 * totals.load_seconds / max(1, totals.loads)
        self.report.answers = len(self.answers)
        return self.report


def check(storm: Storm, expected: Expected) -> None:
    """Every answer against what the weights of its label say alone."""
    for label, said in storm.answers:
        wanted = expected.said[storm.loaded_from.get(label, label)]
        if not same(said, wanted):
            storm.report.wrong.append(f"{label}: {said}, alone {wanted}")


def rss_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


@contextmanager
def storm(root: Path, scale: Scale) -> Iterator[tuple[Storm, Expected]]:
    """Everything that a run needs."""
    base = root / "base"
    save_tiny(base, "llama", vocab=260)
    directories = make_adapters(base, root / "adapters", scale.adapters + 2 * scale.churned)
    expected = expectations(base, directories, scale.job_steps)
    expected.check_distinct()
    with Runtime(str(base), config=config(adapter_patience=0.05, adapter_spill=str(root / "spill"))) as runtime:
        yield Storm(runtime, directories, scale), expected


def main() -> int:
    """The whole run; prints one JSON object. Exit code 1: an answer was wrong."""
    scale = FULL if len(sys.argv) < 3 else Scale(int(sys.argv[1]), int(sys.argv[2]), job_steps=int(sys.argv[3]))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root, storm(Path(root), scale) as (found, expected):
        prepared = time.monotonic() - began
        report = found.run()
        check(found, expected)
        found.runtime.check_integrity()
    shown = vars(report) | {"wrong": len(report.wrong), "errors": dict(report.errors), "prepared_seconds": prepared}
    print(json.dumps(shown, indent=1))
    print(*report.wrong[:5], sep="\n", file=sys.stderr)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
