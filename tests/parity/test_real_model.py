"""SmolLM2-135M-Instruct in float32: chat answers equal Hugging Face `generate`, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from tests.parity import method_helpers
from tests.parity.helpers import EngineFactory, ask, load_peft, new_engine, peft_model, run

from loquetier.base.loading import LoadedBase, load_base
from loquetier.config import MIB, TrainingConfig
from loquetier.training.data import Example, render_chat

__all__ = ["new_engine"]
pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write one sentence about the sea."}],
    [
        {"role": "system", "content": "You are a terse assistant. Answer in as few words as you can."},
        {"role": "user", "content": "List three colours, then explain in detail why the sky looks blue at noon. " * 4},
    ],
)
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def loaded() -> LoadedBase:
    return load_base("smollm2-135m", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def lora(loaded: LoadedBase) -> Any:
    """Random, and large enough to change what is said: its B is not zero."""
    return peft_model(
        loaded.model, 1, std=0.05, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]
    )


def prompts(loaded: LoadedBase) -> list[list[int]]:
    return [render_chat(loaded.tokenizer, chat, add_generation_prompt=True) for chat in CHATS]


@torch.no_grad()
def generate(model: Any, prompt: list[int]) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_greedy_chat_answers_equal_hugging_face(
    loaded: LoadedBase, lora: Any, new_engine: EngineFactory, tmp_path: Path
) -> None:
    oracles = {"tiny": loaded.model, "lora": lora}
    wanted = [(name, prompt) for prompt in prompts(loaded) for name in oracles]
    expected = [generate(oracles[name], prompt) for name, prompt in wanted]
    # 48 rows of prefill per step: the third chat takes three chunks, beside the others' decode rows.
    engine = new_engine(
        loaded.model,
        tokenizer=loaded.tokenizer,
        eos_token_ids=loaded.eos_token_ids,
        kv_memory=64 * MIB,
        adapter_memory=32 * MIB,
        max_prefill_rows=48,
        max_context=512,
        max_sequences=16,
    )
    load_peft(engine, "lora", lora, tmp_path / "lora")
    answers = [ask(engine, prompt, name, max_tokens=NEW_TOKENS) for name, prompt in wanted]
    noise = ask(engine, prompts(loaded)[0], "lora", max_tokens=8, temperature=1.0, seed=1)
    run(engine)
    for (name, _), answer, tokens in zip(wanted, answers, expected, strict=True):
        assert answer.tokens() == tokens, (name, answer.text(), loaded.tokenizer.decode(tokens))
        assert answer.text() == loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    assert expected[0] != expected[1], "the adapter must matter"
    assert "Paris" in answers[0].text()
    assert len(noise.tokens()) == 8


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_one_training_step_of_another_method_equals_peft(
    method: str, loaded: LoadedBase, new_engine: EngineFactory, tmp_path: Path
) -> None:
    """Loss and gradients, with the adapter serving beside; every linear of DoRA on the first and last layers."""
    configs = {
        "dora": LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            target_modules=["q_proj", "down_proj"],
            layers_to_transform=[0, 29],
            use_dora=True,
        ),
        "ia3": IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    }
    twin = method_helpers.peft_adapter(loaded.model, configs[method], 3)
    engine = new_engine(loaded.model, kv_memory=64 * MIB, adapter_memory=32 * MIB, max_context=512)
    spec = method_helpers.load(engine, "from", twin, tmp_path / "from")
    data = (Example(tuple(prompts(loaded)[0]), (False,) * 8 + (True,) * (len(prompts(loaded)[0]) - 8)),)
    job = method_helpers.continue_from(engine, "job", spec, TrainingConfig(batch_size=1, max_steps=1), data, "from")
    ask(engine, prompts(loaded)[1], "from", max_tokens=2)
    slot = engine.registry.resolve("from").slot
    (flat,) = method_helpers.first_gradients(engine, [job])
    theirs = method_helpers.gradients(twin, data)
    # 30 layers of float32 rounding; a wrong scale or row gives 1e-1.
    assert method_helpers.relative_norm(method_helpers.slot_tensors(engine, slot, flat), theirs) < 1e-3
    run(engine)
