"""Optional reporters: TensorBoard, wandb, mlflow and trackio. Each package is imported when a job asks for it.

All are `JobObserver`s: a reporter that raises, on the network or anywhere, is logged and never fails a job.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loquetier.errors import ConfigError
from loquetier.reporting.events import JobEvent, JobObserver, JobStart, evaluation_metrics, step_metrics
from loquetier.training.job import JobStatus

PROJECT = "loquetier"
"""Project or experiment that runs are filed under; a run has its job's name."""


def open_reporters(report_to: Sequence[str | JobObserver]) -> list[JobObserver]:
    """Reporters by name, and ready-made ones as they are.

    Raises:
        ConfigError: an unknown name, a package that is not installed, or something that is no reporter.
    """
    if isinstance(report_to, str) or not isinstance(report_to, Sequence):
        raise ConfigError(f"report_to={str(report_to)[:80]!r}: give a list, as in report_to=['tensorboard']")
    return [_open(wanted) if isinstance(wanted, str) else _checked(wanted) for wanted in report_to]


def _open(name: str) -> JobObserver:
    if name not in _REPORTERS:
        raise ConfigError(f"report_to={name!r}: unknown; use {', '.join(_REPORTERS)}, or an object of your own")
    package, module, make = _REPORTERS[name]
    try:
        return make(importlib.import_module(module))
    except ImportError as error:
        raise ConfigError(f"report_to={name!r}: {error}; run `pip install {package}`, or leave it out") from error


def _checked(reporter: object) -> JobObserver:
    missing = [name for name in ("begin", "event", "close") if not callable(getattr(reporter, name, None))]
    if missing:
        raise ConfigError(f"report_to: {type(reporter).__name__} has no method {', '.join(missing)}; see JobObserver")
    return reporter  # type: ignore[return-value]


class MetricsReporter:
    """Turns events into finite metrics at a step; the four packages differ only in the three functions given here.

    Args:
        open_run: starts a run and returns what it is known by. log: ``(run, metrics, step)``.
        finish: ``(run, final status)``; not called for a run that did not start.
    """

    def __init__(
        self,
        open_run: Callable[[JobStart], Any],
        log: Callable[[Any, Mapping[str, float], int], None],
        finish: Callable[[Any, JobStatus], None],
    ) -> None:
        self._open_run, self._log, self._finish = open_run, log, finish
        self._run: Any = None
        self._status = JobStatus.CANCELLED

    def begin(self, start: JobStart) -> None:
        """See `JobObserver`."""
        self._run = self._open_run(start)

    def event(self, event: JobEvent) -> None:
        """See `JobObserver`."""
        self._status = event.status
        if self._run is None or event.record is None or event.kind in ("warning", "checkpoint"):
            return
        evaluation = event.record.evaluation
        metrics = step_metrics(event.record) if evaluation is None else evaluation_metrics(evaluation)
        # Dashboards draw NaN as a gap at best; train/skipped says what happened.
        self._log(self._run, {k: v for k, v in metrics.items() if math.isfinite(v)}, event.record.step)

    def close(self) -> None:
        """See `JobObserver`."""
        if self._run is not None:
            self._finish(self._run, self._status)


def settings(start: JobStart) -> dict[str, object]:
    """A job's settings, flat, for a run's configuration."""
    sizes = {"total_steps": start.total_steps, "num_examples": start.num_examples}
    return {**asdict(start.config), **{f"{start.spec.method}/{k}": v for k, v in asdict(start.spec).items()}, **sizes}


def _tensorboard(module: Any) -> MetricsReporter:
    def open_run(start: JobStart) -> Any:
        place = f"runs/{start.job_name}" if start.output_dir is None else str(start.output_dir / "tensorboard")
        writer = module.SummaryWriter(log_dir=place)
        writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings(start).items()))
        return writer

    def log(writer: Any, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return MetricsReporter(open_run, log, lambda writer, _status: writer.close())


def _wandb(module: Any) -> MetricsReporter:
    def open_run(start: JobStart) -> Any:
        place = None if start.output_dir is None else str(start.output_dir)
        # Several jobs run at once in one process: each has a run of its own.
        return module.init(project=PROJECT, name=start.job_name, config=settings(start), dir=place, reinit="create_new")

    def log(run: Any, metrics: Mapping[str, float], step: int) -> None:
        run.log(dict(metrics), step=step)

    return MetricsReporter(open_run, log, lambda run, status: run.finish(exit_code=int(status is JobStatus.FAILED)))


def _mlflow(module: Any) -> MetricsReporter:
    ends = {JobStatus.SUCCEEDED: "FINISHED", JobStatus.FAILED: "FAILED"}
    client: Any = None

    def open_run(start: JobStart) -> str:
        nonlocal client
        client = module.MlflowClient()
        found = client.get_experiment_by_name(PROJECT)
        experiment = client.create_experiment(PROJECT) if found is None else found.experiment_id
        run_id = str(client.create_run(experiment, run_name=start.job_name).info.run_id)
        for name, value in settings(start).items():
            client.log_param(run_id, name, str(value)[:500])  # mlflow's own limit in older servers
        return run_id

    def log(run_id: str, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            client.log_metric(run_id, name, value, step=step)

    def finish(run_id: str, status: JobStatus) -> None:
        client.set_terminated(run_id, status=ends.get(status, "KILLED"))

    return MetricsReporter(open_run, log, finish)


def _trackio(module: Any) -> MetricsReporter:
    def open_run(start: JobStart) -> Any:
        config = {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in settings(start).items()}
        return module.init(project=PROJECT, name=start.job_name, config=config, embed=False)

    def log(run: Any, metrics: Mapping[str, float], step: int) -> None:
        run.log(dict(metrics), step=step)

    return MetricsReporter(open_run, log, lambda run, _status: run.finish())


_REPORTERS: dict[str, tuple[str, str, Callable[[Any], JobObserver]]] = {
    "tensorboard": ("tensorboard", "torch.utils.tensorboard", _tensorboard),
    "wandb": ("wandb", "wandb", _wandb),
    "mlflow": ("mlflow", "mlflow", _mlflow),
    "trackio": ("trackio", "trackio", _trackio),
}
"""Name -> package to install, module to import, reporter of that module."""
