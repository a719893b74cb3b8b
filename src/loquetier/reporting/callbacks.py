"""Plain callables and objects with the method names of transformers' TrainerCallback, as observers of a job."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from loquetier.errors import ConfigError
from loquetier.reporting.events import JobCallback, JobEvent, JobObserver, JobStart
from loquetier.training.job import EvalResult, StepRecord

log = logging.getLogger("loquetier.jobs")

METHODS = ("on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_train_end")
"""What is called, each with ``(args, state, control, **more)``; on_log gets ``logs=``, on_evaluate ``metrics=``."""


@dataclass(slots=True)
class CallbackState:
    """The fields of transformers' TrainerState that mean something here."""

    max_steps: int
    num_train_epochs: int
    train_batch_size: int
    global_step: int = 0
    epoch: float = 0.0
    best_metric: float | None = None
    """Lowest eval_loss so far, the one being reported not included (as in transformers)."""
    best_global_step: int | None = None
    num_input_tokens_seen: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None


@dataclass(slots=True)
class CallbackControl:
    """transformers' TrainerControl; only `should_training_stop` is acted on, the others are warned about."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


def as_observer(callback: object, stop: Callable[[], None]) -> JobObserver:
    """Wrap what a caller gave.

    Args:
        callback: a callable that takes a `JobEvent`, or an object with one of METHODS.
        stop: cancels the job; called when the object sets ``control.should_training_stop``.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(callback, type) and any(callable(getattr(callback, name, None)) for name in METHODS):
        return MethodObserver(callback, stop)
    if not callable(callback) or isinstance(callback, type):
        raise ConfigError(
            f"callbacks: {type(callback).__name__} {str(callback)[:80]!r} is neither a callable that takes a JobEvent "
            f"nor an instance with one of the methods {', '.join(METHODS)}"
        )
    return FunctionObserver(callback)


class FunctionObserver:
    """Calls a function with each event."""

    def __init__(self, function: JobCallback) -> None:
        self._function = function

    def begin(self, start: JobStart) -> None:
        """See `JobObserver`."""

    def event(self, event: JobEvent) -> None:
        """See `JobObserver`."""
        self._function(event)

    def close(self) -> None:
        """See `JobObserver`."""


class MethodObserver:
    """Calls the methods of an object written for transformers' Trainer."""

    def __init__(self, target: object, stop: Callable[[], None]) -> None:
        self._target, self._stop = target, stop
        self._control: Any = CallbackControl()
        self._args = SimpleNamespace()
        self._state = CallbackState(0, 0, 0)
        self._steps_per_epoch = 1

    def begin(self, start: JobStart) -> None:
        """See `JobObserver`."""
        config = start.config
        self._args = _arguments(start)
        self._state = CallbackState(start.total_steps, config.num_epochs, config.batch_size)
        # The last step of an epoch may hold fewer examples.
        per_step = config.batch_size * config.gradient_accumulation_steps
        self._steps_per_epoch = math.ceil(start.num_examples / per_step)
        self._call("on_train_begin")

    def event(self, event: JobEvent) -> None:
        """See `JobObserver`."""
        if event.kind == "step" and event.record is not None:
            self._step(event.record)
        elif event.kind == "evaluation" and event.record is not None and event.record.evaluation is not None:
            self._evaluation(event.record, event.record.evaluation)
        elif event.kind == "status" and event.status.is_final:
            self._call("on_train_end")

    def close(self) -> None:
        """See `JobObserver`."""

    def _step(self, record: StepRecord) -> None:
        self._state.global_step = record.step
        self._state.epoch = record.step / self._steps_per_epoch
        self._state.num_input_tokens_seen += record.num_tokens
        logs = {"loss": record.loss, "grad_norm": record.grad_norm, "learning_rate": record.learning_rate}
        self._call("on_step_end")
        self._log(logs | {"mean_token_accuracy": record.accuracy})

    def _evaluation(self, record: StepRecord, result: EvalResult) -> None:
        metrics = {
            "eval_loss": result.loss,
            "eval_mean_token_accuracy": result.accuracy,
            "eval_perplexity": result.perplexity,
        }
        self._log(metrics)
        self._call("on_evaluate", metrics=metrics | {"epoch": self._state.epoch})
        if self._state.best_metric is None or result.loss < self._state.best_metric:
            self._state.best_metric, self._state.best_global_step = result.loss, record.step

    def _log(self, values: dict[str, float]) -> None:
        logs = values | {"epoch": self._state.epoch}
        self._state.log_history.append(logs | {"step": self._state.global_step})
        self._call("on_log", logs=logs)

    def _call(self, name: str, **more: object) -> None:
        method = getattr(self._target, name, None)
        if method is None:
            return
        try:
            returned = method(self._args, self._state, self._control, **more)
            self._control = self._control if returned is None else returned
        finally:
            self._obey(name)

    def _obey(self, name: str) -> None:
        asked = self._control
        self._control = CallbackControl()
        ignored = [
            k for k in ("should_epoch_stop", "should_save", "should_evaluate", "should_log") if getattr(asked, k)
        ]
        if ignored:
            log.warning("%s of %s set %s, which has no effect here", name, type(self._target).__name__, ignored)
        if asked.should_training_stop and name != "on_train_end":
            self._stop()


def _arguments(start: JobStart) -> SimpleNamespace:
    """The job's settings by the names of transformers' TrainingArguments."""
    c = start.config
    return SimpleNamespace(
        run_name=start.job_name,
        output_dir=None if start.output_dir is None else str(start.output_dir),
        learning_rate=c.learning_rate,
        lr_scheduler_type=c.lr_scheduler_type,
        warmup_ratio=c.warmup_ratio,
        weight_decay=c.weight_decay,
        adam_beta1=c.adam_beta1,
        adam_beta2=c.adam_beta2,
        adam_epsilon=c.adam_epsilon,
        max_grad_norm=c.max_grad_norm,
        per_device_train_batch_size=c.batch_size,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        num_train_epochs=c.num_epochs,
        max_steps=-1 if c.max_steps is None else c.max_steps,
        seed=c.seed,
        eval_strategy="steps" if c.eval_every and start.num_eval_examples else "no",
        eval_steps=c.eval_every or None,
        logging_strategy="steps",
        logging_steps=1,
        load_best_model_at_end=c.publish == "best",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=[],
    )
