"""The training side of a step: jobs and evaluations, the open tape, losses, backward units, optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from loquetier.adapters.arena import Arena
from loquetier.adapters.methods.method import WeightTable
from loquetier.base.model import Base
from loquetier.engine.batch import Batch, DropoutPlan, Int64s, Labels, head_step
from loquetier.engine.rows import StepPlan, TrainItem
from loquetier.errors import LoquetierError
from loquetier.kernels.dropout import row_keys
from loquetier.kernels.transfer import HostCopy
from loquetier.training.data import Example
from loquetier.training.job import EvalResult, EvalTask, FinetuneJob, StepRecord
from loquetier.training.loss import linear_cross_entropy
from loquetier.training.replay import ReplayTape
from loquetier.training.tape import GraphTape

JobListener = Callable[[FinetuneJob, StepRecord | None], None]
"""Told of every optimizer step (with its record) and every change of state (None). Must not block."""


@dataclass(frozen=True, slots=True)
class _Losses:
    """Losses of a step's labelled rows, on their way to the host."""

    labels: Labels
    copy_2L: HostCopy
    """Negative log-likelihood, and 1.0 where the first choice is right."""


@dataclass(slots=True)
class Trainer:
    """Owns every job and evaluation of the engine, and the one tape that may be open."""

    base: Base
    arena: Arena
    head_module: int | None
    """Module index of lm_head, where adapters may sit on it."""
    jobs: dict[int, FinetuneJob] = field(default_factory=dict)
    """Jobs that still hold a slot, by id."""
    evaluations: dict[int, tuple[EvalTask, Callable[[EvalResult | LoquetierError], None]]] = field(default_factory=dict)
    tape: GraphTape | ReplayTape | None = None
    _unread: list[_Losses] = field(default_factory=list)
    """Read when something depends on them, not step by step: reading waits for the device."""

    @property
    def has_work(self) -> bool:
        """Something would run if a step were planned."""
        return bool(self.tape or self.evaluations or any(j.may_run for j in self.jobs.values()))

    @property
    def open_units(self) -> int:
        """Backward units left of the open tape."""
        return self.tape.units_left if self.tape else 0

    @property
    def forward_left(self) -> tuple[TrainItem, ...]:
        """Rows of the open tape whose forward is still to come."""
        return self.tape.forward_left if self.tape else ()

    def drop_dead_tape(self) -> None:
        """Forget the open tape when every job with rows on it has ended: nobody wants its gradients."""
        if self.tape and all(self.jobs[item.job_id].status.is_final for item in self.tape.items):
            self.tape = None

    def train_items(self) -> list[TrainItem]:
        """What the jobs want trained next."""
        return [item for job in self.jobs.values() for item in job.ready_items()]

    def eval_items(self) -> list[TrainItem]:
        """What the evaluations want computed next."""
        return [item for task, _ in self.evaluations.values() for item in task.ready_items()]

    def example_of(self, item: TrainItem) -> tuple[Example, float]:
        """The example behind an item, and the weight of its labelled rows."""
        if item.job_id in self.evaluations:
            return self.evaluations[item.job_id][0].examples[item.item_id], 1.0
        job = self.jobs[item.job_id]
        return job.example(item.item_id), job.row_weight

    def open_tape(self, plan: StepPlan, window: int) -> GraphTape | ReplayTape | None:
        """The tape for the plan's TRAIN rows: a new one for what it opens, whose items are marked as taken, or the one
        that is open. None when the plan has no TRAIN rows.

        `window`: most rows of a replay tape's unit.
        """
        for task, _ in self.evaluations.values():
            task.take(sum(item.job_id == task.task_id for item in plan.evaluate))
        if not plan.train:
            return None
        if not plan.opened:
            assert self.tape is not None and self.tape.forward_left, "windows go on with an open tape"
            return self.tape
        assert self.tape is None, "the scheduler opens one tape at a time"
        for job in self.jobs.values():
            job.take({item.item_id for item in plan.opened if item.job_id == job.job_id})
        self.base.prepare_training()
        slots = {item.slot for item in plan.opened}
        layers = [m.target.layer for s in slots for m in self.arena.modules(s)]
        first = min((layer for layer in layers if layer is not None), default=self.base.num_layers)
        if plan.tape == "replay":
            base = self.base
            self.tape = ReplayTape(plan.opened, base.run_layer, base.num_layers, window, first)
        else:
            self.tape = GraphTape(plan.opened, sum(item.num_rows for item in plan.opened), first)
        return self.tape

    def dropout(self, plan: StepPlan) -> DropoutPlan | None:
        """Dropout of the plan's TRAIN rows, or None when none of the jobs on their tape drops anything."""
        if not plan.train:
            return None
        assert self.tape is not None
        dropping = {i: job for i, job in self.jobs.items() if job.spec.dropout > 0}
        # By the whole tape: all its windows have keys, or none.
        if not any(item.job_id in dropping for item in self.tape.items):
            return None
        keys = [
            row_keys(job.config.seed, job.num_draws, item.item_id, item.num_rows, item.start)
            if (job := dropping.get(item.job_id)) is not None
            else np.zeros(item.num_rows, dtype=np.int64)
            for item in plan.train
        ]
        return DropoutPlan({job.slot: job.spec.dropout for job in dropping.values()}, np.concatenate(keys))

    def grads(self) -> WeightTable:
        """Gradient buffers of every job's slot."""
        return {job.slot: job.optimizer.grad_views for job in self.jobs.values()}

    def losses(self, batch: Batch, hidden_MD: Tensor) -> None:
        """Losses of TRAIN and EVAL rows; gives the tape their gradient."""
        num_train = batch.step.num_train
        if num_train:
            assert self.tape is not None
            train_TD = self.tape.close(hidden_MD)
            grad_TD = self._losses(batch, train_TD, 0, batch.train_labels, with_grad=True)
            assert grad_TD is not None
            self.tape.start(grad_TD)
        if batch.num_eval:
            eval_ED = hidden_MD.detach()[num_train : num_train + batch.num_eval]
            self._losses(batch, eval_ED, num_train, batch.eval_labels, with_grad=False)

    def _losses(
        self, batch: Batch, hidden_TD: Tensor, first_row: int, labels: Labels, *, with_grad: bool
    ) -> Tensor | None:
        def head(hidden_nD: Tensor, rows: Int64s) -> Tensor:
            step = head_step(batch.step, rows + first_row, self.head_module, with_grad=with_grad)
            return self.base.logits(hidden_nD, step)

        adapted = self.head_module is not None and any(
            self.head_module in batch.step.factors[s.slot] for s in batch.step.segments
        )
        plain = None if adapted else self.base.frozen_head
        losses, grad_TD = linear_cross_entropy(hidden_TD, labels.rows, head, with_grad=with_grad, plain=plain)
        self._unread.append(_Losses(labels, HostCopy(torch.stack([losses.nll_L, losses.correct_L]))))
        return grad_TD

    def _settle(self) -> None:
        """Give every item's losses to its job or evaluation, if that is still there."""
        for losses in self._unread:
            nll, correct = losses.copy_2L.numpy().astype(np.float64)
            for item, start, stop in ((r.item, r.start, r.stop) for r in losses.labels.items):
                task = self.evaluations.get(item.job_id)
                owner = task[0] if task is not None else self.jobs.get(item.job_id)
                if owner is not None:
                    # Each item's own sum: another job's loss, be it NaN, must not reach this one's.
                    owner.record(float(nll[start:stop].sum()), float(correct[start:stop].sum()), stop - start)
        self._unread.clear()

    def backward(self, units: int) -> int:
        """Run up to `units` of the open tape; returns units that ran times a unit's cost in rows.

        Closes the tape at the last.
        """
        if self.tape is None or self.tape.forward_left:
            return 0
        ran = min(units, self.tape.units_left)
        for _ in range(ran):
            self.tape.run_unit()
        rows = ran * self.tape.unit_rows
        if self.tape.units_left == 0:
            self._settle()  # an optimizer step looks at its loss; this is where training waits for the device
            for job in self.jobs.values():
                job.finish_items(sum(item.job_id == job.job_id for item in self.tape.items))
            self.tape = None
        return rows

    def optimize(self) -> list[tuple[FinetuneJob, StepRecord]]:
        """Optimizer steps of the jobs whose accumulation is complete. A skipped one changes no weights."""
        ready = [job for job in self.jobs.values() if job.is_step_ready and not job.status.is_final]
        done = []
        for job in ready:
            done.append((job, job.optimizer_step()))
            self.arena.refresh(job.slot)
        return done

    def finished_evaluations(self) -> list[tuple[EvalTask, Callable[[EvalResult | LoquetierError], None]]]:
        """Evaluations whose last example is done; they are forgotten here."""
        if any(task.is_computed for task, _ in self.evaluations.values()):
            self._settle()
        done = [task_id for task_id, (task, _) in self.evaluations.items() if task.is_done]
        return [self.evaluations.pop(task_id) for task_id in done]
