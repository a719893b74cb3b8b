"""LoRA dropout: PEFT's semantics with our masks, the same however a step is split, never outside training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.parity.training_helpers import (
    Engine,
    Factors,
    Traffic,
    ask,
    checked,
    load_random_adapter,
    make_engine,
    peft_gradients,
    peft_model,
    peft_nll,
    peft_parameters,
    random_examples,
    relative_difference,
    run,
    slot_factors,
    start,
    watch,
)
from torch import Tensor, nn

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.engine.migration import attach, detach
from loquetier.kernels.dropout import dropped_TK, row_keys
from loquetier.training.data import Example
from loquetier.training.job import FinetuneJob, JobStatus

SPEC = LoraSpec(r=4, alpha=32, dropout=0.25)
DATA = random_examples(7, 6, 24, 1)
EVALS = random_examples(3, 6, 24, 2)
CONFIG = TrainingConfig(learning_rate=5e-3, batch_size=3, max_steps=5, seed=3)


class OurMask(nn.Module):
    """Stands where PEFT has nn.Dropout; drops what `row_keys` of the example under way says."""

    def __init__(self, module: int, rate: float, current: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self.rate, self.current = module, rate, current

    def forward(self, x: Tensor) -> Tensor:
        keep = ~dropped_TK(self.current["keys"][: x.shape[-2]], self.module, x.shape[-1], self.rate)
        return x * keep / (1 - self.rate)


def masked_twin(engine: Engine, spec: LoraSpec, factors: Factors) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's model whose dropout modules use our masks; the dictionary holds the keys of the example under way."""
    twin, current = peft_model("llama", spec, factors), {}
    index = {t.path: t.index for t in engine.base.targets}
    for name, module in twin.named_modules():
        if hasattr(module, "lora_dropout"):
            number = index[name.removeprefix("base_model.model.")]
            module.lora_dropout["default"] = OurMask(number, spec.dropout, current)
    return twin, current


def masked_gradients(
    twin: Any, current: dict[str, Tensor], seed: int, draw: int, items: Sequence[tuple[int, Example]]
) -> Factors:
    """Gradients of one optimizer step's mean loss, one example at a time."""
    twin.zero_grad()
    labels = sum(example.num_labels for _, example in items)
    for item_id, example in items:
        current["keys"] = torch.from_numpy(row_keys(seed, draw, item_id, example.num_rows))
        (peft_nll(twin, example) / labels).backward()
    return {path: (a.grad.clone(), b.grad.clone()) for path, (a, b) in peft_parameters(twin).items()}


@pytest.mark.parametrize("targets", ["all-linear", ("lm_head", "q_proj")], ids=str)
@pytest.mark.parametrize("inference", [0, 3])
def test_gradients_equal_peft_with_the_same_masks(targets: Any, inference: int) -> None:
    spec = replace(SPEC, target_modules=targets)
    with checked(make_engine()) as engine:
        load_random_adapter(engine, "from", spec, 11)
        for number in range(inference):
            ask(engine, "from" if number % 2 else "tiny", range(10, 30), 8)
        job = start(engine, "job", spec, CONFIG, DATA, start_from="from")
        seen = watch(engine, job)
        items = [(item.item_id, job.example(item.item_id)) for item in job.ready_items()]
        while not seen.gradients:
            engine.step()
        ours = slot_factors(engine, engine.registry.resolve("from").slot, seen.gradients[0])
        expected = masked_gradients(*masked_twin(engine, spec, seen.initial), CONFIG.seed, 1, items)
        plain = peft_gradients(peft_model("llama", spec, seen.initial), [example for _, example in items])
        # float32 rounding, as in test_training_parity; without the masks the gradients are others altogether.
        assert relative_difference(ours, expected) < 1e-5
        assert relative_difference(ours, plain) > 0.1
        run(engine)


