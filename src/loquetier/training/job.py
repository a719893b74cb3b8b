"""One fine-tuning job: its data, its place in them, its optimizer and its history. Driven by the engine thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from loquetier.adapters.spec import AdapterSpec
from loquetier.config import TrainingConfig
from loquetier.engine.rows import TrainItem
from loquetier.errors import LoquetierError
from loquetier.training.data import Example, batches
from loquetier.training.memory import MemoryEstimate
from loquetier.training.optimizer import AdapterOptimizer, learning_rate
from loquetier.training.states import JobStatus as JobStatus
from loquetier.training.states import check_transition

NO_SLOT = -1
"""Of a job that has no memory yet."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Means over the labelled tokens of an evaluation set."""

    loss: float
    accuracy: float
    """Part of the labelled tokens that are the model's first choice."""
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. Loss and accuracy are means over the step's labelled tokens, before the update."""

    step: int
    """1-based."""
    loss: float
    accuracy: float
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Rows computed for this step, labelled or not; there is no padding."""
    seconds: float
    """Wall time since the step's first rows were scheduled."""
    evaluation: EvalResult | None = None
    skipped: bool = False
    """Its loss or gradient was not finite: the step changed neither weights nor moments."""
    reason: str | None = None
    """Why it was skipped."""


@dataclass(slots=True)
class LossSum:
    """Running sums of labelled rows' losses."""

    nll: float = 0.0
    correct: float = 0.0
    num_labels: int = 0

    def add(self, nll: float, correct: float, num_labels: int) -> None:
        """Add one item's sums."""
        self.nll += nll
        self.correct += correct
        self.num_labels += num_labels

    def result(self) -> EvalResult:
        """The means."""
        n = max(1, self.num_labels)
        return EvalResult(self.nll / n, self.correct / n, self.num_labels)


