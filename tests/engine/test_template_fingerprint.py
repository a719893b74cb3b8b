"""The template that an adapter was trained under goes where its weights go, and a difference is told."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from safetensors import safe_open
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

from loquetier import EngineConfig, LoraSpec, Runtime, TrainingConfig
from loquetier.adapters.peft_write import TEMPLATE_METADATA
from loquetier.training.chat import template_fingerprint
from loquetier.virtual import VirtualModel

CONFIG = EngineConfig(dtype="float32", kv_memory=1 << 20, adapter_memory=4 << 20)
DATA = [{"prompt": "a then ", "completion": "b!"}] * 4
TRAINING = TrainingConfig(batch_size=2, max_steps=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template") / "base"
    save_tiny(directory, "llama")
    return directory


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same weights, another chat template."""
    save_tiny(tmp_path / "other", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant:", "answer:")
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def note(directory: Path) -> str | None:
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        found: str | None = file.metadata().get(TEMPLATE_METADATA)
        return found


def test_it_is_in_versions_exports_and_checkpoints_and_peft_ignores_it(base: Path, tmp_path: Path) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        expected = template_fingerprint(runtime.tokenizer)
        job = runtime.finetune("fox", DATA, lora=LoraSpec(r=2), training=TRAINING, checkpoint_dir=tmp_path / "c")
        job.wait(60)
        info = runtime.adapter("fox")
        assert (info.template_fingerprint, info.template_differs) == (expected, False)
        runtime.export_adapter("fox", tmp_path / "out")
        assert note(tmp_path / "out") == note(tmp_path / "c" / "step-000002") == expected
        assert runtime.load_adapter("again", tmp_path / "out").template_fingerprint == expected
        image = VirtualModel(runtime, "again").detach()
        assert image.template_fingerprint == expected
    model = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out")
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_another_template_is_a_warning_and_not_a_refusal(
    base: Path, other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        runtime.finetune("fox", DATA, lora=LoraSpec(r=2), training=TRAINING).wait(60)
        runtime.export_adapter("fox", tmp_path / "out")
        assert not runtime.load_adapter("same", tmp_path / "out").template_differs
    assert "chat template" not in caplog.text
    with Runtime(str(other), config=CONFIG) as runtime:
        info = runtime.load_adapter("fox", tmp_path / "out")
        assert info.template_differs and info.template_fingerprint == note(tmp_path / "out")
        assert "adapter fox was trained under another chat template or tokenizer" in caplog.text
        assert runtime.adapter("fox").template_differs and runtime.generate("a then ", "fox").token_ids
        runtime.export_adapter("fox", tmp_path / "again")
    assert note(tmp_path / "again") == note(tmp_path / "out"), "what it was trained under does not change by serving it"


def test_a_resumed_job_tells_of_another_template(base: Path, other: Path, tmp_path: Path) -> None:
    """Prompt and completion do not pass the chat template: the data is the same, so the job may go on."""
    for place, count in ((base, 0), (other, 1)):
        with Runtime(str(place), config=CONFIG) as runtime:
            job = runtime.finetune("fox", DATA, training=TRAINING, checkpoint_dir=tmp_path / "c", resume=True)
            job.wait(60)
            found = job.resumed.differences if job.resumed else ()
            assert len([text for text in found if "template_fingerprint" in text]) == count
