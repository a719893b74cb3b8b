"""`python -m loquetier.bench.gsm8k train.jsonl`: GSM8K through our runtime and through PEFT + Hugging Face's Trainer.

Same base, initial weights, examples, order and settings; float32. The result, with both loss curves, is written as JSON
after every optimizer step. `python -m loquetier.bench.learning_page` makes the page and the plot of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loquetier.base.loading import load_base
from loquetier.bench.learning import Curve, LearningRun, Records, read_gsm8k
from loquetier.bench.run import commit, machine, save
from loquetier.bench.trainer_peer import TrainerPeer
from loquetier.config import MIB, EngineConfig, TrainingConfig
from loquetier.errors import EngineError, LoquetierError
from loquetier.finetuning import poll_steps
from loquetier.runtime import Runtime
from loquetier.training.data import Example, encode_examples

Progress = Callable[[Curve], None]


def compare(data: Path, run: LearningRun, output: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Train on both sides, one after the other; returns what `output` holds then.

    Raises:
        LoquetierError: the data or a package is missing, or a side failed. EngineError: the sides would not train on
            the same tokens.
    """
    train, held_out, source = read_gsm8k(data, run)
    result: dict[str, Any] = {
        "machine": machine() | {name: version(name) for name in ("peft", "accelerate")},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "dtype": "float32",
        "settings": asdict(run),
        "data": source,
    }

    def progress(side: str) -> Progress:
        def told(curve: Curve) -> None:
            result[side] = asdict(curve)
            save(result, output)
            last, looks = curve.train_loss[-1:], [loss for _, loss in curve.held_out_loss[-1:]]
            tell(f"{side}: step {len(curve.train_loss)}/{run.steps}, loss {last}, held out {looks}")

        return told

    with tempfile.TemporaryDirectory() as directory:
        start = Path(directory)
        loaded = load_base(run.base, dtype=torch.float32, device="cpu")
        peer = TrainerPeer(loaded, run)
        peer.save(start)
        examples = encode_examples(train, loaded.tokenizer, run.max_tokens)
        _expect_same(examples, peer.encode(train))
        result["data"] |= {
            "train_tokens": sum(len(e.tokens) for e in examples),
            "train_labels": sum(e.num_labels for e in examples),
        }
        result["peft"] = asdict(peer.train(train, held_out, progress("peft")))
        del peer, loaded
        result["ours"] = asdict(train_ours(train, held_out, start, run, progress("ours")))
    result["differences"] = differences(result["ours"], result["peft"])
    save(result, output)
    return result


def train_ours(train: Records, held_out: Records, start: Path, run: LearningRun, progress: Progress) -> Curve:
    """The same on our runtime, from the PEFT directory `start`."""
    config = EngineConfig(dtype="float32", device="cpu", kv_memory=64 * MIB, adapter_memory=256 * MIB)
    training = TrainingConfig(
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.schedule,  # type: ignore[arg-type]
        warmup_ratio=run.warmup_ratio,
        max_grad_norm=run.max_grad_norm,
        batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulation,
        max_steps=run.steps,
        max_seq_len=run.max_tokens,
        shuffle=False,  # the records are in their order already
        eval_every=run.eval_every,
    )
    with Runtime(run.base, adapters={"start": start}, config=config) as runtime:
        first = (0, runtime.evaluate("start", held_out, max_seq_len=run.max_tokens).loss)
        job = runtime.finetune("gsm8k", train, training=training, eval_data=held_out, start_from="start")

        def curve() -> Curve:
            looks = [(r.step, r.evaluation.loss) for r in job.history if r.evaluation is not None]
            return Curve([r.loss for r in job.history], [first, *looks])

        for _ in poll_steps(job):
            progress(curve())
        job.wait()
        return curve()


def _expect_same(ours: tuple[Example, ...], theirs: list[dict[str, list[int]]]) -> None:
    """Both sides tokenize for themselves: they must come to the same tokens and labels."""
    for number, (example, row) in enumerate(zip(ours, theirs, strict=True), 1):
        labels = [int(label) for label in example.label_targets]
        if list(example.tokens) != row["input_ids"] or labels != [t for t in row["labels"][1:] if t >= 0]:
            raise EngineError(f"example {number} has other tokens or labels for the peer than for us")


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of the two curves, in nats per token."""
    pairs = zip(ours["train_loss"], theirs["train_loss"], strict=True)
    looks = zip(ours["held_out_loss"], theirs["held_out_loss"], strict=True)
    return {
        "train_loss": max(abs(a - b) for a, b in pairs),
        "held_out_loss": max(abs(a[1] - b[1]) for a, b in looks),
    }


def main() -> None:
    """The command line."""
    defaults = LearningRun()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="GSM8K's training file, JSON lines with question and answer")
    parser.add_argument("--base", default=defaults.base)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--accumulation", type=int, default=defaults.accumulation)
    parser.add_argument("--held-out", type=int, default=defaults.held_out)
    parser.add_argument("--eval-every", type=int, default=defaults.eval_every)
    parser.add_argument("--output", type=Path, default=Path("bench-output/gsm8k.json"))
    args = vars(parser.parse_args())
    data, output = args.pop("data"), args.pop("output")
    try:
        result = compare(data, LearningRun(**args), output, lambda line: print(line, file=sys.stderr, flush=True))
    except LoquetierError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"saved {output}; largest differences: {result['differences']}")


if __name__ == "__main__":
    main()
