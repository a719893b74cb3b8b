"""Logits of steps that mix adapters, the base, prefill, decode and training equal Hugging Face + PEFT alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tests.parity.helpers import (
    BASE_NAME,
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

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.errors import LoquetierError
from loquetier.training.data import Example
from loquetier.training.job import EvalResult

__all__ = ["new_engine"]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "r4-qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "r8-all": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "r16-down": {"r": 16, "lora_alpha": 16, "target_modules": ["down_proj"]},
    "r64-all": {"r": 64, "lora_alpha": 32, "target_modules": ALL},
    "r32-rslora": {"r": 32, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "up_proj"]},
    "r12-odd": {"r": 12, "lora_alpha": 7, "target_modules": ["gate_proj", "k_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 9, r"layers\.1\.mlp\..*": 5},
        "alpha_pattern": {"down_proj": 3},
    },
    "head": {"r": 6, "lora_alpha": 12, "target_modules": ["lm_head", "o_proj"]},
    "one-layer": {"r": 5, "lora_alpha": 10, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]},
    "head-only": {"r": 7, "lora_alpha": 7, "target_modules": ["lm_head"]},
}
SMALL_STEPS = {"page_size": 4, "max_prefill_rows": 37, "max_rows": 64}
"""Prompts of up to 45 tokens share few rows: they advance by chunks, which begin and end inside pages."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", layers=3, hidden=64, head_dim=16)


@pytest.fixture(scope="module")
def pefts(model: Any) -> dict[str, Any]:
    return {name: peft_model(model, seed, **settings) for seed, (name, settings) in enumerate(ADAPTERS.items())}


def load_all(engine: Engine, pefts: dict[str, Any], directory: Path) -> None:
    for name, peft in pefts.items():
        load_peft(engine, name, peft, directory / name)


def crowd(engine: Engine) -> None:
    """Two waves, so that the second one's prefill meets the first one's decode; adapters and base interleaved."""
    names = [*ADAPTERS, BASE_NAME, "r8-all", BASE_NAME]
    for seed, name in enumerate(names):
        ask(engine, prompt_of(1 + 7 * seed % 45, seed), name, max_tokens=12 + seed % 5)
    for _ in range(8):
        engine.step()
    for seed, name in enumerate(reversed(names), 100):
        ask(engine, prompt_of(1 + 11 * seed % 45, seed), name, max_tokens=3 + seed % 4)


def compare(engine: Engine, recorder: LogitRecorder, pefts: dict[str, Any], base: Any) -> None:
    names = {v.slot: v.name for v in engine.registry.versions}
    results = recorder.results()
    assert len(results) == 26
    for seq, ours in results:
        oracle = pefts[names[seq.slot]] if seq.slot in names else base
        theirs = reference_logits(oracle, seq.tokens[:-1])
        assert max_error(ours, theirs) <= FP32_TOLERANCE, (names.get(seq.slot), seq.seq_id)
        # The sampled tokens are the greedy choice of those logits, so the sampler saw the same rows.
        assert seq.tokens[seq.prompt_len :] == ours[seq.prompt_len - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("limits", [SMALL_STEPS, {"page_size": 16}], ids=["small-steps", "large-steps"])
def test_ten_adapters_and_the_base_in_one_batch(
    model: Any, pefts: dict[str, Any], limits: dict[str, int], new_engine: EngineFactory, tmp_path: Path
) -> None:
    engine = new_engine(model, **limits)
    load_all(engine, pefts, tmp_path)
    recorder = LogitRecorder(engine)
    crowd(engine)
    run(engine)
    assert recorder.saw(prefill=True, decode=True)
    if limits is SMALL_STEPS:
        assert any(c.start > 0 and c.length > 1 for p in recorder.plans for c in p.prefill), "no chunked prompt"
        assert any(len({s.slot for s in p.decode}) >= 8 for p in recorder.plans), "no step with 8 adapters decoding"
    compare(engine, recorder, pefts, model)


def test_the_adapters_matter(model: Any, pefts: dict[str, Any]) -> None:
    """Or the tests above would pass with the base alone."""
    tokens = prompt_of(20, 1)
    base = reference_logits(model, tokens)
    for name, peft in pefts.items():
        assert max_error(reference_logits(peft, tokens), base) > 1000 * FP32_TOLERANCE, name


def test_rows_in_training_beside_them_change_nothing(
    model: Any, pefts: dict[str, Any], new_engine: EngineFactory, tmp_path: Path
) -> None:
    engine = new_engine(model, **(SMALL_STEPS | {"max_rows": 128, "backward_units_while_serving": 2}))
    load_all(engine, pefts, tmp_path)
    examples = tuple(Example(tuple(prompt_of(9 + i, 200 + i)), (True,) * (9 + i)) for i in range(6))
    config = TrainingConfig(batch_size=3, num_epochs=1000, learning_rate=1e-2)
    for name, spec in (("job-a", LoraSpec(r=8)), ("job-b", LoraSpec(r=3, target_modules=("lm_head", "q_proj")))):
        engine.jobs.start(name, spec, config, examples, (), lambda job, record: None)
    evaluations: list[EvalResult | LoquetierError] = []
    recorder = LogitRecorder(engine)
    crowd(engine)
    engine.jobs.evaluate("r64-all", examples, evaluations.append)
    for _ in range(400):
        if not engine.scheduler.has_work:
            break
        engine.step()
        engine.check_integrity()
    assert not engine.scheduler.has_work
    assert recorder.saw(train=True, prefill=True, decode=True)
    assert recorder.saw(evaluate=True, decode=True) and isinstance(evaluations[0], EvalResult)
    assert engine.jobs.publisher.count > 2, "training must really move beside the requests"
    compare(engine, recorder, pefts, model)


def test_bfloat16_is_as_close_to_float32_as_peft_in_bfloat16(
    model: Any, new_engine: EngineFactory, tmp_path: Path
) -> None:
    """Our error may be up to twice PEFT's.

    Both are maxima of the same kind of noise (bfloat16 rounds at 0.4 % after every operation) in a different order of
    additions. Both keep adapter weights in float32 on a CPU.
    """
    half = copy.deepcopy(model).bfloat16()
    names = ("r4-qv", "r8-all", "r64-all", "r32-rslora", "head")
    in_half = {n: peft_model(half, i, **ADAPTERS[n]) for i, n in enumerate(names)}
    engine = new_engine(half, **SMALL_STEPS)
    load_all(engine, in_half, tmp_path)
    recorder = LogitRecorder(engine)
    for seed, name in enumerate([*names, BASE_NAME, *names]):
        ask(engine, prompt_of(5 + 9 * seed % 40, seed), name, max_tokens=5)
    run(engine)
    slots = {v.slot: v.name for v in engine.registry.versions}
    exact = {name: copy.deepcopy(peft).float() for name, peft in in_half.items()}
    errors: dict[str, list[tuple[float, float]]] = {}
    for seq, ours in recorder.results():
        name = slots.get(seq.slot, BASE_NAME)
        tokens = seq.tokens[:-1]
        truth = reference_logits(exact[name] if seq.slot in slots else copy.deepcopy(half).float(), tokens)
        theirs = reference_logits(in_half[name] if seq.slot in slots else half, tokens)
        errors.setdefault(name, []).append((max_error(ours, truth), max_error(theirs, truth)))
    assert len(errors) == 6
    for name, pairs in errors.items():
        assert max(ours for ours, _ in pairs) <= 2 * max(theirs for _, theirs in pairs), (name, pairs)
