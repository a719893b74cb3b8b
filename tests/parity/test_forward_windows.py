"""A replay tape's forward spread over steps is the forward at once: losses and gradients differ by rounding only.

Sums run over other groups of rows: the tolerances are those of the tapes (see test_replay_tape.py). A window that does
not see its example's earlier rows, sees them at wrong places, or counts a loss twice shows at 1e-2 and above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.parity.test_activation_bytes import FLOAT, HEAD_DIM, HIDDEN, KV_HEADS
from tests.parity.test_replay_tape import ALL, MIXED, RTOL, SOME, specs_of, two_jobs
from tests.parity.training_helpers import (
    MIB,
    Engine,
    Factors,
    Traffic,
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

from loquetier.adapters.spec import LoraSpec
from loquetier.bench.live_bytes import LiveBytes
from loquetier.config import TrainingConfig
from loquetier.errors import UnsupportedModelError
from loquetier.training.data import Example
from loquetier.training.job import FinetuneJob, JobStatus
from loquetier.training.replay import ReplayTape

LONG = TrainingConfig(batch_size=1, max_steps=2, learning_rate=1e-2)


def cut_forwards(engine: Engine, monkeypatch: pytest.MonkeyPatch, widths: Sequence[int]) -> list[int]:
    """Have forwards of open replay tapes run in windows of these widths, in turn; returns what ran, window by window.

    The items are the policy's own choice, which packs several jobs' examples; only the windows are narrower.
    """
    from loquetier.engine import policy
    from loquetier.engine.rows import cut_rows

    ran: list[int] = []

    def narrow(left: Any, room: Any) -> Any:
        width = widths[len(ran) % len(widths)]
        window = cut_rows(left, 0, width)
        if window:
            ran.append(sum(item.num_rows for item in window))
        return window

    monkeypatch.setattr(policy, "forward_window", narrow)
    return ran


def gradients_of_two_jobs(
    engine: Engine, specs: tuple[LoraSpec, LoraSpec], examples: Sequence[Example], *, traffic: bool = False
) -> tuple[list[tuple[Factors, Factors]], list[float]]:
    """Initial weights and gradients of two jobs whose rows share one tape, and their losses."""
    jobs = two_jobs(engine, specs, examples)
    if traffic:
        for number in range(4):
            ask(engine, "from0" if number % 2 else "tiny", range(10 + number, 20 + 3 * number), 6 + 9 * number)
        engine.jobs.evaluate("from1", tuple(examples[:2]), lambda result: None)
    mixed = 0
    while not all(seen.gradients for _, seen, _ in jobs):
        report = engine.step()
        mixed += bool(report.train_rows and report.decode_rows)
        assert traffic or not report.decode_rows
    assert not traffic or mixed > 3
    assert engine.totals.train_rows == sum(e.num_rows for e in examples)
    found, losses = [], []
    for number, (job, seen, initial) in enumerate(jobs):
        slot = engine.registry.resolve(f"from{number}").slot
        found.append((initial, slot_factors(engine, slot, seen.gradients[0])))
        losses.append(job.history[0].loss)
        assert job.history[0].num_tokens == sum(e.num_rows for e in (examples[:2], examples[2:])[number])
    run(engine)
    engine.check_integrity()
    return found, losses


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_of_any_width_give_the_gradients_of_one_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, examples = specs_of(family), random_examples(4, 9, 33, 5)
    graph, losses = gradients_of_two_jobs(make_engine(family, tape="graph", adapter_memory=16 * MIB), specs, examples)
    data = (examples[:2], examples[2:])
    theirs = [
        peft_gradients(peft_model(family, s, initial), e) for s, e, (initial, _) in zip(specs, data, graph, strict=True)
    ]
    # Forward windows cross examples and jobs, and do not fall on the units' windows of 7 rows.
    for widths in ((1,), (11,), (3, 17, 5)):
        engine = make_engine(family, tape="replay", train_window=7, adapter_memory=16 * MIB)
        ran = cut_forwards(engine, monkeypatch, widths)
        windowed, sums = gradients_of_two_jobs(engine, specs, examples)
        assert len(ran) > 5 and sum(ran) == sum(e.num_rows for e in examples)
        assert sums == pytest.approx(losses, rel=RTOL)
        for (_, ours), (_, by_graph), peft in zip(windowed, graph, theirs, strict=True):
            assert relative_difference(ours, by_graph) < RTOL
            assert relative_difference(ours, peft) < RTOL


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3_moe"])
def test_requests_and_an_evaluation_run_in_the_windows_steps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, examples = specs_of(family), random_examples(4, 9, 33, 6)
    graph, losses = gradients_of_two_jobs(make_engine(family, tape="graph", adapter_memory=16 * MIB), specs, examples)
    engine = make_engine(family, tape="replay", train_window=7, adapter_memory=16 * MIB, backward_units_while_serving=1)
    cut_forwards(engine, monkeypatch, (9, 4))
    windowed, sums = gradients_of_two_jobs(engine, specs, examples, traffic=True)
    assert sums == pytest.approx(losses, rel=RTOL)
    for (_, ours), (_, by_graph) in zip(windowed, graph, strict=True):
        assert relative_difference(ours, by_graph) < RTOL


@pytest.mark.parametrize("width", [3, 8, 11])
def test_windows_around_a_sliding_windows_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral and Gemma 2 hide keys 8 and more tokens back."""
    examples = random_examples(3, 30, 40, 8)
    for family in ("mistral", "gemma2"):
        graph, _ = gradients_of_two_jobs(make_engine(family, tape="graph"), (SOME, MIXED), examples)
        engine = make_engine(family, tape="replay", train_window=9)
        cut_forwards(engine, monkeypatch, (width,))
        windowed, _ = gradients_of_two_jobs(engine, (SOME, MIXED), examples)
        for (_, ours), (_, by_graph) in zip(windowed, graph, strict=True):
            assert relative_difference(ours, by_graph) < RTOL


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(r=4, target_modules=("q_proj", "o_proj"), layers_to_transform=(2, 3)),
        LoraSpec(r=4, target_modules=("lm_head",)),
        LoraSpec(r=4, dropout=0.4),
    ],
    ids=["upper-layers", "head-only", "dropout"],
)
def test_what_the_policy_does_with_a_long_example(spec: LoraSpec) -> None:
    """Layers without trained weights keep K and V for later windows too; a dropped value is dropped in any split."""
    gradients, losses = {}, {}
    for tape, limit in (("graph", 1024), ("replay", 16)):
        engine = make_engine(model={"layers": 5}, tape=tape, train_window=16, max_train_rows=limit)
        load_random_adapter(engine, "from", spec, 3)
        job = start(engine, "job", spec, LONG, random_examples(2, 60, 60, 9), start_from="from")
        seen = watch(engine, job)
        rows = []
        while engine.has_work:
            rows.append(engine.step().train_rows)
        assert job.status is JobStatus.SUCCEEDED
        assert [r for r in rows if r] == ([59, 59] if tape == "graph" else [16, 16, 16, 11] * 2)
        gradients[tape], losses[tape] = seen.gradients, [r.loss for r in job.history]
    assert losses["replay"][0] == pytest.approx(losses["graph"][0], rel=RTOL)
    graph = gradients["graph"][0]
    assert float((gradients["replay"][0] - graph).abs().max()) < RTOL * float(graph.abs().max())
    # The second step starts from weights that differ by Adam's first step on rounded gradients.
    assert losses["replay"][1] == pytest.approx(losses["graph"][1], rel=1e-3)


