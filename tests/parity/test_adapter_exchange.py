"""PEFT to engine, engine to PEFT, and trained adapters out to PEFT: the same logits, and scaling applied once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.parity.helpers import (
    FP32_TOLERANCE,
    EngineFactory,
    LogitRecorder,
    ask,
    load_peft,
    max_error,
    new_engine,
    peft_model,
    prompt_of,
    reference_logits,
    run,
)
from tests.tiny import tiny_model
from torch import Tensor

from loquetier.adapters.peft_io import read_adapter, write_adapter
from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.config import TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.training.data import Example

__all__ = ["new_engine"]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj", "lm_head"],
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 31},
    },
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def served_logits(engine: Engine, name: str, prompt: list[int]) -> Tensor:
    recorder = LogitRecorder(engine)
    ask(engine, prompt, name, max_tokens=1)
    run(engine)
    return recorder.results()[-1][1]


def export(engine: Engine, name: str, directory: Path) -> None:
    version, modules, factors = engine.adapters.factors(name)
    write_adapter(directory, spec=version.spec, modules=modules, factors=factors, base_name=None)


def stock_peft(model: Any, directory: Path) -> Any:
    return PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()


@pytest.mark.parametrize("case", CASES)
def test_import_serve_export_reload(case: str, model: Any, new_engine: EngineFactory, tmp_path: Path) -> None:
    peft, prompt = peft_model(model, 3, **CASES[case]), prompt_of(30, 1)
    engine = new_engine(model)
    load_peft(engine, "lora", peft, tmp_path / "in")
    expected = reference_logits(peft, prompt)
    assert max_error(served_logits(engine, "lora", prompt), expected) <= FP32_TOLERANCE
    assert max_error(expected, reference_logits(model, prompt)) > 0.1

    export(engine, "lora", tmp_path / "out")
    original, ours = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("in", "out"))
    assert original.keys() == ours.keys()
    # Bit-equal weights: nothing (a scale, a transposition, a cast) is baked in on the way through the arena.
    assert all(torch.equal(original[k], ours[k]) for k in original)
    # Bit-equal logits: the same PEFT with the same weights and, from the written config, the same scale.
    assert torch.equal(reference_logits(stock_peft(model, tmp_path / "out"), prompt), expected)


def test_scale_is_applied_once(model: Any, new_engine: EngineFactory, tmp_path: Path) -> None:
    """On lm_head alone the logits are linear in the scale, so a wrong power of it shows as that power."""
    prompt = prompt_of(12, 2)
    peft = peft_model(model, 3, r=4, lora_alpha=32, target_modules=["lm_head"])  # scale 8
    engine = new_engine(model)
    load_peft(engine, "eight", peft, tmp_path / "eight")
    peft.base_model.model.lm_head.scaling["default"] = 1.0
    delta_once = reference_logits(peft, prompt) - reference_logits(model, prompt)
    delta = served_logits(engine, "eight", prompt) - reference_logits(model, prompt)
    # Relative to deltas of about 1 times 8. Applied twice: 64; baked in and applied: 64; forgotten: 1.
    assert max_error(delta, 8 * delta_once) <= 8 * FP32_TOLERANCE
    assert delta_once.abs().max() > 0.1


def test_a_published_training_run_gives_peft_the_served_logits(
    model: Any, new_engine: EngineFactory, tmp_path: Path
) -> None:
    engine, prompt = new_engine(model), prompt_of(20, 3)
    examples = tuple(Example(tuple(prompt_of(10, i)), (True,) * 10) for i in range(4))
    spec = LoraSpec(r=4, alpha=12, use_rslora=True, target_modules=("q_proj", "down_proj", "lm_head"))
    engine.jobs.start(
        "trained", spec, TrainingConfig(batch_size=2, num_epochs=2, learning_rate=1e-2), examples, (), lambda j, r: None
    )
    run(engine)
    served = served_logits(engine, "trained", prompt)
    export(engine, "trained", tmp_path / "out")
    theirs = reference_logits(stock_peft(model, tmp_path / "out"), prompt)
    assert max_error(served, theirs) <= FP32_TOLERANCE
    assert max_error(served, reference_logits(model, prompt)) > 0.01, "training must have moved something"


def test_export_and_import_again_serves_the_same_bits(model: Any, new_engine: EngineFactory, tmp_path: Path) -> None:
    engine, prompt = new_engine(model), prompt_of(20, 4)
    load_peft(engine, "one", peft_model(model, 5, **CASES["patterns"]), tmp_path / "peft")
    export(engine, "one", tmp_path / "out")
    again = read_adapter(tmp_path / "out", engine.base.targets)
    engine.adapters.load("two", again.spec, again.modules, again.factors)
    assert again.modules == resolve_modules(engine.registry.resolve("one").spec, engine.base.targets)
    assert torch.equal(served_logits(engine, "one", prompt), served_logits(engine, "two", prompt))


def test_loading_changes_neither_the_base_nor_another_adapter(
    model: Any, new_engine: EngineFactory, tmp_path: Path
) -> None:
    engine, prompt = new_engine(model, prefix_cache=False), prompt_of(20, 4)
    load_peft(engine, "one", peft_model(model, 5, **CASES["plain"]), tmp_path / "one")
    before = [served_logits(engine, name, prompt) for name in ("tiny", "one")]
    weights = {k: v.clone() for k, v in engine.base.loaded.model.state_dict().items()}
    load_peft(engine, "two", peft_model(model, 6, **CASES["rslora"]), tmp_path / "two")
    served_logits(engine, "two", prompt)
    assert all(torch.equal(a, served_logits(engine, n, prompt)) for a, n in zip(before, ("tiny", "one"), strict=True))
    engine.adapters.unload("two")
    assert all(torch.equal(a, served_logits(engine, n, prompt)) for a, n in zip(before, ("tiny", "one"), strict=True))
    after = engine.base.loaded.model.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[k], after[k]) for k in weights)
