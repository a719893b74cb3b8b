"""Sizes, padding and tables of captured decode steps, with a stand-in that runs the Python code at each replay.

What this cannot show is a capture on a GPU: nothing here ran on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.test_generation import VOCAB, load_random, prompt
from tests.parity.helpers import FP32_TOLERANCE, Answer, EngineFactory, ask, new_engine, run
from tests.tiny import tiny_model
from torch import Tensor

from loquetier.config import MIB, EngineConfig, Hardware, resolve
from loquetier.engine.decode_graphs import ROW_BUCKETS, Captured, DecodeGraphs, Size, size_for
from loquetier.engine.engine import Engine
from loquetier.errors import ConfigError

__all__ = ["new_engine"]


class Rerun:
    """Stands for a CUDA graph: a replay calls the code again. Counts both."""

    reruns = True

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, call: Callable[[], Tensor]) -> Captured:
        self.captures += 1
        out = call().clone()

        def replay() -> None:
            self.replays += 1
            out.copy_(call())

        return Captured(replay, out)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab=VOCAB)


def with_graphs(engine: Engine, capture: Any = None, *, lora_is_fixed: bool = True) -> Any:
    capture = capture or Rerun()
    plans = engine._smlm_plans
    engine.decode_graphs = DecodeGraphs(engine.base, engine.cache, plans, capture, lora_is_fixed=lora_is_fixed)
    return capture


def requests(engine: Engine, count: int, names: tuple[str, ...], **params: Any) -> list[Answer]:
    return [
        ask(engine, prompt(3 + 4 * i, i), names[i % len(names)], max_tokens=6 + i, logprobs=0, **params)
        for i in range(count)
    ]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("count", "names"), [(1, ("base",)), (3, ("base",)), (5, ("base", "a", "b")), (4, ("a",))])
def test_replayed_steps_give_the_same_tokens(
    model: Any, new_engine: EngineFactory, count: int, names: tuple[str, ...], is_async: bool
) -> None:
    found = []
    for graphs in (False, True):
        engine = new_engine(model, page_size=4, async_scheduling=is_async)
        load_random(engine, "a", seed=1)
        load_random(engine, "b", seed=2, r=8, target_modules=("q_proj", "down_proj"))
        capture = with_graphs(engine) if graphs else None
        named = tuple(engine.base.name if n == "base" else n for n in names)
        found.append(requests(engine, count, named))
        run(engine)
        assert capture is None or capture.replays >= 5 + count - 1
        # Padding rows write to the trash page, and only there: nothing of them is in a sequence's pages.
        assert torch.isfinite(engine.cache.keys[0][0]).all()
    for one, other in zip(*found, strict=True):
        assert other.tokens() == one.tokens()
        pairs = zip(one.of(), other.of(), strict=True)
        assert all(f.logprob == pytest.approx(e.logprob, abs=FP32_TOLERANCE) for e, f in pairs)


def test_each_size_is_captured_once_and_its_tables_stay_where_they_are(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model, page_size=4)
    load_random(engine, "a", seed=1)
    capture = with_graphs(engine)
    requests(engine, 4, ("a", engine.base.name))
    run(engine)
    graphs = engine.decode_graphs
    assert graphs is not None
    made, places = capture.captures, {s: g.tables.ids_N.data_ptr() for s, g in graphs._graphs.items()}
    # 4 rows with adapters, and as rows end: 3 (the same), 2, 1. The last to end is a base row.
    assert set(places) == {Size(4, 32, True), Size(2, 32, True), Size(1, 32, False)} and graphs.captures == made == 3
    requests(engine, 4, ("a", engine.base.name))
    run(engine)
    assert capture.captures == made
    assert {s: g.tables.ids_N.data_ptr() for s, g in graphs._graphs.items()} == places


def test_rows_beyond_a_step_are_padding(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model, page_size=2)
    with_graphs(engine)
    requests(engine, 3, (engine.base.name,), ignore_eos=True)
    run(engine)
    assert engine.decode_graphs is not None
    tables = engine.decode_graphs._graphs[Size(4, 32, False)].tables
    for part in (tables.ids_N, tables.positions_N, tables.cache_rows_N, tables.pages_NB):
        assert part[3:].eq(0).all(), "nothing of an earlier step of four rows is left"
    assert tables.positions_N[:3].gt(0).all() and tables.pages_NB[:3, 0].gt(0).all()


@pytest.mark.parametrize(
    ("rows", "pages", "expected"),
    [
        (1, 1, (1, 32)),
        (2, 32, (2, 32)),
        (3, 33, (4, 128)),
        (16, 129, (16, 512)),
        (17, 1, (32, 32)),
        (256, 1, (256, 32)),
    ],
)
def test_the_next_larger_size(rows: int, pages: int, expected: tuple[int, int]) -> None:
    assert size_for(rows, pages, False) == Size(*expected, False)
    assert size_for(ROW_BUCKETS[-1] + 1, pages, True) is None


def test_mixed_steps_and_other_methods_run_as_ever(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model, max_prefill_rows=4)
    load_random(engine, "a", seed=1)
    capture = with_graphs(engine, lora_is_fixed=False)
    first = ask(engine, prompt(5, 1), "a", max_tokens=5)
    run(engine)
    assert capture.captures == 0, "without tables on the device a step with adapters is not captured"
    plain = ask(engine, prompt(3, 1), max_tokens=12)
    engine.step()
    engine.step()
    before = capture.replays
    late = ask(engine, prompt(12, 2), max_tokens=2)  # three chunks: three steps that are not decode rows alone
    for _ in range(3):
        engine.step()
    assert capture.replays == before
    run(engine)
    assert len(first.tokens()) == 5 and len(plain.tokens()) == 12 and len(late.tokens()) == 2


def test_an_adapter_on_other_modules_is_captured_for(model: Any, new_engine: EngineFactory) -> None:
    engine = new_engine(model)
    load_random(engine, "a", seed=1, target_modules=("q_proj",))
    load_random(engine, "b", seed=2, target_modules=("v_proj", "o_proj"))
    capture = with_graphs(engine)
    for name, captures in (("a", 1), ("b", 2), ("a", 2), ("b", 2)):
        ask(engine, prompt(5, 1), name, max_tokens=4)
        run(engine)
        assert capture.captures == captures, "the second graph holds the modules of both"


def test_a_base_that_cannot_be_captured_is_served_without(
    model: Any, new_engine: EngineFactory, caplog: pytest.LogCaptureFixture
) -> None:
    class Refuses:
        reruns = False

        def __call__(self, call: Callable[[], Tensor]) -> Captured:
            raise RuntimeError("operation not permitted when stream is capturing")

    engine = new_engine(model)
    with_graphs(engine, Refuses())
    answer = ask(engine, prompt(5, 1), max_tokens=4)
    run(engine)
    assert len(answer.tokens()) == 4
    assert engine.decode_graphs is not None and "not permitted" in (engine.decode_graphs.refusal or "")
    assert "CUDA graphs are off" in caplog.text


def test_graphs_need_a_gpu() -> None:
    gpu = Hardware(has_cuda=True, cpu_bf16_fast=False, free_memory=64 * MIB)
    cpu = Hardware(has_cuda=False, cpu_bf16_fast=False, free_memory=64 * MIB)
    assert resolve(EngineConfig(), gpu).cuda_graphs is True and resolve(EngineConfig(), cpu).cuda_graphs is False
    assert resolve(EngineConfig(cuda_graphs=False), gpu).cuda_graphs is False
    with pytest.raises(ConfigError, match="cuda_graphs=True"):
        resolve(EngineConfig(cuda_graphs=True), cpu)
