"""Older versions of an adapter: kept, asked for by number, made live again, given up when memory is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import save_tiny

from loquetier import EngineConfig, LoraSpec, Runtime, SamplingParams, TrainingConfig
from loquetier.errors import AdapterNotFoundError, ConfigError

SPEC = LoraSpec(r=4, alpha=8)
TRAINING = TrainingConfig(batch_size=4, max_steps=6, learning_rate=3e-2)
DATA = [{"prompt": f"{a} then ", "completion": f"{b}!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rollback") / "base"
    save_tiny(directory, "llama")
    return directory


def config(keep: int, memory: int = 4 << 20) -> EngineConfig:
    return EngineConfig(dtype="float32", kv_memory=4 << 20, adapter_memory=memory, keep_versions=keep)


def test_a_version_answers_the_same_when_live_pinned_and_rolled_back(base: Path) -> None:
    with Runtime(str(base), config=config(keep=3)) as runtime:
        runtime.finetune("fox", DATA, lora=SPEC, training=TRAINING).wait(60)
        assert runtime.versions("fox") == [3, 4, 5, 6]
        losses = {n: runtime.evaluate(f"fox@{n}", DATA).loss for n in (3, 4, 5, 6)}
        assert len(set(losses.values())) == 4, "versions that do not differ would prove nothing"
        pinned = runtime.generate("c then ", "fox@3", GREEDY)
        assert runtime.rollback("fox", 3).version == 3
        answer = runtime.generate("c then ", "fox", GREEDY)
        assert (answer.model, answer.token_ids) == ("fox@3", pinned.token_ids)
        assert runtime.evaluate("fox", DATA).loss == losses[3]  # the same bytes in the same slot
        assert runtime.rollback("fox", 6).version == 6 and runtime.evaluate("fox", DATA).loss == losses[6]
        with pytest.raises(AdapterNotFoundError, match="there are: 3, 4, 5, 6"):
            runtime.rollback("fox", 1)
        with pytest.raises(AdapterNotFoundError, match="nobody"):
            runtime.rollback("nobody", 1)
        runtime.check_integrity()
        runtime.unload_adapter("fox")
        stats = runtime.stats()
        assert stats.arena_bytes_free == stats.arena_bytes


def test_a_request_under_way_ends_on_the_version_it_began_with(base: Path) -> None:
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    with Runtime(str(base), config=config(keep=2)) as runtime:
        runtime.finetune("fox", DATA, lora=SPEC, training=TRAINING).wait(60)
        expected = runtime.generate("a then ", "fox@6", long).token_ids
        request = runtime.submit("a then ", "fox", long)
        runtime.rollback("fox", 4)
        answer = request.result()
        assert (answer.model, answer.token_ids) == ("fox@6", expected)
        runtime.check_integrity()


def test_kept_versions_make_room_for_what_is_asked_for(base: Path) -> None:
    with Runtime(str(base), config=config(keep=0)) as runtime:
        runtime.finetune("fox", DATA, lora=SPEC, training=TRAINING).wait(60)
        slot_bytes = runtime.adapter("fox").num_bytes
    room = max(1 << 20, 4 * slot_bytes)
    rank = max(1, room // slot_bytes * 4 // 5)  # so that five slots of this rank fill the arena
    spec = LoraSpec(r=rank, alpha=8)
    with Runtime(str(base), config=config(keep=100, memory=room)) as runtime:
        runtime.finetune("fox", DATA, lora=spec, training=TRAINING).wait(60)
        kept = runtime.versions("fox")
        assert kept[-1] == 6 and len(kept) < 6, "memory was meant to be short"
        runtime.check_integrity()
        runtime.finetune("dog", DATA, lora=spec, training=TRAINING, start_from=f"fox@{kept[0]}").wait(60)
        assert runtime.versions("fox")[-1] == 6 and len(runtime.versions("fox")) < len(kept)
        assert runtime.versions("dog")[-1] == 6
        runtime.check_integrity()


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="keep_versions=-1"):
        EngineConfig(keep_versions=-1)
