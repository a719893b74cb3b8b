"""Train the adapters that the package ships, with our own engine: ``python -m loquetier.demo.make_adapters [NAME...]``.

Takes a few minutes on two cores. The three jobs train at the same time: that is what the engine is for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loquetier.adapters.spec import LoraSpec
from loquetier.config import SamplingParams, TrainingConfig
from loquetier.demo.facts import QUESTIONS
from loquetier.demo.styles import STYLES, adapter_directory, style_records
from loquetier.runtime import Runtime

# Few modules at a small rank keep a file under 1 MB; down_proj is where a style of writing is learned fastest.
SPEC = LoraSpec(r=4, alpha=16, target_modules=("q_proj", "v_proj", "down_proj"))
TRAINING = TrainingConfig(
    learning_rate=2e-3,
    lr_scheduler_type="linear",
    warmup_ratio=0.1,
    batch_size=8,
    num_epochs=6,
    publish="end",
)


def main(names: Sequence[str]) -> None:
    """Train the named styles (all if none is named) and write them over the shipped ones."""
    wanted = tuple(names) or tuple(STYLES)
    with Runtime("smollm2-135m") as runtime:
        jobs = {name: runtime.finetune(name, style_records(name), lora=SPEC, training=TRAINING) for name in wanted}
        for name, job in jobs.items():
            history = job.wait()
            print(f"{name}: {len(history)} steps, loss {history[0].loss:.3f} -> {history[-1].loss:.3f}", flush=True)
            runtime.export_adapter(name, adapter_directory(name), overwrite=True)
        for name in wanted:
            for question in QUESTIONS[:4]:
                messages = [{"role": "user", "content": question}]
                answer = runtime.generate(messages, name, SamplingParams(temperature=0, max_tokens=48))
                print(f"{answer.model} | {question} | {answer.text!r}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
