"""An engine that serves two adapters and the base while it trains a third; what came out goes to stdout as JSON.

Run as a program, so that LOQUETIER_KERNELS decides which kernels it runs on.
"""

from __future__ import annotations

import json
import sys

import torch
from tests.parity.training_helpers import ask, load_random_adapter, make_engine, random_examples, run, start, watch

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.kernels.select import process_kernels

MODEL = {"layers": 2, "hidden": 16, "vocab": 300}
"""The vocabulary is the tokenizer's."""


def main(family: str) -> None:
    """Prints the kernels' backends, greedy answers, losses, and the trained weights."""
    engine = make_engine(family, model=dict(MODEL), max_prefill_rows=6)
    load_random_adapter(engine, "one", LoraSpec(r=4, target_modules=("q_proj", "v_proj", "down_proj")), 1)
    load_random_adapter(engine, "two", LoraSpec(r=20, alpha=30, target_modules=("o_proj", "gate_proj")), 2)
    spec = LoraSpec(r=5, dropout=0.2, target_modules=("q_proj", "up_proj"))
    config = TrainingConfig(learning_rate=1e-2, batch_size=2, max_steps=2)
    job = start(engine, "three", spec, config, random_examples(3, 5, 9, seed=4))
    seen = watch(engine, job)
    answers = [ask(engine, name, range(10, 10 + n), 3) for name, n in (("one", 9), ("two", 2), ("tiny", 4))]
    run(engine)
    engine.check_integrity()
    assert seen.weights is not None
    result = {
        "backends": {name: choice.backend for name, choice in process_kernels("cpu").choices.items()},
        "tokens": [answer.tokens for answer in answers],
        "losses": [record.loss for record in job.history],
        "gradients": [g.tolist() for g in seen.gradients],
        "weights": seen.weights.tolist(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
