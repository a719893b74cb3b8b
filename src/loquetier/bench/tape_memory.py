"""`python -m loquetier.bench.tape_memory`: peak activation memory of one long training example, by method, as JSON.

Each method runs in a process of its own: Hugging Face + PEFT under autograd (`peft-sdpa`, `peft-eager`,
`peft-checkpointing`), and our engine on the `graph` and the `replay` tape. All start from the same adapter; their
gradients are compared with those of the first method and, with `--exact`, with PEFT's own in float64: that tells whose
rounding a difference is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loquetier.adapters.arena import factor_views
from loquetier.adapters.peft_io import read_adapter
from loquetier.base.loading import load_base
from loquetier.base.model import Base
from loquetier.bench.live_bytes import LiveBytes, resident_bytes
from loquetier.bench.peft_long import PeftLong
from loquetier.bench.workload import Workload, write_adapters
from loquetier.config import MIB, EngineConfig, TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.errors import EngineError
from loquetier.training.data import Example

METHODS = ("peft-sdpa", "peft-eager", "peft-checkpointing", "graph", "replay")
EXACT = "peft-float64"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One method's run."""

    method: str
    tokens: int
    peak_tensor_bytes: int
    """Most bytes of tensors alive at once that the run itself made, gradients of the adapter included."""
    peak_resident_bytes: int | None
    """Growth of the process's resident memory to its peak; None where the system does not tell."""
    seconds: float


def measure(method: str, base: str, adapter: Path, tokens: int, window: int, gradients: Path) -> Measured:
    """Run one method in this process and write its gradients to a safetensors file."""
    loaded = load_base(base, dtype=torch.float64 if method == EXACT else torch.float32, device="cpu")
    rng = Random(0)
    example = tuple(rng.randrange(5, int(loaded.model.config.vocab_size)) for _ in range(tokens))
    run: Any
    if method.startswith("peft-"):
        kind = method.removeprefix("peft-")
        peer = PeftLong(loaded, adapter, "eager" if kind == "eager" else "sdpa", kind == "checkpointing")
        run = _PeftRun(peer, example)
    else:
        run = _OurRun(Base(loaded), adapter, example, method, window)
    before = resident_bytes("VmRSS")
    started = time.perf_counter()
    with LiveBytes() as memory:
        run()
    seconds = time.perf_counter() - started
    highest = resident_bytes("VmHWM")
    save_file({name: t.contiguous() for name, t in run.gradients().items()}, gradients)
    resident = highest - before if highest is not None and before is not None else None
    return Measured(
        method=method,
        tokens=tokens,
        peak_tensor_bytes=memory.peak,
        peak_resident_bytes=resident,
        seconds=seconds,
    )


class _PeftRun:
    def __init__(self, peer: PeftLong, tokens: tuple[int, ...]) -> None:
        self._peer, self._tokens = peer, tokens

    def __call__(self) -> None:
        self._peer.backward(self._tokens)

    def gradients(self) -> dict[str, Tensor]:
        return self._peer.gradients()