def test_training_long_examples_among_traffic_is_the_quiet_graph_run() -> None:
    """The tape is "auto": with traffic what is longer than a step's train rows is spread over steps, and packed too."""
    losses, widest, kinds = {}, {}, set()
    for limit in (1024, 20):
        with checked(make_engine(max_train_rows=limit, train_window=9, backward_units_while_serving=2)) as engine:
            config = TrainingConfig(batch_size=2, max_steps=8, learning_rate=3e-3)
            job = start(engine, "job", ALL, config, random_examples(5, 8, 70, 2))
            other = start(engine, "other", MIXED, config, random_examples(5, 8, 70, 3)) if limit == 20 else None
            traffic, rows = Traffic(engine, seed=4), []
            for count in range(5000):
                if limit == 20:
                    traffic(count)
                if not engine.has_work:
                    break
                report = engine.step()
                kinds.add(type(engine.trainer.tape))
                rows.append((report.train_rows, bool(report.decode_rows or report.prefill_rows)))
            assert job.status is JobStatus.SUCCEEDED
            assert other is None or other.status is JobStatus.SUCCEEDED
            losses[limit] = [r.loss for r in job.history]
            widest[limit] = max((n for n, served in rows if served), default=0)
    assert widest[20] == 20 and ReplayTape in kinds
    # 8 optimizer steps carry rounding on; a window's lost K and V changes the first loss by percents already.
    torch.testing.assert_close(losses[20], losses[1024], rtol=1e-5, atol=0.0)


