"""The estimate that admits a job, against the bytes of tensors that are alive at the highest point of its run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.training_helpers import MIB, make_engine, run, start
from tests.tiny import EOS, tiny_model, tiny_tokenizer

from loquetier.adapters.spec import LoraSpec
from loquetier.base.loading import LoadedBase, load_base
from loquetier.base.model import Base
from loquetier.bench.live_bytes import LiveBytes
from loquetier.config import EngineConfig, TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.training.data import Example
from loquetier.training.job import FinetuneJob, StepRecord
from loquetier.training.memory import MemoryEstimate, largest_fill

WITHIN = 0.15
"""As promised to users, in both directions. Kernels' own workspaces are not tensors, and not counted."""
CONFIG = TrainingConfig(batch_size=2, max_steps=2, publish="end")


def base_of(dtype: torch.dtype, **model: Any) -> Base:
    settings = {"layers": 6, "hidden": 64, "head_dim": 8, "kv_heads": 4, "vocab": 600, "context": 2048}
    torch_model = tiny_model("llama", **(settings | model)).to(dtype).requires_grad_(False)
    loaded = LoadedBase(
        model=torch_model,
        tokenizer=tiny_tokenizer(),
        name="tiny",
        source=Path("."),
        max_context=2048,
        eos_token_ids=frozenset({EOS}),
        num_parameters=0,
        weight_bytes=0,
    )
    return Base(loaded)


def examples(count: int, rows: int, labels: int) -> tuple[Example, ...]:
    """`count` examples of so many rows, the last `labels` of them learnt."""
    learn = tuple(i > rows - labels for i in range(rows + 1))
    return tuple(Example(tuple((7 * i + k) % 200 for i in range(rows + 1)), learn) for k in range(count))


def measured(
    base: Base,
    spec: LoraSpec,
    config: TrainingConfig,
    data: tuple[Example, ...],
    held_out: tuple[Example, ...] = (),
    **engine: Any,
) -> tuple[int, MemoryEstimate]:
    """Most bytes alive at once while a job runs alone, and what was estimated for the same things."""
    dtype: Any = "float32" if base.dtype == torch.float32 else "bfloat16"
    settings = {"dtype": dtype, "device": "cpu", "kv_memory": MIB, "adapter_memory": 64 * MIB} | engine
    built = Engine(base, EngineConfig(**settings))
    base.prepare_training()  # once per process, and of the base: no job's memory
    for example in (*data, *held_out):  # its arrays are made once, by numpy, which is not counted here
        assert example.label_targets is not None
    with LiveBytes() as memory:
        job = start(built, "job", spec, config, data, eval_examples=held_out)
        assert job.estimate is not None
        run(built)
    return memory.peak, job.estimate


def tensors(estimate: MemoryEstimate) -> int:
    """The part of an estimate that a run without checkpoints makes as tensors, outside the arena."""
    peak = max(estimate.activations, estimate.evaluation)
    return estimate.master + estimate.gradient + estimate.moments + peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tape", ["graph", "replay"])
