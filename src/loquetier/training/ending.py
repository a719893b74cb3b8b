"""When a job ends before its last step, and which of its weights are the best: pure functions of its history.

History alone decides, so a job that is paused, moved or resumed decides as an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loquetier.config import TrainingConfig
from loquetier.errors import ConfigError, TrainingDivergedError
from loquetier.training.job import FinetuneJob, StepRecord

MAX_SKIPPED = 3
"""This many steps in a row whose loss or gradient is not finite end a job: its weights are lost, not its luck."""


@dataclass(frozen=True, slots=True)
class BestEvaluation:
    """The lowest evaluation loss so far."""

    step: int
    loss: float
    evaluations_since: int
    """Evaluations after the last one that was an improvement by more than the threshold."""
    checkpoint: Path | None = None
    """Where the weights of `step` are on the disk, if the job has checkpoints."""
    version: int | None = None
    """Under which these weights were published in this process, if they were; it may not be in memory any more."""

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))


def best_evaluation(history: Sequence[StepRecord], threshold: float = 0.0) -> BestEvaluation | None:
    """The best of the evaluations in `history`, as transformers' EarlyStoppingCallback counts them; None before one.

    A loss that is not finite is never the best and never an improvement.
    """
    best: BestEvaluation | None = None
    since = 0
    for record in history:
        if record.evaluation is None:
            continue
        loss = record.evaluation.loss
        lowest = math.inf if best is None else best.loss
        since = 0 if math.isfinite(loss) and loss < lowest - threshold else since + 1
        if loss < lowest:
            best = BestEvaluation(record.step, loss, since)
        elif best is not None:
            best = BestEvaluation(best.step, best.loss, since)
    return best


def improved_now(history: Sequence[StepRecord]) -> bool:
    """Whether the last record's evaluation is lower than all before: its weights are to be served (publish="best")."""
    best = best_evaluation(history)
    return best is not None and best.step == history[-1].step


def reason_to_stop(history: Sequence[StepRecord], config: TrainingConfig) -> str | None:
    """Why a job shall end now, after the evaluation in its last record; None = go on."""
    patience = config.early_stopping_patience
    best = best_evaluation(history, config.early_stopping_threshold)
    if patience is None:
        return None
    if best is None:
        count = sum(r.evaluation is not None for r in history)
        return f"early stopping: none of {count} evaluations had a finite loss" if count >= patience else None
    if best.evaluations_since < patience:
        return None
    return (
        f"early stopping: {best.evaluations_since} evaluations without improvement over loss {best.loss:.6g} of step "
        f"{best.step}"
    )


def divergence(job: FinetuneJob) -> TrainingDivergedError | None:
    """The error of a job whose last steps were all skipped, or that has ended without a single update."""
    skipped = [record.skipped for record in job.history]
    hopeless = all(skipped) and job.num_steps == job.total_steps
    if not hopeless and (len(skipped) < MAX_SKIPPED or not all(skipped[-MAX_SKIPPED:])):
        return None
    in_a_row = next((i for i, was in enumerate(reversed(skipped)) if not was), len(skipped))
    return TrainingDivergedError(
        f"job {job.name!r}: {in_a_row} optimizer steps in a row were skipped, the last with {job.history[-1].reason}; "
        f"the weights of step {job.num_steps - in_a_row} are kept. Lower learning_rate ({job.config.learning_rate}) or "
        "max_grad_norm."
    )


def is_last_step(job: FinetuneJob) -> bool:
    """Whether the job ends by itself after the step, or its evaluation, in its last record."""
    is_stopped = job.history[-1].evaluation is not None and reason_to_stop(job.history, job.config) is not None
    return is_stopped or job.num_steps == job.total_steps or divergence(job) is not None


def nothing_to_publish(job: FinetuneJob) -> TrainingDivergedError | None:
    """The error of a job with publish="best" that has come to its end without an evaluation to be the best."""
    ends = job.num_steps == job.total_steps or reason_to_stop(job.history, job.config) is not None
    if job.config.publish != "best" or not ends or best_evaluation(job.history) is not None:
        return None
    return TrainingDivergedError(
        f"job {job.name!r}: no evaluation had a finite loss, so publish='best' has nothing to publish. Lower "
        f"learning_rate ({job.config.learning_rate}) or look at the evaluation data."
    )


def check_evaluation(config: TrainingConfig, num_examples: int) -> None:
    """Refuse settings that live on evaluations when there is nothing to evaluate on.

    Raises:
        ConfigError: early_stopping_patience or publish="best" without evaluation data.
    """
    for name, value in config.evaluation_users:
        if num_examples == 0:
            raise ConfigError(f"{name}={value!r}: needs evaluation data; give eval_data")
