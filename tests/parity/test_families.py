"""Every architecture family with tiny random weights equals plain Hugging Face, and PEFT with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
from tests.tiny import FAMILIES, REFUSED, refused_model, tiny_model

from loquetier.errors import UnsupportedModelError

__all__ = ["new_engine"]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {"phi3": "all-linear", "qwen3_moe": ATTENTION}
LIMITS = {"page_size": 4, "max_prefill_rows": 17, "max_rows": 32}


def settings_of(family: str) -> dict[str, Any]:
    return {"r": 5, "lora_alpha": 10, "target_modules": TARGETS.get(family, [*ATTENTION, "up_proj", "down_proj"])}


@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_adapter_equal_hugging_face_and_peft(family: str, new_engine: EngineFactory, tmp_path: Path) -> None:
    # The sliding windows are 8, shorter than all but the shortest prompt; layers alternate where the family does.
    model = tiny_model(family, layers=4)
    peft = peft_model(model, 1, **settings_of(family))
    engine = new_engine(model, **LIMITS)
    load_peft(engine, "lora", peft, tmp_path / "lora")
    recorder = LogitRecorder(engine)
    # The 60-token neighbour shares every step with the short ones: a RoPE or a mask that looked at the longest
    # sequence of the batch would change them.
    for seed, (length, name) in enumerate(
        [(3, BASE_NAME), (60, BASE_NAME), (1, "lora"), (21, "lora"), (12, BASE_NAME), (33, "lora")]
    ):
        ask(engine, prompt_of(length, seed), name, max_tokens=12)
    run(engine)
    assert recorder.saw(prefill=True, decode=True)
    assert any(len(plan.decode) >= 4 for plan in recorder.plans)
    results = recorder.results()
    assert len(results) == 6
    for seq, ours in results:
        theirs = reference_logits(model if seq.slot < 0 else peft, seq.tokens[:-1])
        assert max_error(ours, theirs) <= FP32_TOLERANCE, (seq.slot, seq.prompt_len)
        assert seq.tokens[seq.prompt_len :] == ours[seq.prompt_len - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_tied_output_weights(family: str, new_engine: EngineFactory) -> None:
    model = tiny_model(family, tie=True)
    engine = new_engine(model, **LIMITS)
    recorder = LogitRecorder(engine)
    ask(engine, prompt_of(25, 0))
    run(engine)
    [(seq, ours)] = recorder.results()
    assert max_error(ours, reference_logits(model, seq.tokens[:-1])) <= FP32_TOLERANCE


def test_an_adapter_beside_long_neighbours_equals_itself_alone(new_engine: EngineFactory) -> None:
    """The same request alone and in a crowd: the same logits up to rounding, and the same greedy tokens."""
    model = tiny_model("qwen3", layers=3)
    alone, crowd = new_engine(model, **LIMITS), new_engine(model, **LIMITS)
    records = [LogitRecorder(engine) for engine in (alone, crowd)]
    answers = [ask(engine, prompt_of(19, 0), max_tokens=16) for engine in (alone, crowd)]
    for seed in range(1, 9):
        ask(crowd, prompt_of(5 + 9 * seed, seed), max_tokens=3 + seed)
    for engine in (alone, crowd):
        run(engine)
    assert answers[0].tokens() == answers[1].tokens()
    (_, one), (_, other) = (record.results()[0] for record in records)
    assert max_error(one, other) <= FP32_TOLERANCE


@pytest.mark.parametrize(
    ("family", "changes", "is_plain"),
    [
        ("llama", {}, True),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("gemma2", {"final_logit_softcapping": 32.0}, False),
        ("granite", {"logits_scaling": 8.0}, False),
        ("granite", {"logits_scaling": 1.0}, True),
    ],
)
def test_what_a_head_does_beside_its_gemm_is_not_lost(
    family: str, changes: dict[str, Any], is_plain: bool, new_engine: EngineFactory
) -> None:
    """Small output weights: a softcap of 30 leaves the logits of ordinary rows as they are in bfloat16."""
    model = tiny_model(family, tie_word_embeddings=False, **changes)
    model.lm_head.weight.data.mul_(0.01)
    for dtype in (torch.float32, torch.bfloat16):
        assert (new_engine(model.to(dtype)).base._output is not None) == is_plain


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(kind: str, new_engine: EngineFactory) -> None:
    model = refused_model(kind)
    with pytest.raises(UnsupportedModelError, match=model.config.model_type):
        new_engine(model)