# --- what may happen in the middle ---


def in_the_middle(**config: Any) -> tuple[Engine, FinetuneJob, list[float]]:
    """An engine that has run two of the four windows of a job's first example, and the quiet run's losses."""
    examples = random_examples(2, 60, 60, 9)
    quiet = make_engine(tape="graph")
    reference = start(quiet, "job", ALL, LONG, examples)
    run(quiet)
    engine = make_engine(tape="replay", train_window=16, max_train_rows=16, **config)
    job = start(engine, "job", ALL, LONG, examples)
    for _ in range(2):
        assert engine.step().train_rows == 16
    assert engine.trainer.tape is not None and sum(i.num_rows for i in engine.trainer.forward_left) == 27
    return engine, job, [r.loss for r in reference.history]


def test_a_cancelled_jobs_tape_is_gone_before_the_next_step() -> None:
    engine, job, _ = in_the_middle()
    engine.jobs.set_status(job, JobStatus.CANCELLED)
    assert engine.trainer.tape is None and not engine.has_work and not engine.arena.slots
    engine.check_integrity()
    again = start(engine, "job", ALL, LONG, random_examples(2, 60, 60, 9))
    run(engine)
    assert again.status is JobStatus.SUCCEEDED


def test_a_tape_shared_with_a_cancelled_job_goes_on_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = random_examples(4, 9, 33, 5)
    alone = make_engine(tape="graph", adapter_memory=16 * MIB)
    (_, (other, seen, _)) = two_jobs(alone, (ALL, MIXED), examples)
    run(alone)
    engine = make_engine(tape="replay", train_window=7, adapter_memory=16 * MIB)
    cut_forwards(engine, monkeypatch, (13,))
    ((job, _, _), (shared, shared_seen, _)) = two_jobs(engine, (ALL, MIXED), examples)
    engine.step()
    engine.jobs.set_status(job, JobStatus.CANCELLED)
    assert engine.trainer.tape is not None and {i.job_id for i in engine.trainer.tape.items} == {1, 2}
    run(engine)
    engine.check_integrity()
    assert job.status is JobStatus.CANCELLED and shared.status is JobStatus.SUCCEEDED
    assert shared.history[0].loss == pytest.approx(other.history[0].loss, rel=RTOL)
    expected = seen.gradients[0]
    assert float((shared_seen.gradients[0] - expected).abs().max()) < RTOL * float(expected.abs().max())


def test_a_paused_job_finishes_what_is_open_and_no_more() -> None:
    engine, job, losses = in_the_middle()
    engine.jobs.set_status(job, JobStatus.PAUSED)
    run(engine)
    assert job.status is JobStatus.PAUSED and len(job.history) == 1 and engine.trainer.tape is None
    engine.jobs.set_status(job, JobStatus.RUNNING)
    run(engine)
    assert [r.loss for r in job.history] == pytest.approx(losses, rel=1e-4)  # Adam's first step on rounded gradients


def test_an_image_in_the_middle_leaves_the_step_out() -> None:
    engine, job, _ = in_the_middle()
    image = job.image()
    assert image.num_draws == 0 and not image.todo and image.sums.num_labels == 0
    assert not image.grad.any() and not image.history
    run(engine)
    fresh = make_engine(tape="replay", train_window=16, max_train_rows=16)
    restored = fresh.jobs.restore(image, lambda job, record: None)
    run(fresh)
    # Same windows, same machine, same threads: bit for bit.
    assert [r.loss for r in restored.history] == [r.loss for r in job.history]


def test_a_window_that_fails_ends_its_job_and_frees_what_it_held() -> None:
    engine, job, _ = in_the_middle()
    answer = ask(engine, "tiny", range(10, 20), 12)
    forward = engine.base.hidden

    def broken(*args: Any) -> Any:
        raise RuntimeError("out of luck")

    engine.base.hidden = broken  # type: ignore[method-assign]
    engine.step()
    engine.base.hidden = forward  # type: ignore[method-assign]
    assert job.status is JobStatus.FAILED and engine.trainer.tape is None
    assert answer.is_finished and not engine.has_work
    engine.check_integrity()