class _OurRun:
    """One optimizer step of one job on one example."""

    def __init__(self, base: Base, adapter: Path, tokens: tuple[int, ...], tape: str, window: int) -> None:
        config = EngineConfig(
            dtype="float32",
            device="cpu",
            kv_memory=16 * MIB,
            adapter_memory=256 * MIB,
            tape=tape,  # type: ignore[arg-type]
            train_window=window,
        )
        self.engine = Engine(base, config)
        weights = read_adapter(adapter, base.targets)
        self.engine.adapters.load("from", weights.spec, weights.modules, weights.factors)
        self._modules = weights.modules
        self._job = self.engine.jobs.start(
            "job",
            weights.spec,
            TrainingConfig(batch_size=1, max_steps=1, publish="end"),
            (Example(tokens, tuple(i > 0 for i in range(len(tokens)))),),
            (),
            lambda job, record: None,
            start_from="from",
        )
        self._grad: Tensor | None = None
        step = self._job.optimizer.step

        def recorded(lr: float) -> float:
            self._grad = self._job.optimizer.grad.clone()
            return step(lr)

        self._job.optimizer.step = recorded  # type: ignore[method-assign]

    def __call__(self) -> None:
        while self.engine.has_work:
            self.engine.step()
        if self._job.error is not None:
            raise EngineError(f"the job failed: {self._job.error}") from self._job.error

    def gradients(self) -> dict[str, Tensor]:
        assert self._grad is not None
        views = factor_views(self._grad, self._modules)
        found: dict[str, Tensor] = {}
        for m in self._modules:
            factors = views[m.target.index]
            found |= {f"{m.target.path}.a": factors.a_RK, f"{m.target.path}.b": factors.b_RN.T}
        return found


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """How far two gradients are apart: the norm of all of it, the worst factor's norm, and the worst element.

    Norms are relative to the other's norm, an element's difference to the largest element of its factor.
    """
    if ours.keys() != theirs.keys():
        raise EngineError(f"the methods trained different modules: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    apart = {n: (ours[n] - theirs[n]).double() for n in ours}
    norms = {n: float(theirs[n].double().norm()) for n in ours}
    whole = sum(float(d.square().sum()) for d in apart.values()) / sum(n**2 for n in norms.values())
    return {
        "gradient_difference": whole**0.5,
        "worst_factor_difference": max(float(d.norm()) / norms[n] for n, d in apart.items()),
        "worst_element_difference": max(float(d.abs().max() / theirs[n].abs().max()) for n, d in apart.items()),
    }


def compare(
    base: str, methods: list[str], tokens: int, window: int, threads: int, *, exact: bool = False
) -> dict[str, Any]:
    """Every method in its own process; bytes, seconds, gradients against the first method's and ratios to it.

    Args:
        exact: also run PEFT in float64; each result then says under "error" how far it is from that.
    """
    results: list[dict[str, Any]] = []
    gradients: dict[str, dict[str, Tensor]] = {}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        targets = Base(load_base(base, dtype=torch.float32, device="cpu")).targets
        adapter = write_adapters(Workload(num_adapters=1), targets, place)["a0"]
        for method in (*methods, EXACT) if exact else methods:
            file = place / f"{method}.safetensors"
            arguments = ["--one", method, "--adapter", str(adapter), "--gradients", str(file)]
            shared = ["--base", base, "--tokens", str(tokens), "--window", str(window), "--threads", str(threads)]
            result = _in_a_process(method, [*arguments, *shared])
            gradients[method] = load_file(file)
            if method != EXACT:
                results.append(result)
            print(f"{method}: {result['peak_tensor_bytes'] / MIB:.0f} MiB, {result['seconds']:.1f} s", file=sys.stderr)
    for method, result in zip(methods, results, strict=True):
        result |= differences(gradients[method], gradients[methods[0]])
        result["bytes_ratio"] = results[0]["peak_tensor_bytes"] / result["peak_tensor_bytes"]
        if exact:
            result["error"] = differences(gradients[method], gradients[EXACT])
    return {
        "base": base,
        "tokens": tokens,
        "window": window,
        "threads": threads,
        "dtype": "float32",
        "compared_with": methods[0],
        "results": results,
    }


def _in_a_process(method: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "loquetier.bench.tape_memory", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{method} ended with exit code {done.returncode}; out of memory? See its output above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=EngineConfig().train_window)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["peft-sdpa", "graph", "replay"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("bench-output/tape-memory.json"))
    parser.add_argument("--exact", action="store_true", help="compare with PEFT in float64 too")
    parser.add_argument("--one", choices=(*METHODS, EXACT), help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        one = measure(args.one, args.base, args.adapter, args.tokens, args.window, args.gradients)
        print(json.dumps(asdict(one)))
        return
    result = compare(args.base, args.methods, args.tokens, args.window, args.threads, exact=args.exact)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