def curve(
    spec: LoraSpec,
    config: TrainingConfig = CONFIG,
    *,
    traffic: bool = False,
    other: LoraSpec | None = None,
    **limits: Any,
) -> list[float]:
    with checked(make_engine(**limits)) as engine:
        load_random_adapter(engine, "served", SPEC, 5)
        job = start(engine, "job", spec, config, DATA)
        if other is not None:
            start(engine, "other", other, replace(config, seed=9), EVALS)
        run(engine, Traffic(engine, 4, every=1) if traffic else None)
        assert job.status is JobStatus.SUCCEEDED
        return [r.loss for r in job.history]


def test_losses_do_not_depend_on_how_steps_are_split_and_shared() -> None:
    quiet = curve(SPEC)
    # Only rounding differs: other GEMM shapes and sums, then five Adam steps.
    assert curve(SPEC, max_train_rows=8) == pytest.approx(quiet, rel=1e-5)
    assert curve(SPEC, traffic=True, backward_units_while_serving=1) == pytest.approx(quiet, rel=1e-5)
    for other in (replace(SPEC, dropout=0.6), replace(SPEC, dropout=0.0)):
        assert curve(SPEC, other=other, traffic=True, max_train_rows=30) == pytest.approx(quiet, rel=1e-5)


def test_the_mask_depends_on_the_seed_and_changes_every_step() -> None:
    quiet = curve(SPEC)
    assert curve(SPEC) == quiet
    frozen = TrainingConfig(learning_rate=1e-9, batch_size=len(DATA), max_steps=3, shuffle=False)
    # B begins at zero, so only from weights that matter does a mask show: see start_from.
    with checked(make_engine()) as engine:
        load_random_adapter(engine, "from", SPEC, 11)
        losses = []
        for seed in (0, 1):
            job = start(engine, f"job{seed}", SPEC, replace(frozen, seed=seed), DATA, start_from="from")
            run(engine)
            losses += [r.loss for r in job.history]
        assert len({round(loss, 5) for loss in losses}) == 6


def test_evaluation_and_serving_never_drop() -> None:
    """EVAL rows on the slot in training, next to its TRAIN rows of another job, and answers: as without dropout."""
    frozen = TrainingConfig(learning_rate=1e-9, batch_size=3, max_steps=2, eval_every=1)
    results = []
    for dropout in (0.0, 0.9):
        with checked(make_engine()) as engine:
            spec = replace(SPEC, dropout=dropout)
            load_random_adapter(engine, "from", SPEC, 11)
            job = start(engine, "job", spec, frozen, DATA, eval_examples=EVALS, start_from="from")
            start(engine, "other", spec, frozen, DATA, start_from="from")
            answer = ask(engine, "from", range(20, 40), 6, logprobs=0)
            run(engine)
            evaluations = [r.evaluation.loss for r in job.history if r.evaluation]
            assert len(evaluations) == 2
            results.append((evaluations, answer.tokens, [e.logprob for e in answer.events]))
    # The weights move by 1e-9 a step.
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == results[1][1] and results[0][2] == pytest.approx(results[1][2], abs=1e-5)


def test_a_job_moved_to_another_engine_goes_on_with_the_same_masks() -> None:
    expected = curve(SPEC)
    one, two = make_engine(), make_engine()
    job = start(one, "job", SPEC, CONFIG, DATA)
    while job.num_steps < 2:
        one.step()
    moved = attach(two, detach(one, "job"), lambda _job, _record: None)
    assert isinstance(moved, FinetuneJob)
    run(two)
    assert [r.loss for r in moved.history] == expected


@contextmanager
def no_hashing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise AssertionError("a step without dropout must not touch its code")

    with monkeypatch.context() as patched:
        for name in ("dropout_forward", "dropout_backward"):
            patched.setattr(f"loquetier.adapters.methods.lora.{name}", refuse)
        patched.setattr("loquetier.engine.trainer.row_keys", refuse)
        yield


def test_without_dropout_nothing_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So training with dropout=0 is bit for bit what it was before there was dropout."""
    with no_hashing(monkeypatch):
        assert len(curve(replace(SPEC, dropout=0.0), traffic=True)) == 5
