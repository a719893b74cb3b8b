"""The replay tape gives the graph tape's gradients, which are PEFT's, whatever its window, and keeps a bounded amount.

Gradients differ by rounding only: sums run over windows instead of whole examples. Measured 2.1e-6 at most of a
factor's largest element (float32 rounds at 6e-8); a lost or doubled gradient of K or V shows at 1e-2 and above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.parity import training_helpers
from tests.parity.test_activation_bytes import FLOAT, HEAD_DIM, HIDDEN, KV_HEADS, Kept
from tests.parity.training_helpers import (
    MIB,
    Engine,
    Factors,
    Traffic,
    Watch,
    ask,
    checked,
    load_random_adapter,
    make_engine,
    peft_gradients,
    peft_model,
    random_examples,
    relative_difference,
    run,
    slot_factors,
    start,
    watch,
)
from tests.tiny import FAMILIES
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.errors import UnsupportedModelError
from loquetier.training.data import Example
from loquetier.training.job import FinetuneJob, JobStatus
from loquetier.training.replay import ReplayTape

RTOL = 1e-5
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = LoraSpec(r=4, alpha=8)
SOME = LoraSpec(r=3, target_modules=("v_proj", "down_proj"), use_rslora=True)
TWO_STEPS = TrainingConfig(batch_size=2, max_steps=2, learning_rate=1e-2)
MIXED = LoraSpec(r=5, target_modules=ATTENTION)


def specs_of(family: str) -> tuple[LoraSpec, LoraSpec]:
    """All linears, and attention only. PEFT's "all-linear" adapts experts and routers too, which are no nn.Linear."""
    if family == "phi3":
        return ALL, LoraSpec(r=5, target_modules=("qkv_proj", "down_proj"))
    return (LoraSpec(r=4, target_modules=ATTENTION) if family == "qwen3_moe" else ALL), MIXED


