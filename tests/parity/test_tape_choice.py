"""The engine picks the tape by memory: its estimate is what a forward keeps, and its choice is what runs."""

from __future__ import annotations

from typing import Any

import pytest
from tests.parity.test_activation_bytes import NUM_TRAIN, kept_by_training_forward
from tests.parity.training_helpers import MIB, make_engine, random_examples, run, start
from tests.tiny import FAMILIES

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.engine.trainer import Trainer
from loquetier.training.replay import ReplayTape
from loquetier.training.tape import GraphTape


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3_moe"])
def test_the_estimate_is_what_a_layer_keeps(family: str) -> None:
    """Two layers more: what a forward keeps once (cos and sin, the last norm) is not part of the estimate."""
    measured = [kept_by_training_forward(family, 0, layers=layers).num_bytes / NUM_TRAIN for layers in (2, 4)]
    bases = [make_engine(family, model={"layers": layers}).base for layers in (2, 4)]
    estimated = [base.graph_row_bytes for base in bases]
    # 15 %: families differ in which inputs transformers' own code shares or copies.
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.15)


def test_routed_experts_are_not_forgotten() -> None:
    """A rough bound only: what transformers' experts keep is their affair, but it must count."""
    measured = [kept_by_training_forward("qwen3_moe", 0, layers=layers).num_bytes / NUM_TRAIN for layers in (2, 4)]
    estimated = [make_engine("qwen3_moe", model={"layers": layers}).base.graph_row_bytes for layers in (2, 4)]
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.4)


@pytest.mark.parametrize("room_for_rows", [99, 100])
def test_rows_beyond_train_memory_go_on_the_replay_tape(room_for_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"layers": 60}
    examples = random_examples(1, 101, 101, 1)  # 100 rows
    config = TrainingConfig(batch_size=1, max_steps=1)
    alone = make_engine(model=model, adapter_memory=16 * MIB)
    start(alone, "job", LoraSpec(r=2), config, examples)
    memory = alone.admission.graph_bytes(room_for_rows)
    run(alone)
    assert memory >= MIB
    engine = make_engine(model={"layers": 60}, train_memory=memory, train_window=40, adapter_memory=16 * MIB)
    opened = Trainer.open_tape
    tapes = []

    def spied(*args: Any) -> GraphTape | ReplayTape | None:
        tapes.append(opened(*args))
        return tapes[-1]

    monkeypatch.setattr(Trainer, "open_tape", spied)
    start(engine, "job", LoraSpec(r=2), config, examples)
    report = engine.step()
    assert report.train_rows == 100
    assert [type(t) for t in tapes] == [GraphTape if room_for_rows == 100 else ReplayTape]
    # With no traffic all units run: a layer each, or a layer and window.
    assert report.backward_units == (60 if room_for_rows == 100 else 180)
    run(engine)
