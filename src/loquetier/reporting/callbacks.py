"""Plain callables and objects with the method names of transformers' TrainerCallback, as observers of a job."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from loquetier.errors import ConfigError
from loquetier.reporting.events import JobCallback, JobEvent, JobObserver, JobStart
from loquetier.training.job import EvalResult, StepRecord

log = logging.getLogger("loquetier.jobs")

METHODS = (
    "on_init_end",
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
)
"""What is called, each with ``(args, state, control, **more)``; on_log gets ``logs=``, on_evaluate ``metrics=``.

Order and arguments are those of transformers' Trainer, with two differences: on_substep_end, on_pre_optimizer_step and
on_optimizer_step come together when the step is done (they tell, nothing waits for them), and on_save when the
checkpoint is on the disk, with a state of the checkpoint's step, which may be some steps ago. Never called:
on_prediction_step, on_predict, on_push_begin.
"""


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
    last_checkpoint: str | None = None
    """In on_save: the checkpoint's directory. Not in transformers, where callbacks make the path themselves."""
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
        self._num_examples = 1
        self._is_epoch_open = False
        self._seconds, self._losses = 0.0, list[float]()
        self._has_begun = False

    def begin(self, start: JobStart) -> None:
        """See `JobObserver`."""
        config = start.config
        self._args = _arguments(start)
        self._state = CallbackState(start.total_steps, config.num_epochs, config.batch_size)
        # The last step of an epoch may hold fewer examples.
        per_step = config.batch_size * config.gradient_accumulation_steps
        self._steps_per_epoch = math.ceil(start.num_examples / per_step)
        self._num_examples = start.num_examples
        for record in start.history:
            self._count(record)
            if record.evaluation is not None:
                self._note_best(record, record.evaluation)
        self._call("on_init_end")
        self._has_begun = True
        self._call("on_train_begin")
        if len(start.history) < start.total_steps and not start.is_evaluation_due:
            self._begin_step()

    def event(self, event: JobEvent) -> None:
        """See `JobObserver`."""
        if event.kind == "step" and event.record is not None:
            self._step(event.record)
            if not event.is_evaluation_due:
                self._after_step(event.is_last_step)
        elif event.kind == "evaluation" and event.record is not None and event.record.evaluation is not None:
            self._evaluation(event.record, event.record.evaluation)
            self._after_step(event.is_last_step)
        elif event.kind == "checkpoint" and event.record is not None:
            step = event.record.step
            at = replace(self._state, global_step=step, epoch=step / self._steps_per_epoch)
            self._call("on_save", replace(at, last_checkpoint=str(event.checkpoint)))
        elif event.kind == "status" and event.status.is_final and self._has_begun:
            self._end()  # it may also end while its data is being validated

    def close(self) -> None:
        """See `JobObserver`."""

    def _begin_step(self) -> None:
        if not self._is_epoch_open:
            self._is_epoch_open = True
            self._call("on_epoch_begin")
        self._call("on_step_begin")

    def _after_step(self, is_last: bool) -> None:
        if self._is_epoch_open and self._state.global_step % self._steps_per_epoch == 0:
            self._end_epoch()
        if not is_last:
            self._begin_step()

    def _end_epoch(self) -> None:
        self._is_epoch_open = False
        self._call("on_epoch_end")

    def _end(self) -> None:
        if self._is_epoch_open:
            self._end_epoch()
        if self._losses:
            mean = sum(self._losses) / len(self._losses)
            self._log({"train_runtime": self._seconds, "train_loss": mean})
        self._call("on_train_end")

    def _num_micro_batches(self, step: int) -> int:
        """Of a step (1-based): the last one of an epoch may have fewer."""
        batch: int = self._args.per_device_train_batch_size
        per_step: int = batch * self._args.gradient_accumulation_steps
        left = self._num_examples - (step - 1) % self._steps_per_epoch * per_step
        return math.ceil(min(per_step, left) / batch)

    def _count(self, record: StepRecord) -> None:
        self._state.global_step = record.step
        self._state.epoch = record.step / self._steps_per_epoch
        self._state.num_input_tokens_seen += record.num_tokens
        self._seconds += record.seconds
        self._losses += [] if record.skipped else [record.loss]

    def _step(self, record: StepRecord) -> None:
        for _ in range(self._num_micro_batches(record.step) - 1):
            self._call("on_substep_end")
        self._call("on_pre_optimizer_step")
        self._call("on_optimizer_step")
        self._count(record)
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
        self._note_best(record, result)

    def _note_best(self, record: StepRecord, result: EvalResult) -> None:
        if self._state.best_metric is None or result.loss < self._state.best_metric:
            self._state.best_metric, self._state.best_global_step = result.loss, record.step

    def _log(self, values: dict[str, float]) -> None:
        logs = values | {"epoch": self._state.epoch}
        self._state.log_history.append(logs | {"step": self._state.global_step})
        self._call("on_log", logs=logs)

    def _call(self, name: str, at: CallbackState | None = None, **more: object) -> None:
        method = getattr(self._target, name, None)
        if method is None:
            return
        try:
            returned = method(self._args, at or self._state, self._control, **more)
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