@dataclass(slots=True)
class EvalTask:
    """An evaluation set that runs as EVAL rows on one slot."""

    task_id: int
    slot: int
    examples: tuple[Example, ...]
    sums: LossSum = field(default_factory=LossSum)
    _next: int = 0
    _done: int = 0

    def ready_items(self) -> list[TrainItem]:
        """Examples not yet scheduled."""
        return [
            TrainItem(self.task_id, i, self.examples[i].num_rows, self.slot)
            for i in range(self._next, len(self.examples))
        ]

    def take(self, count: int) -> None:
        """The first `count` of `ready_items` were scheduled."""
        self._next += count

    @property
    def is_computed(self) -> bool:
        """Every example was scheduled; the last ones' losses may still be on the device."""
        return self._next == len(self.examples)

    def record(self, nll: float, correct: float, num_labels: int) -> None:
        """One example's losses."""
        self.sums.add(nll, correct, num_labels)
        self._done += 1

    @property
    def is_done(self) -> bool:
        """Every example has its losses."""
        return self._done == len(self.examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobImage:
    """A job's whole state between two tapes, independent of engine, slot and device."""

    name: str
    spec: AdapterSpec
    config: TrainingConfig
    examples: tuple[Example, ...]
    eval_examples: tuple[Example, ...]
    status: JobStatus
    history: tuple[StepRecord, ...]
    num_draws: int
    """Optimizer steps whose examples were drawn: the place in the data."""
    todo: tuple[int, ...]
    """Items of the current step not yet computed; the others are in `grad`."""
    step_labels: int
    step_rows: int
    sums: LossSum
    master: Tensor
    """Flat float32 weights in slot layout; `grad` and the moments have the same shape."""
    grad: Tensor
    moments: dict[str, Tensor]


class FinetuneJob:
    """State of one job. It offers the examples of its current optimizer step; the engine runs them in any split.

    Each row's weight is 1 / (labelled tokens of the whole optimizer step), so the gradient is the same however the
    step's examples are spread over engine steps.
    """

    def __init__(
        self,
        job_id: int,
        name: str,
        spec: AdapterSpec,
        config: TrainingConfig,
        examples: tuple[Example, ...] = (),
        eval_examples: tuple[Example, ...] = (),
        slot: int = NO_SLOT,
        optimizer: AdapterOptimizer | None = None,
    ) -> None:
        """Without examples it is being validated, without an optimizer it is queued."""
        self.job_id, self.name, self.spec, self.config = job_id, name, spec, config
        self.status = JobStatus.VALIDATING_FILES
        self.error: LoquetierError | None = None
        self.reason: str | None = None
        """Why it is in this state, where the state does not say it: what it waits for, why it was paused or ended."""
        self.position: int | None = None
        """1-based place in the queue; None when it is not queued."""
        self.estimate: MemoryEstimate | None = None
        """What it will need, known when it is queued."""
        self.holds: dict[str, str] = {}
        """Why it cannot go on for now, by who found out; a full disk, say."""
        self.is_held = False
        """Paused by a hold, and not by its owner: it goes on by itself."""
        self.history: list[StepRecord] = []
        self.versions: dict[int, int] = {}
        """Number of the version under which the weights of a step were published last, in this process."""
        self.is_ahead = False
        """Its checkpoints are still being written: no further step begins before they are."""
        self.evaluation: EvalTask | None = None
        """Running evaluation on the training slot; no training rows are offered meanwhile."""
        self.slot, self._optimizer = slot, optimizer
        self.examples: tuple[Example, ...] = ()
        self.eval_examples: tuple[Example, ...] = ()
        self.total_steps = 0
        """Optimizer steps it will make; 0 while its data is not known."""
        self._batches: Iterator[list[int]] = iter(())
        self._num_draws = 0
        self._todo: list[TrainItem] = []
        self._num_open = 0
        """Items of the current step whose backward is not complete yet."""
        self._step_labels = 0
        self._step_rows = 0
        self._sums = LossSum()
        self._started = 0.0
        if examples:
            self.give_data(examples, eval_examples)
            self.status = JobStatus.QUEUED if optimizer is None else JobStatus.RUNNING

    def give_data(self, examples: tuple[Example, ...], eval_examples: tuple[Example, ...]) -> None:
        """What it trains and is evaluated on; once."""
        assert examples and not self.examples
        self.examples, self.eval_examples = examples, eval_examples
        config = self.config
        per_step = config.batch_size * config.gradient_accumulation_steps
        self.total_steps = config.max_steps or config.num_epochs * math.ceil(len(examples) / per_step)
        self._batches = batches(len(examples), per_step, seed=config.seed, shuffle=config.shuffle, epochs=None)

    def give_memory(self, slot: int, optimizer: AdapterOptimizer) -> None:
        """Where its weights and their optimizer live; once."""
        assert self._optimizer is None
        self.slot, self._optimizer = slot, optimizer

    def drop_memory(self) -> None:
        """It has ended: gradient and moments are nobody's any more, whoever still holds the job."""
        assert self.status.is_final
        self._optimizer = None

    @property
    def has_memory(self) -> bool:
        """It has a slot and an optimizer."""
        return self._optimizer is not None

    @property
    def optimizer(self) -> AdapterOptimizer:
        """Its master weights, gradient and moments, while it has memory."""
        assert self._optimizer is not None
        return self._optimizer

    @property
    def num_steps(self) -> int:
        """Optimizer steps done."""
        return len(self.history)

    @property
    def num_draws(self) -> int:
        """Optimizer steps whose examples were drawn, the current one included."""
        return self._num_draws

    @property
    def is_published_now(self) -> bool:
        """Whether the step just done is one to publish; publish="best" is decided by evaluations instead."""
        publish, step = self.config.publish, self.num_steps
        if publish == "best":
            return False
        if step == self.total_steps:
            return True
        if publish == "every_step" and self.history[-1].skipped:
            return False  # these weights are served already
        return publish == "every_step" or (publish == "every_n_steps" and step % self.config.publish_every == 0)

    @property
    def is_eval_due(self) -> bool:
        """Whether the step just done asks for an evaluation."""
        every = self.config.eval_every
        return bool(self.eval_examples) and (
            self.num_steps == self.total_steps or (every > 0 and self.num_steps % every == 0)
        )

    @property
    def may_run(self) -> bool:
        """Neither its state nor the disk keeps it from going on."""
        return self.status is JobStatus.RUNNING and not self.is_ahead

    def ready_items(self) -> list[TrainItem]:
        """Examples of the current optimizer step not yet scheduled; draws the next step's when it may start."""
        if not self.may_run or self.evaluation is not None:
            return []
        if not self._todo and self._num_open == 0 and self.num_steps < self.total_steps:
            self._draw()
        return self._todo

    def _draw(self) -> None:
        numbers = next(self._batches)
        self._num_draws += 1
        chosen = [self.examples[i] for i in numbers]
        # item_id carries the example's number and its place in the step: an epoch may repeat inside one step.
        self._todo = [
            TrainItem(self.job_id, place * len(self.examples) + number, example.num_rows, self.slot)
            for place, (number, example) in enumerate(zip(numbers, chosen, strict=True))
        ]
        self._num_open = len(numbers)
        self._step_labels = sum(e.num_labels for e in chosen)
        self._step_rows = sum(e.num_rows for e in chosen)
        self._sums = LossSum()
        self._started = time.monotonic()

    def example(self, item_id: int) -> Example:
        """The example behind an item."""
        return self.examples[item_id % len(self.examples)]

    @property
    def row_weight(self) -> float:
        """Weight of each labelled row's loss in the current optimizer step."""
        return 1.0 / self._step_labels

    def take(self, items: set[int]) -> None:
        """These items (ids) were scheduled."""
        self._todo = [i for i in self._todo if i.item_id not in items]

    def record(self, nll: float, correct: float, num_labels: int) -> None:
        """One item's forward is done."""
        self._sums.add(nll, correct, num_labels)

    def finish_items(self, count: int) -> None:
        """The backward of this many items is complete."""
        self._num_open -= count
        assert self._num_open >= 0

    @property
    def has_open_rows(self) -> bool:
        """Items are between their forward and the end of their backward."""
        return self._num_open > len(self._todo)

    @property
    def is_step_ready(self) -> bool:
        """Every item of the optimizer step has its gradient."""
        return self._step_labels > 0 and self._num_open == 0 and not self._todo and self._sums.num_labels > 0

    def optimizer_step(self) -> StepRecord:
        """Clip, update, record. When loss or gradient is not finite nothing is updated and the record says so."""
        means = self._sums.result()
        lr = learning_rate(self.config, self.num_steps, self.total_steps)
        # The gradient of an infinite loss may be finite: it must not be applied either.
        norm = self.optimizer.step(lr) if math.isfinite(means.loss) else self.optimizer.drop_gradient()
        reason = None
        if not (math.isfinite(norm) and math.isfinite(means.loss)):
            reason = f"loss {means.loss} and gradient norm {norm} at step {self.num_steps + 1}"
        seconds = time.monotonic() - self._started
        record = StepRecord(
            self.num_steps + 1,
            means.loss,
            means.accuracy,
            lr,
            norm,
            self._step_rows,
            seconds,
            skipped=reason is not None,
            reason=reason,
        )
        self.history.append(record)
        self._sums = LossSum()
        return record

    def image(self) -> JobImage:
        """A copy of everything, on the CPU. Between two tapes it is complete.

        While rows are between their forward and backward, the optimizer step under way is left out and will be drawn
        again: its gradient starts from zero, so the result is the same. A running evaluation is left out too: who
        restores starts it again.
        """
        optimizer, is_partial = self.optimizer, self.has_open_rows
        grad = optimizer.grad.cpu().clone()
        return JobImage(
            name=self.name,
            spec=self.spec,
            config=self.config,
            examples=self.examples,
            eval_examples=self.eval_examples,
            status=self.status,
            history=tuple(self.history),
            num_draws=self._num_draws - is_partial,
            todo=() if is_partial else tuple(item.item_id for item in self._todo),
            step_labels=0 if is_partial else self._step_labels,
            step_rows=0 if is_partial else self._step_rows,
            sums=LossSum() if is_partial else replace(self._sums),
            master=optimizer.master.detach().cpu().clone(),
            grad=grad.zero_() if is_partial else grad,
            moments={name: tensor.cpu().clone() for name, tensor in optimizer.state().items()},
        )

    def restore(self, image: JobImage) -> None:
        """Go on from an image of a job with the same data and layout, bit for bit; not in its state."""
        self.history = list(image.history)
        for _ in range(image.num_draws):
            next(self._batches)
        self._num_draws = image.num_draws
        self._todo = [
            TrainItem(self.job_id, item_id, self.example(item_id).num_rows, self.slot) for item_id in image.todo
        ]
        self._num_open = len(self._todo)
        self._step_labels, self._step_rows, self._sums = image.step_labels, image.step_rows, replace(image.sums)
        self._started = time.monotonic()
        self.optimizer.load_state(image.master, image.moments)
        self.optimizer.grad.copy_(image.grad)

    def attach_evaluation(self, result: EvalResult) -> None:
        """Put an evaluation's result into the record of the step it was made after."""
        self.history[-1] = replace(self.history[-1], evaluation=result)

    def move(self, to: JobStatus, reason: str | None = None) -> None:
        """Change state; the reason of the state before goes with it.

        Raises:
            JobStateError: not from the present state; nothing changed.
        """
        check_transition(self.name, self.status, to)
        self.status, self.reason = to, reason