# --- memory ---


def test_windows_take_less_at_the_peak_and_keep_the_same() -> None:
    """The tape is layer inputs, K and V either way; what a layer makes on its way is made for a window only."""
    peaks = {}
    for limit in (1024, 16):
        engine = make_engine(model={"layers": 4}, tape="replay", train_window=16, max_train_rows=limit)
        start(engine, "job", ALL, TrainingConfig(batch_size=1, max_steps=1), random_examples(1, 241, 241, 9))
        with LiveBytes() as memory:
            run(engine)
        peaks[limit] = memory.peak
    kept = FLOAT * 240 * 4 * (HIDDEN + 2 * KV_HEADS * HEAD_DIM)
    assert kept < peaks[16] < 0.8 * peaks[1024]


def test_lower_layers_keep_k_and_v_until_the_last_window_only() -> None:
    spec = LoraSpec(r=4, target_modules=("q_proj",), layers_to_transform=(2, 3))
    engine = make_engine(
        model={"layers": 5}, tape="replay", train_window=16, max_train_rows=32, backward_units_while_serving=1
    )
    ask(engine, "tiny", range(10, 20), 30)
    start(engine, "job", spec, LONG, random_examples(1, 60, 60, 9))
    kept = []
    for _ in range(2):
        engine.step()
        assert isinstance(engine.trainer.tape, ReplayTape)
        kept.append(sorted(engine.trainer.tape._kv))
    assert kept == [[0, 1, 2, 3, 4], [2, 3, 4]]
    run(engine)


@pytest.mark.parametrize(
    ("family", "window", "layers"),
    [(f, n, layers) for f in FAMILIES if f != "qwen3_moe" for n, layers in ((60, 4), (240, 6))]
    + [("llama", 24, 12), ("gemma2", 24, 12)],
)
def test_the_estimate_is_the_peak(family: str, window: int, layers: int) -> None:
    """Logits, units and what is kept rule the peak in turn. Every token is a label: most logits at once."""
    rows = 240
    limits = {"train_window": window, "max_train_rows": window, "adapter_memory": 16 * MIB}
    engine = make_engine(family, model={"layers": layers}, tape="replay", **limits)
    example = Example(tuple(4 + i % 50 for i in range(rows + 1)), (True,) * (rows + 1))
    with LiveBytes() as memory:
        job = start(engine, "job", ALL, TrainingConfig(batch_size=1, max_steps=2), (example,))
        run(engine)
    needs = job.estimate
    assert needs is not None
    # 16 %: families differ in what transformers' own code copies on the way.
    assert needs.gradient + needs.moments + needs.activations == pytest.approx(memory.peak, rel=0.16)


# --- bases that it cannot run ---


def changed_between_layers(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * 2, *args[1:])


def given_more(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return args, {**kwargs, "extra": torch.zeros(3, 4)}


def given_other_things(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return args, {**kwargs, "rows": args[0].shape[1]}


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (changed_between_layers, "between layers 0 and 1"),
        (given_more, r"\[3, 4\]"),
        (given_other_things, "3 in one window of rows and 2 in another"),
    ],
)
def test_a_base_that_it_cannot_run_is_refused_when_the_engine_is_made(
    hook: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.parity import training_helpers

    build = training_helpers.tiny_model

    def odd(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=hook is not changed_between_layers)
        return model

    monkeypatch.setattr(training_helpers, "tiny_model", odd)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        make_engine(tape="replay")
    assert "tape='graph'" in str(caught.value)
    # "auto" knows: an example over the step's limits, with traffic, waits and runs whole on the graph tape.
    engine = make_engine(tape="auto", max_rows=16, max_train_rows=16, train_memory=MIB)
    ask(engine, "tiny", range(10, 20), 30)
    job = start(engine, "job", ALL, TrainingConfig(batch_size=1, max_steps=1), random_examples(1, 60, 60, 9))
    rows = []
    while engine.has_work:
        rows.append(engine.step().train_rows)
        assert not isinstance(engine.trainer.tape, ReplayTape)
    assert job.status is JobStatus.SUCCEEDED and sum(rows) == max(rows) == 59


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_replayed(family: str) -> None:
    assert make_engine(family).replay_refusal is None
