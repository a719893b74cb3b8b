"""transformers' Trainer and a job here, with as many examples, steps, evaluations and saves: the same calls in the same
order, at the same global step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny, tiny_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loquetier import EngineConfig, LoraSpec, Runtime, TrainingConfig
from loquetier.reporting.callbacks import METHODS

pytest.importorskip("accelerate")
DATA = [{"input_ids": [5 + i, 6, 7, 8], "labels": [5 + i, 6, 7, 8]} for i in range(5)]
"""With batches of 2 and 2 per step: an epoch is a step of two micro-batches and one of a single example."""


class Recorder(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.logged: list[set[str]] = []
        self.metrics: list[set[str]] = []
        self.saved: list[tuple[int, str | None]] = []


def _record(name: str) -> Any:
    def method(self: Recorder, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.calls.append((name, state.global_step))
        if name == "on_log":
            self.logged.append(set(more["logs"]))
        elif name == "on_evaluate":
            self.metrics.append(set(more["metrics"]))
        elif name == "on_save":
            self.saved.append((state.global_step, getattr(state, "last_checkpoint", None)))

    return method


for _name in METHODS:
    setattr(Recorder, _name, _record(_name))


def of_transformers(place: Path, max_steps: int) -> Recorder:
    recorder = Recorder()
    args = TrainingArguments(
        output_dir=str(place),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        max_steps=max_steps,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = tiny_model("llama")
    trainer = Trainer(model=model, args=args, train_dataset=DATA, eval_dataset=DATA[:2], callbacks=[recorder])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return recorder


def of_ours(place: Path, max_steps: int, *others: Any) -> Recorder:
    save_tiny(place / "base", "llama")
    recorder = Recorder()
    training = TrainingConfig(
        batch_size=2,
        gradient_accumulation_steps=2,
        num_epochs=2,
        max_steps=max_steps if max_steps > 0 else None,
        eval_every=2,
    )
    config = EngineConfig(dtype="float32", kv_memory=1 << 20, adapter_memory=4 << 20)
    with Runtime(str(place / "base"), config=config) as runtime:
        job = runtime.finetune(
            "fox",
            DATA,
            lora=LoraSpec(r=2),
            training=training,
            eval_data=DATA[:2],
            callbacks=[recorder, *others],
            checkpoint_dir=place / "checkpoints",
            checkpoint_every=1,
            checkpoints_to_keep=9,
        )
        job.wait(60)
        assert job._pump.join(60) and job.callback_errors == []
    return recorder


@pytest.mark.parametrize("max_steps", [-1, 3])
def test_calls_come_in_the_trainers_order(tmp_path: Path, max_steps: int) -> None:
    """max_steps=3 ends in the middle of an epoch."""
    theirs, ours = of_transformers(tmp_path / "hf", max_steps), of_ours(tmp_path, max_steps)
    # A save is told when it is on the disk, and one may be left out while the disk is busy: looked at below.
    assert [c for c in ours.calls if c[0] != "on_save"] == [c for c in theirs.calls if c[0] != "on_save"]
    saved = [step for step, _ in ours.saved]
    assert saved == sorted(set(saved)) and set(saved) <= {step for step, _ in theirs.saved}
    assert saved[-1] == theirs.saved[-1][0], "the last one is never left out"
    assert all((tmp_path / "checkpoints" / f"step-{step:06d}") == Path(str(path)) for step, path in ours.saved)
    order = [name for name, _ in ours.calls]
    assert order[-1] == "on_train_end"
    for step in saved:
        assert ours.calls.index(("on_save", step)) > ours.calls.index(("on_step_end", step))
    assert {"loss", "grad_norm", "learning_rate", "epoch"} <= ours.logged[0] & theirs.logged[0]
    assert {"eval_loss", "epoch"} <= ours.metrics[0] & theirs.metrics[0]
    assert {"train_runtime", "train_loss", "epoch"} <= ours.logged[-1] & theirs.logged[-1]


def test_a_stock_callback_works_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_ours(tmp_path, 2, PrinterCallback())
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(printed) == 4 and "'loss'" in printed[0] and "'eval_loss'" in printed[2] and "train_loss" in printed[3]
