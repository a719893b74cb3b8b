"""Rows as OpenAI's objects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loquetier.server.schemas.jobs import CheckpointObject, EventObject, JobError, JobObject
from loquetier.server.store.jobs import CheckpointRow, EventRow, JobRow
from loquetier.training.job import StepRecord

_RECENT = 20
"""Steps whose mean time tells when a job will end."""


def job_object(row: JobRow, now: float, history: Sequence[StepRecord] = (), total_steps: int = 0) -> JobObject:
    """A job; `history` and `total_steps` of one that runs in this process."""
    settings = row.settings
    hyper = settings["hyperparameters"]
    return JobObject(
        id=row.id,
        created_at=row.created_at,
        finished_at=row.finished_at,
        estimated_finish=_estimate(now, history, total_steps) if row.status == "running" else None,
        status=row.status,
        model=row.base,
        fine_tuned_model=row.fine_tuned_model,
        organization_id=f"org-{row.owner}",
        training_file=row.training_file,
        validation_file=row.validation_file,
        result_files=row.result_files,
        trained_tokens=row.trained_tokens,
        hyperparameters=hyper,
        method={"type": "supervised", "supervised": {"hyperparameters": hyper}},
        seed=row.seed,
        integrations=[],
        metadata=row.metadata,
        error=None if row.error is None else JobError(**row.error),
        live_model=row.model if row.is_published else None,
        reason=row.reason,
        lora=settings["lora"],
        training=settings["training"],
    )


def _estimate(now: float, history: Sequence[StepRecord], total_steps: int) -> int | None:
    recent = history[-_RECENT:]
    if not recent:
        return None
    return int(now + (total_steps - len(history)) * sum(r.seconds for r in recent) / len(recent)) + 1


def event_object(row: EventRow) -> EventObject:
    """An event."""
    return EventObject(
        id=row.id,
        created_at=row.created_at,
        level=row.level,
        message=row.message,
        type=row.type,
        data=row.data or {},
    )


def checkpoint_object(row: CheckpointRow) -> CheckpointObject:
    """A checkpoint."""
    return CheckpointObject(
        id=row.id,
        created_at=row.created_at,
        fine_tuning_job_id=row.job_id,
        fine_tuned_model_checkpoint=row.model,
        step_number=row.step,
        metrics=row.metrics,
    )


def step_metrics(record: StepRecord, total_steps: int) -> dict[str, Any]:
    """Of a metrics event; numbers that are not finite are left out, because JSON has none."""
    found: dict[str, Any] = {
        "step": record.step,
        "total_steps": total_steps,
        "train_loss": record.loss,
        "train_mean_token_accuracy": record.accuracy,
        "learning_rate": record.learning_rate,
        "grad_norm": record.grad_norm,
        "num_tokens": record.num_tokens,
    }
    if record.evaluation is not None:  # always over the whole validation file
        for name in ("valid", "full_valid"):
            found[f"{name}_loss"] = record.evaluation.loss
            found[f"{name}_mean_token_accuracy"] = record.evaluation.accuracy
    return {name: value for name, value in found.items() if math.isfinite(value)}


def step_message(record: StepRecord, total_steps: int) -> str:
    """In OpenAI's words."""
    text = f"Step {record.step}/{total_steps}: training loss={record.loss:.2f}"
    return text if record.evaluation is None else f"{text}, validation loss={record.evaluation.loss:.2f}"


_CHECKPOINT_METRICS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


def checkpoint_metrics(record: StepRecord) -> dict[str, float]:
    """OpenAI's seven, as far as they are known."""
    known = step_metrics(record, 0)
    return {name: known[name] for name in _CHECKPOINT_METRICS if name in known}
