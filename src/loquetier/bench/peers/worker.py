"""One side that works in a process of its own and is told what to do, line by line.

``python -m loquetier.bench.peers.worker`` reads JSON objects, one a line, and answers each with one: first the setup,
then orders ``{"task": ..., "draw": ..., "new_tokens": ...}``. Runs in our environment or in PEFT's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO


class Side(Protocol):
    """What a worker drives."""

    def run(self, task: str, draw: int, new_tokens: int | None = None) -> dict[str, Any]:
        """One measurement."""


def open_side(setup: Mapping[str, Any]) -> Side:
    """Load the base, and the side that `setup` names."""
    import torch

    torch.set_num_threads(setup["threads"])
    from loquetier.base.hardware import detect_hardware
    from loquetier.base.loading import load_base
    from loquetier.bench.ours import open_ours
    from loquetier.bench.traffic import Traffic
    from loquetier.bench.workload import Workload
    from loquetier.config import EngineConfig, resolve

    config = EngineConfig(dtype=setup["dtype"], device="cpu", kv_memory=1 << 30, adapter_memory=1 << 30)
    config = resolve(config, detect_hardware("cpu"))
    loaded = load_base(setup["base"], dtype=getattr(torch, config.dtype), device="cpu")
    if setup["side"] == "ours":
        return open_ours(setup, loaded, config)
    from loquetier.bench.peft_peer import PeftPeer

    paths = {name: Path(path) for name, path in setup["adapters"].items()}
    return PeftPeer(loaded, paths, Traffic(**setup["traffic"]), Workload(**setup["workload"]))


def orders(lines: TextIO) -> Iterator[dict[str, Any]]:
    """What the main process sends, until it closes the pipe."""
    for line in lines:
        yield json.loads(line)


def main() -> None:
    """Serve one benchmark. Errors end the process; their traceback is its last words."""
    # What libraries print must not mix with the answers: they get the error stream.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    received = orders(sys.stdin)
    side = open_side(next(received))
    print(json.dumps({"ready": _versions()}), file=answers, flush=True)
    for order in received:
        print(json.dumps(side.run(**order)), file=answers, flush=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # ours runs without peft
            continue
    return found


if __name__ == "__main__":
    main()
