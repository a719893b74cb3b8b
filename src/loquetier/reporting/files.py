"""The files of a job: every event in metrics.jsonl, one row per optimizer step in results.csv. On disk after each."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from loquetier.errors import ConfigError
from loquetier.reporting.events import JobEvent, JobStart
from loquetier.training.job import EvalResult, StepRecord

METRICS_FILE, RESULTS_FILE = "metrics.jsonl", "results.csv"
HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet runs a cell that begins like this."""


class JobFiles:
    """Observer that writes a job's files into a directory of its own.

    Args:
        directory: made with its parents when missing.

    Raises:
        ConfigError: the directory cannot be made or written, or holds files of another run. Nothing is left behind.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: list[IO[str]] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, RESULTS_FILE):
                # "x": another run's files are never overwritten. No newline translation: the csv module writes its own.
                self._open.append((directory / name).open("x", encoding="utf-8", newline=""))
        except OSError as error:
            self.remove()
            raise ConfigError(
                f"output_dir={str(directory)!r}: {error.strerror} ({error.filename!r}); give a new or empty directory"
            ) from error
        self._metrics, self._results = self._open
        self._rows = csv.writer(self._results, lineterminator="\n")
        self._rows.writerow(HEADER)
        self._waiting: StepRecord | None = None
        """A step whose row waits for the evaluation of the same step."""

    def remove(self) -> None:
        """Delete what was created: the job did not start."""
        for file in self._open:
            file.close()
            Path(file.name).unlink(missing_ok=True)

    def begin(self, start: JobStart) -> None:
        """See `JobObserver`."""
        fields = asdict(start) | {"output_dir": str(self.directory)}
        self._write_line({"event": "begin", **fields})

    def event(self, event: JobEvent) -> None:
        """See `JobObserver`."""
        try:
            self._write_line(_line(event))
        finally:  # the table must not miss a row because the other file could not be written
            self._write_row(event)

    def close(self) -> None:
        """See `JobObserver`."""
        for file in self._open:
            file.close()

    def _write_line(self, fields: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(_finite(fields), ensure_ascii=False, allow_nan=False) + "\n")
        _to_disk(self._metrics)

    def _write_row(self, event: JobEvent) -> None:
        if event.kind == "step" and event.is_evaluation_due:
            self._waiting = event.record
            return
        record = event.record if event.kind in ("step", "evaluation") else None
        if record is None and event.status.is_final:
            record = self._waiting  # ended before its evaluation was done
        if record is None:
            return
        self._waiting = None
        result = record.evaluation
        cells: list[object] = [record.step, record.loss, record.accuracy]
        cells += ["", ""] if result is None else [result.loss, result.accuracy]
        self._rows.writerow([csv_cell(cell) for cell in cells])
        _to_disk(self._results)


def csv_cell(value: object) -> str:
    """Text of a cell; what a spreadsheet would take for a formula gets a ``'`` in front. Finite numbers are safe."""
    text = str(value)
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return "'" + text if text.startswith(_FORMULA) and not is_number else text


def _line(event: JobEvent) -> dict[str, Any]:
    fields: dict[str, Any] = {"event": event.kind, "job": event.job_name, "status": event.status.value}
    record = event.record
    if event.kind == "evaluation" and record is not None:
        assert record.evaluation is not None
        fields |= {"step": record.step, **_evaluation(record.evaluation)}
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


def _to_disk(file: IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
