"""Lines of metrics.jsonl: made from events, and what is kept of them when a job goes on from a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loquetier.errors import ConfigError
from loquetier.reporting.events import JobEvent
from loquetier.training.job import EvalResult, JobStatus, StepRecord


def as_json(fields: dict[str, Any]) -> str:
    """One line, without its end."""
    return json.dumps(_finite(fields), ensure_ascii=False, allow_nan=False)


def lines_of(path: Path, job_name: str) -> list[str]:
    """The complete lines of a job's metrics, which may end in one that a kill cut off; none if there is no file.

    Raises:
        ConfigError: they are not those of this job. OSError.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]
    # Killed while its data was read, a job has told its states and not yet its beginning.
    first = _fields(lines[0]) if lines else {"event": "begin", "job_name": job_name}
    if first.get("job_name" if first.get("event") == "begin" else "job") != job_name:
        raise ConfigError(
            f"output_dir: {str(path)!r} was not written by job {job_name!r}; give that of the job that "
            "resumes, or a new one"
        )
    return lines


def continued_lines(lines: Iterable[str], job_name: str, history: Sequence[StepRecord]) -> list[str]:
    """`lines` of a job's earlier lives without what its last checkpoint knows nothing of, and with all that it knows.

    A kill loses lines that were not yet written when the checkpoint was, and leaves lines of steps that will be made
    again. The lines before stay as they are; the missing ones are made from `history`.
    """
    kept: list[str] = []
    seen: set[tuple[str, int]] = set()
    for line in lines:
        fields = _fields(line)
        step = fields.get("step", 0)
        if not fields or step > len(history):
            break
        # An evaluation that the checkpoint does not hold is made again.
        if fields["event"] == "evaluation" and history[step - 1].evaluation is None:
            break
        if step:
            seen.add((fields["event"], step))
        kept.append(line)
    missing = [event for event in _events(job_name, history) if (event.kind, _step(event)) not in seen]
    return kept + [as_json(event_fields(event)) for event in missing]


def _events(job_name: str, history: Sequence[StepRecord]) -> Iterable[JobEvent]:
    for record in history:
        if record.skipped:
            yield JobEvent("warning", job_name, JobStatus.RUNNING, record, reason=record.reason)
        yield JobEvent("step", job_name, JobStatus.RUNNING, record, reason=record.reason)
        if record.evaluation is not None:
            yield JobEvent("evaluation", job_name, JobStatus.RUNNING, record)


def _step(event: JobEvent) -> int:
    assert event.record is not None
    return event.record.step


def _fields(line: str) -> dict[str, Any]:
    """A line's fields; empty for what is no line of ours."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    is_ours = isinstance(fields, dict) and isinstance(fields.get("event"), str)
    return fields if is_ours and isinstance(fields.get("step", 0), int) else {}


def event_fields(event: JobEvent) -> dict[str, Any]:
    """An event as the fields of its line."""
    fields: dict[str, Any] = {"event": event.kind, "job": event.job_name, "status": event.status.value}
    record = event.record
    if event.kind == "evaluation" and record is not None:
        assert record.evaluation is not None
        fields |= {"step": record.step, **_evaluation(record.evaluation)}
    elif event.kind == "checkpoint" and record is not None:
        fields |= {"step": record.step, "checkpoint": str(event.checkpoint)}
    elif record is not None:
        fields |= {k: v for k, v in asdict(record).items() if k not in ("evaluation", "reason")}
    if event.reason is not None:
        fields["reason"] = event.reason
    if event.error is not None:
        fields["error"] = {"code": event.error.code, "message": str(event.error)}
    return fields


def _evaluation(result: EvalResult) -> dict[str, float]:
    return {
        "valid_loss": result.loss,
        "valid_mean_token_accuracy": result.accuracy,
        "valid_num_tokens": result.num_tokens,
        "valid_perplexity": result.perplexity,
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