@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("rows", [90, 500])
def test_estimate_is_what_is_measured(dtype: torch.dtype, tape: str, rank: int, rows: int) -> None:
    peak, estimate = measured(
        base_of(dtype), LoraSpec(r=rank), CONFIG, examples(2, rows, rows // 2), tape=tape, train_window=128
    )
    assert estimate.tape == tape and estimate.rows == 2 * rows
    assert tensors(estimate) == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("tape", ["graph", "replay"])
@pytest.mark.parametrize(
    "case",
    [
        {"spec": LoraSpec(r=8, target_modules=("q_proj", "v_proj"))},
        {"labels": 3},  # hardly any loss: the highest point is the backward, or the replay tape's forward
        {"model": {"vocab": 6000}},  # nothing but loss
        {"model": {"intermediate_size": 300}},
        {"model": {"kv_heads": 1, "head_dim": 16}},
        {"model": {"layers": 2}},
        {"spec": LoraSpec(r=8, use_dora=True)},
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_other_shapes(tape: str, case: dict[str, Any]) -> None:
    peak, estimate = measured(
        base_of(torch.float32, **case.get("model", {})),
        case.get("spec", LoraSpec(r=8)),
        CONFIG,
        examples(2, 300, case.get("labels", 200)),
        tape=tape,
        train_window=100,
    )
    assert tensors(estimate) == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tape", ["graph", "replay"])
@pytest.mark.parametrize("model", [{}, {"intermediate_size": 300}, {"hidden": 128}], ids=str)
@pytest.mark.parametrize(("count", "rows", "labels"), [(1, 1000, 3), (2, 500, 499), (5, 300, 150)])
def test_long_evaluations(
    dtype: torch.dtype, tape: str, model: dict[str, Any], count: int, rows: int, labels: int
) -> None:
    """Steps of EVAL rows are the highest point where the held-out examples are longer than those trained on."""
    peak, estimate = measured(
        base_of(dtype, **model), LoraSpec(r=4), CONFIG, examples(2, 40, 20), examples(count, rows, labels), tape=tape
    )
    assert tensors(estimate) == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "phi3"])
def test_other_families_on_the_graph_tape(family: str) -> None:
    """Soft-capped scores (gemma2) are most of what is kept."""
    engine = make_engine(family, model={"layers": 6}, tape="graph", adapter_memory=16 * MIB)
    with LiveBytes() as memory:
        job = start(engine, "job", LoraSpec(r=4), replace(CONFIG, batch_size=1), examples(1, 240, 240))
        run(engine)
    assert job.estimate is not None
    assert tensors(job.estimate) == pytest.approx(memory.peak, rel=WITHIN)


def test_one_tape_at_a_time_so_two_jobs_take_the_larger_one() -> None:
    base = base_of(torch.float32)
    engine = Engine(
        base,
        EngineConfig(
            dtype="float32", device="cpu", kv_memory=MIB, adapter_memory=64 * MIB, tape="graph", max_train_rows=300
        ),
    )
    with LiveBytes() as memory:
        jobs = [start(engine, n, LoraSpec(r=4), CONFIG, examples(2, rows, rows)) for n, rows in (("a", 300), ("b", 80))]
        run(engine)
    needs = [
        engine.admission.model.needs(
            job.config, engine.arena.modules(engine.registry.resolve(job.name).slot), data, (), saves=False
        )
        for job, data in zip(jobs, (examples(2, 300, 300), examples(2, 80, 80)), strict=True)
    ]
    together = engine.admission.model.smallest(needs[0], needs[1:]) - sum(n.estimate.data for n in needs)
    assert together == pytest.approx(memory.peak, rel=WITHIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_copies_for_checkpoints(dtype: torch.dtype) -> None:
    engine = Engine(base_of(dtype), EngineConfig(device="cpu", kv_memory=MIB, adapter_memory=64 * MIB))
    images: list[int] = []

    def listen(job: FinetuneJob, record: StepRecord | None) -> None:
        if record is not None:
            image = job.image()
            flats = [image.master, image.grad, *image.moments.values()]
            images.append(sum(t.nbytes for t in flats) + sum(t.nbytes for t in flats))
            images[-1] += sum(t.nbytes for t in (image.grad, *image.moments.values()))

    job = engine.jobs.start("job", LoraSpec(r=8), CONFIG, examples(2, 20, 5), (), listen, saves=True)
    run(engine)
    assert job.estimate is not None
    assert job.estimate.checkpoint == pytest.approx(images[-1], rel=0.01)  # the step counts of Adam


def test_encoded_data() -> None:
    """Python's own count of what examples of fresh integers take."""
    import sys

    data = tuple(Example(tuple(range(1000, 1501)), (True,) * 501) for _ in range(4))
    held = sum(
        sys.getsizeof(e.tokens)
        + sum((sys.getsizeof(t) + 7) // 8 * 8 for t in e.tokens)
        + sys.getsizeof(e.learn)
        + e.label_rows.nbytes
        + e.label_targets.nbytes
        for e in data
    )
    engine = Engine(base_of(torch.float32, vocab=2000), EngineConfig(device="cpu", adapter_memory=MIB, kv_memory=MIB))
    estimate = start(engine, "job", LoraSpec(r=4), replace(CONFIG, max_steps=1), data[:1]).estimate
    assert estimate is not None
    assert 4 * estimate.data == pytest.approx(held, rel=WITHIN)
    run(engine)


@pytest.mark.parametrize(
    ("sizes", "most", "rows"),
    [((), 10, 0), ((12,), 10, 12), ((12, 9), 10, 12), ((6, 5, 4), 10, 10), ((4, 4, 4), 10, 8), ((3, 2), 10, 5)],
)
def test_largest_fill(sizes: tuple[int, ...], most: int, rows: int) -> None:
    assert largest_fill(sizes, most) == rows


@pytest.mark.real
@pytest.mark.timeout(300)
@pytest.mark.parametrize("tape", ["graph", "replay"])
def test_the_real_model(tape: str) -> None:
    base = Base(load_base("smollm2-135m", dtype=torch.float32, device="cpu"))
    config = replace(CONFIG, batch_size=1)  # two steps: moments are made by the first
    peak, estimate = measured(base, LoraSpec(r=8), config, examples(1, 256, 100), tape=tape, train_window=64)
    assert tensors(estimate) == pytest.approx(peak, rel=WITHIN)
