"""The files of a job: every event in metrics.jsonl, one row per optimizer step in results.csv. On disk after each."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from loquetier.adapters.durable import append_durably, fsync_directory, write_file
from loquetier.errors import ConfigError
from loquetier.failpoints import FailPoint, no_fail_point
from loquetier.reporting.events import JobEvent, JobStart
from loquetier.reporting.lines import as_json, continued_lines, event_fields, lines_of
from loquetier.storage import RunWrite, at_once
from loquetier.training.job import StepRecord

METRICS_FILE, RESULTS_FILE = "metrics.jsonl", "results.csv"
HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet runs a cell that begins like this."""


class JobFiles:
    """Observer that writes a job's files into a directory of its own.

    Args:
        directory: made with its parents when missing.
        resumed_job: the name of a job that may go on from a checkpoint: files that it left are taken up. They are then
            made anew from its history, so that each step is there once, whatever a kill cut off or left too much.
        run_write: runs each write, and decides what becomes of one for which the disk has no room.

    Raises:
        ConfigError: the directory cannot be made or written, or holds files of another run. Nothing is left behind.
    """

    def __init__(
        self,
        directory: Path,
        resumed_job: str | None = None,
        fail_point: FailPoint = no_fail_point,
        run_write: RunWrite = at_once,
    ) -> None:
        self.directory, self._fail_point, self._run_write = directory, fail_point, run_write
        self._open: list[IO[str]] = []
        self._made: list[Path] = []
        self._kept_lines: list[str] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if resumed_job is not None:
                self._kept_lines = lines_of(directory / METRICS_FILE, resumed_job)
                _check_header(directory / RESULTS_FILE)
            for name in (METRICS_FILE, RESULTS_FILE):
                path = directory / name
                # "x": another run's files are never overwritten. No newline translation: the csv module writes its own.
                is_taken_up = resumed_job is not None and path.exists()
                self._open.append(path.open("a" if is_taken_up else "x", encoding="utf-8", newline=""))
                self._made += [] if is_taken_up else [path]
            self._metrics, self._results = self._open
            if resumed_job is None:
                append_durably(self._results.fileno(), _row(HEADER))
        except OSError as error:
            self.remove()
            raise ConfigError(
                f"output_dir={str(directory)!r}: {error.strerror} ({error.filename!r}); give a new or empty directory"
            ) from error
        self._waiting: StepRecord | None = None
        """A step whose row waits for the evaluation of the same step."""
        self._is_taken_up = resumed_job is not None

    def remove(self) -> None:
        """Delete what was created: the job did not start."""
        for file in self._open:
            file.close()
        for path in self._made:
            path.unlink(missing_ok=True)

    def begin(self, start: JobStart) -> None:
        """See `JobObserver`."""
        fields = asdict(replace(start, history=())) | {"output_dir": str(self.directory)}
        del fields["history"], fields["is_evaluation_due"]
        if start.history:
            fields["resumed_after_step"] = len(start.history)
        if self._is_taken_up:
            self._take_up(start, as_json({"event": "begin", **fields}))
        else:
            self._write_line({"event": "begin", **fields})

    def _take_up(self, start: JobStart, begin: str) -> None:
        """Replace both files by what is true of the steps in the checkpoint, and append from there."""
        self.close()
        done = list(start.history)
        if start.is_evaluation_due:
            self._waiting = done.pop()  # its evaluation is made again and brings the row
        lines = continued_lines(self._kept_lines, start.job_name, start.history)
        lines = [*lines, begin] if self._kept_lines else [begin, *lines]
        rows = [HEADER, *(_cells(record) for record in done)]
        self._replace(METRICS_FILE, "".join(line + "\n" for line in lines))
        self._fail_point("files.before_replace")
        self._replace(RESULTS_FILE, "".join(",".join(row) + "\n" for row in rows))
        for name, place in ((METRICS_FILE, 0), (RESULTS_FILE, 1)):
            self._open[place] = (self.directory / name).open("a", encoding="utf-8", newline="")
        self._metrics, self._results = self._open

    def _replace(self, name: str, text: str) -> None:
        self._run_write(lambda: _replace(self.directory / name, [text]), len(text.encode("utf-8")))

    def event(self, event: JobEvent) -> None:
        """See `JobObserver`."""
        try:
            self._write_line(event_fields(event))
        finally:  # the table must not miss a row because the other file could not be written
            self._write_row(event)

    def close(self) -> None:
        """See `JobObserver`."""
        for file in self._open:
            file.close()

    def _write_line(self, fields: dict[str, Any]) -> None:
        self._append(self._metrics, (as_json(fields) + "\n").encode("utf-8"))

    def _append(self, file: IO[str], data: bytes) -> None:
        self._run_write(lambda: append_durably(file.fileno(), data), len(data))

    def _write_row(self, event: JobEvent) -> None:
        if event.kind == "step" and event.is_evaluation_due:
            self._waiting = event.record
            return
        record = event.record if event.kind in ("step", "evaluation") else None
        if record is None and event.kind == "status" and event.status.is_final:
            record = self._waiting  # ended before its evaluation was done
        if record is None:
            return
        self._waiting = None
        self._append(self._results, _row(_cells(record)))
        self._fail_point("files.after_row")


def _check_header(path: Path) -> None:
    """Whether a job wrote this table. Raises ConfigError."""
    if not path.exists():
        return
    header = (",".join(HEADER) + "\n").encode()
    with path.open("rb") as file:
        found = file.read(len(header))
    if not header.startswith(found):  # shorter: killed before the first row
        raise ConfigError(f"output_dir: {str(path)!r} is not a job's table; give the directory of the job that resumes")


def _row(cells: Sequence[str]) -> bytes:
    return (",".join(cells) + "\n").encode("utf-8")


def _cells(record: StepRecord) -> list[str]:
    """A step's row. No cell needs quotes: all are numbers, or text made of one."""
    result = record.evaluation
    cells: list[object] = [record.step, record.loss, record.accuracy]
    cells += ["", ""] if result is None else [result.loss, result.accuracy]
    return [csv_cell(cell) for cell in cells]


def csv_cell(value: object) -> str:
    """Text of a cell; what a spreadsheet would take for a formula gets a ``'`` in front. Finite numbers are safe."""
    text = str(value)
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return "'" + text if text.startswith(_FORMULA) and not is_number else text


def _replace(path: Path, lines: Iterable[str]) -> None:
    """New content for a file that a reader, or a kill, finds with the old one or with the new one."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)  # of a life that was killed here
    write_file(new, (line.encode() for line in lines))
    os.replace(new, path)
    fsync_directory(path.parent)
