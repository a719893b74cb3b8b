"""What is told about a job while it runs, and who can be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from loquetier.adapters.spec import AdapterSpec
from loquetier.config import TrainingConfig
from loquetier.errors import LoquetierError
from loquetier.training.job import EvalResult, JobStatus, StepRecord


@dataclass(frozen=True, slots=True)
class JobStart:
    """What is known of a job before its first step."""

    job_name: str
    config: TrainingConfig
    spec: AdapterSpec
    total_steps: int
    num_examples: int
    num_eval_examples: int
    output_dir: Path | None = None
    """Where the job's files are written, if anywhere."""
    history: tuple[StepRecord, ...] = ()
    """Steps done before a break, when the job goes on from a checkpoint."""
    is_evaluation_due: bool = False
    """The evaluation of the last of them was cut off and is made again."""
    num_truncated: int = 0
    """Examples, of both kinds, that were longer than ``max_seq_len``."""
    num_cut_tokens: int = 0
    """Tokens that they have lost."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job."""

    kind: Literal["step", "warning", "evaluation", "checkpoint", "status"]
    """A skipped step gives a "warning" and then its "step"; "checkpoint" comes when one is on the disk, maybe later."""
    job_name: str
    status: JobStatus
    record: StepRecord | None = None
    """The step's record ("step", "warning"), or the same with its evaluation filled in ("evaluation")."""
    error: LoquetierError | None = None
    """Why it failed."""
    reason: str | None = None
    """Why a step was skipped, or why the job ended before its last step."""
    is_evaluation_due: bool = False
    """An "evaluation" of this very step follows, unless the job is stopped before."""
    is_last_step: bool = False
    """No further step follows (of a "step" without evaluation, or an "evaluation"), unless the job is told to end."""
    checkpoint: Path | None = None
    """The directory that a "checkpoint" tells of."""


JobCallback = Callable[[JobEvent], None]


class JobObserver(Protocol):
    """Told of one job, on a thread of its own kind: never the engine's. What it raises is logged and fails nothing."""

    def begin(self, start: JobStart) -> None:
        """Before the first step."""
        ...

    def event(self, event: JobEvent) -> None:
        """Everything that happens, in order; the last one has a final status."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


def step_metrics(record: StepRecord) -> dict[str, float]:
    """A step as the flat names that dashboards group by."""
    return {
        "train/loss": record.loss,
        "train/accuracy": record.accuracy,
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.grad_norm,
        "train/num_tokens": float(record.num_tokens),
        "train/skipped": float(record.skipped),
    }


def evaluation_metrics(result: EvalResult) -> dict[str, float]:
    """An evaluation as the flat names that dashboards group by."""
    return {
        "eval/loss": result.loss,
        "eval/mean_token_accuracy": result.accuracy,
        "eval/perplexity": result.perplexity,
    }