def relative_norm(ours: Factors, theirs: Factors) -> float:
    pairs = [(a.float(), b.float()) for path in ours for a, b in zip(ours[path], theirs[path], strict=True)]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return (apart / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def two_jobs(
    engine: Engine, specs: tuple[LoraSpec, LoraSpec], examples: Sequence[Example]
) -> list[tuple[FinetuneJob, Watch, Factors]]:
    """Two jobs of one optimizer step each, that continue from random weights; their rows share a tape."""
    jobs = []
    for number, (own_spec, own) in enumerate(zip(specs, (examples[:2], examples[2:]), strict=True)):
        initial = load_random_adapter(engine, f"from{number}", own_spec, 20 + number)
        config = TrainingConfig(batch_size=len(own), max_steps=1)
        job = start(engine, f"job{number}", own_spec, config, own, start_from=f"from{number}")
        jobs.append((job, watch(engine, job), initial))
    return jobs


def step_gradients(
    family: str, specs: tuple[LoraSpec, LoraSpec], examples: Sequence[Example], *, traffic: bool = False, **config: Any
) -> list[tuple[Factors, Factors]]:
    """Initial weights and gradients of two jobs on one tape; with traffic, serving goes on between the units."""
    engine = make_engine(family, backward_units_while_serving=1, adapter_memory=16 * MIB, **config)
    jobs = two_jobs(engine, specs, examples)
    if traffic:
        for number in range(4):
            ask(engine, "from0" if number % 2 else "tiny", range(10 + number, 20 + 3 * number), 6 + 9 * number)
    tapes, mixed_steps = set(), 0
    while not all(seen.gradients for _, seen, _ in jobs):
        report = engine.step()
        tapes.add(type(engine.trainer.tape).__name__)
        mixed_steps += bool(report.backward_units and report.decode_rows)
    assert engine.totals.train_rows == sum(e.num_rows for e in examples)
    assert not traffic or ("ReplayTape" in tapes and mixed_steps > 8)
    gradients = []
    for number, (_, seen, initial) in enumerate(jobs):
        slot = engine.registry.resolve(f"from{number}").slot
        gradients.append((initial, slot_factors(engine, slot, seen.gradients[0])))
    run(engine)
    engine.check_integrity()
    return gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_graph_tapes_and_pefts(family: str) -> None:
    specs, examples = specs_of(family), random_examples(4, 9, 33, 5)
    graph = step_gradients(family, specs, examples, tape="graph")
    data = (examples[:2], examples[2:])
    theirs = [
        peft_gradients(peft_model(family, s, initial), e) for s, e, (initial, _) in zip(specs, data, graph, strict=True)
    ]
    # 5 and 7 cut examples of two jobs anywhere; 1 is a window of one row; 256 takes both jobs' examples whole.
    for window in (1, 5, 7, 256):
        replay = step_gradients(family, specs, examples, tape="replay", train_window=window)
        for (_, ours), (_, by_graph), peft in zip(replay, graph, theirs, strict=True):
            assert relative_difference(ours, by_graph) < RTOL
            assert relative_difference(ours, peft) < RTOL


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3_moe"])
def test_inference_rows_in_the_forward_and_steps_between_the_units(family: str) -> None:
    specs, examples = specs_of(family), random_examples(4, 9, 33, 6)
    graph = step_gradients(family, specs, examples, tape="graph")
    replay = step_gradients(family, specs, examples, traffic=True, tape="replay", train_window=7)
    for (_, ours), (_, by_graph) in zip(replay, graph, strict=True):
        assert relative_difference(ours, by_graph) < RTOL


def test_bfloat16_rounds_no_more_for_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distance from the exact (float32) gradient is the graph tape's own: K's and V's gradients are summed wide."""
    specs, examples = (ALL, MIXED), random_examples(4, 30, 40, 12)
    exact = step_gradients("llama", specs, examples, tape="graph")
    build = training_helpers.tiny_model
    monkeypatch.setattr(training_helpers, "tiny_model", lambda *a, **k: build(*a, **k).to(torch.bfloat16))
    graph = step_gradients("llama", specs, examples, tape="graph")
    replay = step_gradients("llama", specs, examples, tape="replay", train_window=2)
    for (_, by_replay), (_, by_graph), (_, true) in zip(replay, graph, exact, strict=True):
        assert 0 < relative_norm(by_replay, true) < 1.25 * relative_norm(by_graph, true)


@pytest.mark.parametrize("window", [3, 8, 11])
def test_window_around_a_sliding_windows_width(window: int) -> None:
    """Mistral and Gemma 2 hide keys 8 and more tokens back: the past that a window reads is cut there."""
    examples = random_examples(3, 30, 40, 8)
    for family in ("mistral", "gemma2"):
        graph = step_gradients(family, (SOME, MIXED), examples, tape="graph")
        replay = step_gradients(family, (SOME, MIXED), examples, tape="replay", train_window=window)
        for (_, ours), (_, by_graph) in zip(replay, graph, strict=True):
            assert relative_difference(ours, by_graph) < RTOL


@pytest.mark.parametrize(
    ("spec", "units"),
    [
        (LoraSpec(r=4, target_modules=("q_proj", "o_proj"), layers_to_transform=(2, 3)), 9),
        (LoraSpec(r=4, target_modules=("lm_head",)), 0),
    ],
)
def test_layers_below_the_first_trained_one_have_no_units(
    spec: LoraSpec, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    run_unit = ReplayTape.run_unit

    def counted(tape: ReplayTape) -> None:
        ran.append(1)
        run_unit(tape)

    engines = {tape: make_engine(model={"layers": 5}, tape=tape, train_window=16) for tape in ("graph", "replay")}
    monkeypatch.setattr(ReplayTape, "run_unit", counted)
    gradients = {}
    for tape, engine in engines.items():
        load_random_adapter(engine, "from", spec, 3)
        config = TrainingConfig(batch_size=2, max_steps=1)
        job = start(engine, "job", spec, config, random_examples(2, 20, 20, 9), start_from="from")
        seen = watch(engine, job)
        run(engine)
        gradients[tape] = seen.gradients[0]
    assert len(ran) == units  # 38 rows are 3 windows of layers 2, 3 and 4
    graph = gradients["graph"]
    assert float((gradients["replay"] - graph).abs().max()) < RTOL * float(graph.abs().max())


def test_units_left_counts_down_to_nothing() -> None:
    engine = make_engine(model={"layers": 3}, tape="replay", train_window=7, backward_units_while_serving=1)
    ask(engine, "tiny", range(10, 20), 100)
    start(engine, "job", ALL, TrainingConfig(batch_size=2, max_steps=1), random_examples(2, 16, 16, 1))
    left = []
    while not left or engine.trainer.tape is not None:
        engine.step()
        left.append(engine.trainer.open_units)
    # 30 rows in windows of 7 make 5 units a layer; the step that ran the forward ran the first.
    assert left == list(range(14, -1, -1))
    run(engine)


def test_training_on_the_replay_tape_among_traffic_is_the_quiet_graph_run() -> None:
    losses = {}
    for tape in ("graph", "replay"):
        with checked(make_engine(tape=tape, train_window=9, backward_units_while_serving=2)) as engine:
            config = TrainingConfig(batch_size=2, max_steps=12, learning_rate=3e-3)
            job = start(engine, "job", ALL, config, random_examples(5, 8, 40, 2))
            run(engine, Traffic(engine, seed=4) if tape == "replay" else None)
            assert job.status is JobStatus.SUCCEEDED
            losses[tape] = [r.loss for r in job.history]
    torch.testing.assert_close(losses["replay"], losses["graph"], rtol=1e-5, atol=0.0)


# --- bytes ---


def kept_by_forward(layers: int, rows: int, inference: int) -> Kept:
    """Distinct storages alive on the tape after a forward with one example of `rows` rows."""
    engine = make_engine(model={"layers": layers}, tape="replay", train_window=8, backward_units_while_serving=1)
    for number in range(inference):
        ask(engine, "tiny", range(10 + number, 30 + number), 40)
    start(engine, "job", ALL, TrainingConfig(batch_size=1, max_steps=1), random_examples(1, rows + 1, rows + 1, 3))
    kept = Kept(engine)
    forward = engine.base.hidden

    def measured(*args: Any) -> Tensor:
        if args[2].cuts is None:
            return forward(*args)

        def pack(tensor: Tensor) -> Tensor:
            kept.add([tensor])
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden_MD = forward(*args)
        tape = engine.trainer.tape
        assert isinstance(tape, ReplayTape) and tape._final_leaf is not None
        kept.add([tape._final_leaf])
        for layer in tape._layers:
            kept.add([layer.input_1TD, *tape._kv[layer.number]])
            arguments, keywords = layer.call.args, layer.call.kwargs
            kept.add(row.tensor for row in (*arguments, *keywords["position_embeddings"], keywords["position_ids"]))
        return hidden_MD

    engine.base.hidden = measured  # type: ignore[method-assign]
    report = engine.step()
    assert report.train_rows == rows and bool(report.prefill_rows) == bool(inference)
    run(engine)
    return kept


@pytest.mark.parametrize("inference", [0, 5])
def test_kept_bytes_are_layer_inputs_and_kv(inference: int) -> None:
    rows, kv = 40, 2 * KV_HEADS * HEAD_DIM
    kept = {layers: kept_by_forward(layers, rows, inference).num_bytes for layers in (2, 4)}
    per_layer = (kept[4] - kept[2]) / 2
    assert per_layer == FLOAT * rows * (HIDDEN + kv)
    # Once: the output of the last layer, cos and sin, positions (int64). Beside inference rows the last norm copies its
    # train rows out.
    last = HIDDEN * (2 if inference else 1)
    assert kept[2] - 2 * per_layer == FLOAT * rows * (last + 2 * HEAD_DIM) + 8 * rows


# --- what it refuses ---


def test_a_layer_argument_without_rows_is_refused_by_name() -> None:
    engine = make_engine(tape="replay")
    job = start(engine, "job", ALL, TWO_STEPS, random_examples(2, 10, 12, 3))
    layer = engine.base._layers[0]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "extra": torch.zeros(3, 4)}), with_kwargs=True, prepend=True
    )
    run(engine)
    assert job.status is JobStatus.FAILED and isinstance(job.error, UnsupportedModelError)
    assert "[3, 4]" in str(job.error) and "tape='graph'" in str(job.error)
    engine.check_integrity()


def test_a_change_between_layers_is_refused() -> None:
    engine = make_engine(tape="replay")
    job = start(engine, "job", ALL, TWO_STEPS, random_examples(2, 10, 12, 3))

    def doubled(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * 2, *args[1:])

    engine.base._layers[1].register_forward_pre_hook(doubled, prepend=True)
    run(engine)
    assert job.status is JobStatus.FAILED and "between layers 0 and 1" in str(job.error)
    engine.check_integrity()
