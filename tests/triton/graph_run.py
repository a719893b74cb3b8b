"""Decode steps from graphs' tables and SMLM's fixed plans, or as ever; the tokens go to stdout as JSON.

Run as a program, so that LOQUETIER_KERNELS decides which kernels it runs on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from tests.parity.training_helpers import ask, load_random_adapter, make_engine, run
from torch import Tensor

from loquetier.adapters.spec import LoraSpec
from loquetier.engine.decode_graphs import Captured, DecodeGraphs


class CallsAgain:
    """Like a CUDA graph it is given fixed plans; a replay calls the code, which must read nothing but its tables."""

    reruns = False

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, call: Callable[[], Tensor]) -> Captured:
        self.captures += 1
        out = call().clone()

        def replay() -> None:
            self.replays += 1
            out.copy_(call())

        return Captured(replay, out)


def main(with_graphs: bool) -> None:
    """Prints tokens, captures and replays."""
    engine = make_engine("llama", model={"layers": 2, "hidden": 16, "vocab": 300}, page_size=4)
    capture = CallsAgain()
    if with_graphs:
        engine.decode_graphs = DecodeGraphs(engine.base, engine.cache, engine._smlm_plans, capture, lora_is_fixed=True)
    load_random_adapter(engine, "one", LoraSpec(r=4, target_modules=("q_proj", "v_proj", "down_proj")), 1)
    load_random_adapter(engine, "two", LoraSpec(r=7, target_modules=("o_proj", "gate_proj")), 2)
    tokens = []
    for names in (("one", "two", "tiny"), ("tiny", "one"), ("two",)):
        answers = [ask(engine, name, range(10, 13 + i), 3 + i) for i, name in enumerate(names)]
        run(engine)
        tokens += [a.tokens for a in answers]
    load_random_adapter(engine, "large", LoraSpec(r=40), 3)  # a rank and modules beyond what was captured
    answers = [ask(engine, name, range(20, 25), 3) for name in ("large", "one", "two")]
    run(engine)
    engine.check_integrity()
    tokens += [a.tokens for a in answers]
    print(json.dumps({"tokens": tokens, "captures": capture.captures, "replays": capture.replays}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1] == "graphs")
