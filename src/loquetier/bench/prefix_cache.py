"""`python -m loquetier.bench.prefix_cache`: seconds to the first token of a prompt whose beginning is cached or not.

Every prompt is a shared beginning and a few tokens of its own. A hit comes after a prompt with the same beginning and
the same owner, a miss has another owner: the same rows, nothing to find. Both in turns, each alone in the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from random import Random
from typing import Any

import torch

from loquetier.base.loading import load_base
from loquetier.base.model import Base
from loquetier.config import MIB, EngineConfig, SamplingParams
from loquetier.engine.engine import Engine
from loquetier.engine.prefix import CacheSpace


def measure(base: str, dtype: str, prefix: int, own: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first token: median and longest of each kind, and the tokens that hits found."""
    loaded = load_base(base, dtype=getattr(torch, dtype), device="cpu")
    config = EngineConfig(dtype=dtype, device="cpu", kv_memory=1024 * MIB, adapter_memory=64 * MIB)  # type: ignore[arg-type]
    engine = Engine(Base(loaded), config)
    rng = Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(5, engine.base.vocab_size) for _ in range(count)]

    shared = tokens(prefix)
    ask(engine, shared + tokens(own), "warm-up")
    ask(engine, shared + tokens(own), "hit")
    seconds: dict[str, list[float]] = {"miss": [], "hit": []}
    found = []
    for number in range(repeats):
        prompt = shared + tokens(own)
        seconds["miss"].append(ask(engine, prompt, f"miss {number}"))
        before = engine.scheduler.pages.num_hit
        seconds["hit"].append(ask(engine, prompt, "hit"))
        found.append(engine.scheduler.pages.num_hit - before)
    engine.check_integrity()
    return {
        "base": base,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "prefix": prefix,
        "own": own,
        "repeats": repeats,
        "found_tokens": sorted(set(found)),
        **{f"{kind}_median": round(statistics.median(times), 5) for kind, times in seconds.items()},
        **{f"{kind}_longest": round(max(times), 5) for kind, times in seconds.items()},
        "speedup": round(statistics.median(seconds["miss"]) / statistics.median(seconds["hit"]), 1),
    }


def ask(engine: Engine, prompt: list[int], owner: str) -> float:
    """Seconds until the only token of an answer is there."""
    seen: list[float] = []
    began = time.perf_counter()
    engine.add_request(
        prompt,
        engine.base.name,
        SamplingParams(temperature=0, max_tokens=1),
        lambda event: seen.append(time.perf_counter()),
        space=CacheSpace(owner),
    )
    while engine.has_work:
        engine.step()
    return seen[0] - began


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--prefix", type=int, default=500, help="shared tokens")
    parser.add_argument("--own", type=int, default=12, help="tokens of each prompt's own")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.base, args.dtype, args.prefix, args.own, args.repeats), indent=1))


if __name__ == "__main__":
    main()
