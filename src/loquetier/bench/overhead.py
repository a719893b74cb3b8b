"""Where a serving step's time goes on a CPU: in C kernels, or around them.

``python -m loquetier.bench.overhead [--case PART] [--output FILE]``. Every C function is timed from Python; what is
left of a step (schedule, batch, plain torch, sampling's bookkeeping, delivery) is overhead. Also: one stream against
the time that the packed weights take to read once, 16 mixed adapters against 4, LoRA tax, one long prompt, and steps
that hold prefill beside decode rows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.base.loading import load_base
from loquetier.base.model import Base
from loquetier.bench.run import commit, machine
from loquetier.config import MIB, EngineConfig, SamplingParams
from loquetier.engine.engine import Engine
from loquetier.kernels.gemm import GemmKernel
from loquetier.kernels.native import NativeLibrary
from loquetier.kernels.select import process_kernels

GREEDY = SamplingParams(temperature=0, max_tokens=1 << 10, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=1 << 10, ignore_eos=True)
WARM, STEPS = 4, 24
"""Steps before the clock runs, and steps that count: the median of them."""


class Case(NamedTuple):
    """`streams` requests, request i on adapter ``i % len(ranks)``; no ranks: on the base."""

    name: str
    streams: int
    ranks: tuple[int, ...] = ()
    params: SamplingParams = GREEDY


CASES = (
    Case("1 stream, base", 1),
    Case("1 stream, r=16", 1, (16,)),
    Case("16 streams, base", 16),
    Case("16 streams, 4 adapters r=8", 16, (8,) * 4),
    Case("16 streams, 4 adapters r=8, sampled", 16, (8,) * 4, SAMPLED),
    Case("16 streams, 16 adapters r=4..64", 16, (4, 8, 16, 64) * 4),
)
PREFILL_CASES = (Case("prefill 1000 tokens", 1), Case("prefill 1000 tokens, r=8", 1, (8,)))


class Clock:
    """Seconds in C functions since the last `reset`, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def reset(self) -> None:
        """Begin a step."""
        self.seconds.clear()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, measured. Kernels do not call each other through Python, so nothing counts twice."""

        def call(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self.seconds[name] += time.perf_counter() - started
            return result

        return call


@contextmanager
def clocked() -> Iterator[Clock]:
    """Every C function that anybody looks up inside is timed. Engines must be built inside."""
    clock, original = Clock(), NativeLibrary.function

    def function(self: NativeLibrary, name: str, *argtypes: Any, restype: Any = None) -> Callable[..., Any]:
        return clock.timed(name, original(self, name, *argtypes, restype=restype))

    NativeLibrary.function = function  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        NativeLibrary.function = original  # type: ignore[method-assign]


class Bench:
    """One engine; each case brings its own adapters and takes them away again."""

    def __init__(self, base: str, clock: Clock, config: EngineConfig) -> None:
        self.engine = Engine(Base(load_base(base, dtype=getattr(torch, config.dtype), device="cpu")), config)
        self._clock = clock
        self._rng = random.Random(0)  # no prompt comes twice: its pages would be found in the prefix cache

    @contextmanager
    def _adapters(self, ranks: Sequence[int]) -> Iterator[list[str]]:
        engine, generator = self.engine, torch.Generator().manual_seed(0)
        names = [f"a{i}" for i in range(len(ranks))]
        for name, rank in zip(names, ranks, strict=True):
            spec = LoraSpec(r=rank, alpha=2.0 * rank)
            modules = resolve_modules(spec, engine.base.targets)
            factors = {
                m.target.path: tuple(
                    torch.randn(*shape, generator=generator) * 0.02
                    for shape in ((rank, m.target.in_features), (m.target.out_features, rank))
                )
                for m in modules
            }
            engine.adapters.load(name, spec, modules, factors)
        try:
            yield names
        finally:
            for name in names:
                engine.adapters.unload(name)

    def _submit(self, case: Case, names: list[str], lengths: Sequence[int]) -> None:
        for i, length in enumerate(lengths):
            prompt = [self._rng.randrange(5, self.engine.base.vocab_size) for _ in range(length)]
            model = names[i % len(names)] if names else self.engine.base.name
            self.engine.add_request(prompt, model, case.params, lambda event: None)

    def _until_decoding(self, streams: int) -> None:
        for _ in range(100):
            if self.engine.step().decode_rows == streams:
                return
        raise RuntimeError(f"after 100 steps there are not {streams} streams decoding")

    def _stop(self) -> None:
        for request_id in list(self.engine.serving.requests):
            self.engine.abort_request(request_id)
        self.engine.check_integrity()

    def decode(self, case: Case) -> dict[str, Any]:
        """Steps of decode rows only; prompts of 32 to 200 tokens."""
        rng = random.Random(1)
        steps: list[dict[str, float]] = []
        with self._adapters(case.ranks) as names:
            self._submit(case, names, [rng.randint(32, 200) for _ in range(case.streams)])
            self._until_decoding(case.streams)
            for number in range(WARM + STEPS):
                self._clock.reset()
                started = time.perf_counter()
                self.engine.step()
                seconds = time.perf_counter() - started
                if number >= WARM:
                    steps.append({"step": seconds, "kernels": sum(self._clock.seconds.values()), **self._clock.seconds})
            self._stop()
        row: dict[str, Any] = {f"{k}_ms": 1e3 * statistics.median(s.get(k, 0.0) for s in steps) for k in steps[0]}
        overhead = statistics.median(1 - s["kernels"] / s["step"] for s in steps)
        fastest = 1e3 * sorted(s["step"] for s in steps)[len(steps) // 10]
        rate = case.streams / row["step_ms"] * 1e3
        return {"case": case.name, "fastest_ms": fastest, **row, "overhead": overhead, "tokens_per_s": rate}

    def prefill(self, case: Case, rounds: int = 5) -> dict[str, Any]:
        """Tokens per second until the first token of one prompt of 1,000."""
        times: list[float] = []
        with self._adapters(case.ranks) as names:
            for _ in range(rounds):
                self._submit(case, names, [1000])
                started, before = time.perf_counter(), self.engine.serving.tokens_generated
                while self.engine.serving.tokens_generated == before:
                    self.engine.step()
                times.append(time.perf_counter() - started)
                self._stop()
        seconds = statistics.median(times[1:])
        return {"case": case.name, "step_ms": 1e3 * seconds, "tokens_per_s": 1000 / seconds}

    def mixed(self, ranks: Sequence[int], rounds: int = 6) -> dict[str, Any]:
        """Steps in which 16 streams decode beside 64 rows of a prompt in the middle."""
        case = Case(f"16 decode + 64 prefill rows, {len(ranks)} adapters", 16, tuple(ranks))
        times: list[float] = []
        with self._adapters(ranks) as names:
            self._submit(case, names, [100] * 16)
            self._until_decoding(16)
            for _ in range(rounds):
                self._submit(case, names, [64])
                self._clock.reset()
                started = time.perf_counter()
                report = self.engine.step()
                times.append(time.perf_counter() - started)
                assert report.prefill_rows == 64 and report.decode_rows >= 16
                newest = max(self.engine.serving.requests)
                self.engine.abort_request(newest)
            self._stop()
        return {"case": case.name, "step_ms": 1e3 * statistics.median(times[1:])}


def weight_read_ms(packed_bytes: int) -> float:
    """Milliseconds to read as many bytes as the packed weights once, on huge pages, on torch's threads."""
    count = packed_bytes // 4
    values = torch.empty(count + (1 << 20))
    library = process_kernels().library
    if library is not None:
        start = -values.data_ptr() % (2 << 20)
        GemmKernel(library).advise_huge(values.data_ptr() + start, count * 4 // (2 << 20) * (2 << 20))
    values.fill_(1.0)
    times = []
    for _ in range(15):
        started = time.perf_counter()
        values[:count].sum()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def measure(base: str, only: str, config: EngineConfig) -> dict[str, Any]:
    """All cases with `only` in their name; JSON-ready."""
    rows: list[dict[str, Any]] = []
    with clocked() as clock:
        bench = Bench(base, clock, config)
        for case in CASES:
            if only in case.name:
                rows.append(bench.decode(case))
                print(_line(rows[-1]))
        for case in PREFILL_CASES:
            if only in case.name:
                rows.append(bench.prefill(case))
                print(_line(rows[-1]))
        for ranks in ((), (8,) * 4):
            if only in "mixed":
                rows.append(bench.mixed(ranks))
                print(_line(rows[-1]))
        packed = bench.engine.base.packed_bytes
    result: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(),
        "base": base,
        "dtype": config.dtype,
        "adapter_dtype": config.adapter_dtype,
        "threads": torch.get_num_threads(),
        "kernels": {name: choice.reason for name, choice in process_kernels().choices.items()},
        "rows": rows,
    }
    if packed:
        result["weights_read_once_ms"] = weight_read_ms(packed)
        print(f"{packed >> 20} MiB of packed weights are read once in {result['weights_read_once_ms']:.2f} ms")
    return result


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['case']:42} {row['step_ms']:7.2f} ms"]
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:8.1f} tok/s")
    if "overhead" in row:
        parts.append(f"(a tenth below {row['fastest_ms']:.2f} ms)  overhead {100 * row['overhead']:5.1f} %")
        functions = [k for k in row if k.startswith("lq_") and row[k] >= 0.05]
        parts += [f"{k[3:-3]} {row[k]:.2f}" for k in sorted(functions, key=lambda k: -row[k])]
    return "  ".join(parts)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--adapter-dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--case", default="", help="part of the names of the cases to run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = EngineConfig(
        dtype=args.dtype, adapter_dtype=args.adapter_dtype, device="cpu", kv_memory=512 * MIB, adapter_memory=1024 * MIB
    )
    result = measure(args.base, args.case, config)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
