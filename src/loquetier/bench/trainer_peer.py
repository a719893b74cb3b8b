"""The same fine-tuning as most people run it today: PEFT's model in Hugging Face's `Trainer`, stock collator, padding.

Needs the `dev` extra (peft and accelerate).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from loquetier.base.loading import LoadedBase
from loquetier.bench.learning import Curve, LearningRun, Records
from loquetier.errors import ConfigError
from loquetier.training.data import IGNORE


class TrainerPeer:
    """A PEFT model with fresh LoRA weights on all linears.

    Raises:
        ConfigError: peft or accelerate is not installed.
    """

    def __init__(self, loaded: LoadedBase, run: LearningRun) -> None:
        missing = [name for name in ("peft", "accelerate") if find_spec(name) is None]
        if missing:
            raise ConfigError(f"the comparison needs {' and '.join(missing)}: install the dev extra")
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(run.seed)
        config = LoraConfig(r=run.rank, lora_alpha=run.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(loaded.model, config)
        self._tokenizer, self._run = loaded.tokenizer, run

    def save(self, directory: Path) -> None:
        """Write the adapter as a PEFT directory, for everybody to start from."""
        self.model.save_pretrained(str(directory))

    def encode(self, records: Records) -> list[dict[str, list[int]]]:
        """TRL's rule: the prompt's tokens without loss, then the other tokens of prompt + completion and the end."""
        rows = []
        for record in records:
            head = self._tokenizer(record["prompt"])["input_ids"]
            whole = self._tokenizer(record["prompt"] + record["completion"])["input_ids"]
            tokens = [*whole, self._tokenizer.eos_token_id]
            rows.append({"input_ids": tokens, "labels": [IGNORE] * len(head) + tokens[len(head) :]})
        return [{name: ids[: self._run.max_tokens] for name, ids in row.items()} for row in rows]

    def train(
        self,
        train: Records,
        held_out: Records,
        progress: Callable[[Curve], None],
        *,
        on_step: Callable[[], None] = lambda: None,
        autocast: bool = False,
    ) -> Curve:
        """Train and look at the held-out part, if any; `progress` is told after every step.

        Args:
            on_step: called as each optimizer step ends.
            autocast: Trainer's ``bf16=True``.
        """
        from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback

        curve = Curve()

        class Recorder(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                on_step()

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
                if "loss" in logs:
                    curve.train_loss.append(logs["loss"])
                if "eval_token_loss" in logs:
                    curve.held_out_loss.append((state.global_step, logs["eval_token_loss"]))
                progress(curve)

        with tempfile.TemporaryDirectory() as directory:
            trainer = Trainer(
                model=self.model,
                args=_arguments(self._run, directory, evaluates=bool(held_out), autocast=autocast),
                train_dataset=self.encode(train),
                eval_dataset=self.encode(held_out) if held_out else None,
                data_collator=DataCollatorForSeq2Seq(self._tokenizer, label_pad_token_id=IGNORE),
                compute_metrics=_token_mean,
                preprocess_logits_for_metrics=_token_losses,
                callbacks=[Recorder()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return curve


def _arguments(run: LearningRun, directory: str, *, evaluates: bool, autocast: bool) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=directory,
        use_cpu=True,
        max_steps=run.steps,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.schedule,
        warmup_steps=run.warmup_ratio,  # below 1: a part of all steps
        weight_decay=0.0,
        max_grad_norm=run.max_grad_norm,
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,
        bf16=autocast,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=run.eval_every,
        eval_on_start=evaluates,
        per_device_eval_batch_size=run.batch_size,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=run.seed,
    )


def _token_losses(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Losses ``[B, L - 1]`` of every position, 0 where there is no label; what Trainer keeps instead of the logits."""
    flat = logits_BLV[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(flat, labels_BL[:, 1:].flatten(), ignore_index=IGNORE, reduction="none").view(
        len(labels_BL), -1
    )


def _token_mean(prediction: Any) -> dict[str, float]:
    """Mean over the labelled tokens of the whole set. (Trainer's own eval_loss is a mean of batches' means.)"""
    labelled = prediction.label_ids[:, 1:] != IGNORE
    losses: Any = prediction.predictions
    return {"token_loss": float(losses[labelled].astype(np.float64).mean())}
