"""Virtual models leave a runtime and enter another one, optimizer and all, and nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny

from loquetier import EngineConfig, LoraSpec, Runtime, SamplingParams, TrainingConfig
from loquetier.errors import AdapterMismatchError, AdapterNotFoundError
from loquetier.training.job import JobStatus
from loquetier.virtual import VirtualModel, attach_adapter, detach_adapter

SPEC = LoraSpec(r=4, alpha=8)
TRAINING = TrainingConfig(batch_size=2, max_steps=12, learning_rate=1e-2, seed=3, publish="every_step")
DATA = [{"prompt": f"{a} then ", "completion": f"{b}!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "base"
    save_tiny(directory, "llama")
    return directory


def _runtime(base: Path) -> Runtime:
    return Runtime(str(base), config=EngineConfig(dtype="float32", kv_memory=4 << 20, adapter_memory=4 << 20))


@pytest.fixture
def two(base: Path) -> Iterator[tuple[Runtime, Runtime]]:
    with _runtime(base) as one, _runtime(base) as other:
        yield one, other
        one.check_integrity()
        other.check_integrity()


def _weights(runtime: Runtime, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = runtime._loop.call(
        lambda: runtime._engine.adapters.factors(name)
    )[2]
    return factors


def _equal(a: dict[str, tuple[torch.Tensor, torch.Tensor]], b: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))


def test_a_job_that_moves_midway_ends_bit_for_bit_where_it_would_have(two: tuple[Runtime, Runtime], base: Path) -> None:
    one, other = two
    with _runtime(base) as quiet:
        quiet.finetune("fox", DATA, lora=SPEC, training=TRAINING).wait(60)
        expected = _weights(quiet, "fox")
    handle = one.finetune("fox", DATA, lora=SPEC, training=TRAINING)
    while len(handle.history) < 4:
        one.stats()  # each call lets a step pass
    moved = VirtualModel(one, "fox").migrate(other)
    assert handle.status is JobStatus.DETACHED
    steps_before = len(handle.history)
    assert 4 <= steps_before < 12
    assert moved.job is not None
    history = moved.job.wait(60)
    assert [r.step for r in history] == list(range(1, 13))
    # No tolerance: the same rows in the same order through the same kernels, and every piece of state moved.
    assert _equal(_weights(other, "fox"), expected)


def test_a_job_that_moves_in_the_middle_of_an_accumulation_keeps_its_gradient(base: Path) -> None:
    """Rows are limited so that an optimizer step takes several engine steps; the move falls between two of them."""
    config = EngineConfig(dtype="float32", kv_memory=4 << 20, adapter_memory=4 << 20, max_train_rows=16)
    training = TrainingConfig(batch_size=4, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-2)
    with Runtime(str(base), config=config) as quiet:
        quiet.finetune("fox", DATA, lora=SPEC, training=training).wait(60)
        expected = _weights(quiet, "fox")
    with Runtime(str(base), config=config) as one, Runtime(str(base), config=config) as other:
        handle = one.finetune("fox", DATA, lora=SPEC, training=training)
        image = detach_adapter(one, "fox")
        while image.job is not None and not (image.job.todo and bool(image.job.grad.any())):
            handle_again = attach_adapter(one, image).job  # not in the middle of a step: let it go on for a moment
            assert handle_again is not None and not handle_again.status.is_final, "never caught in the middle"
            one.stats()
            image = detach_adapter(one, "fox")
        assert image.job is not None and handle.status is JobStatus.DETACHED
        moved = attach_adapter(other, image)
        assert moved.job is not None
        moved.job.wait(60)
        assert _equal(_weights(other, "fox"), expected)


def test_other_adapters_answer_the_same_before_and_after(two: tuple[Runtime, Runtime]) -> None:
    one, other = two
    one.finetune("stays", DATA, lora=SPEC, training=TRAINING).wait(60)
    one.finetune("moves", DATA[:4], lora=LoraSpec(r=2), training=TRAINING).wait(60)
    before = {m: one.generate("c then ", m, GREEDY).token_ids for m in ("stays", "moves", one.base_name)}
    VirtualModel(one, "moves").migrate(other)
    assert one.generate("c then ", "stays", GREEDY).token_ids == before["stays"]
    assert one.generate("c then ", None, GREEDY).token_ids == before[one.base_name]
    assert other.generate("c then ", "moves", GREEDY).token_ids == before["moves"]
    with pytest.raises(AdapterNotFoundError, match="moves"):
        one.generate("c then ", "moves", GREEDY)


def test_a_paused_job_stays_paused_after_the_move(two: tuple[Runtime, Runtime]) -> None:
    one, other = two
    handle = one.finetune("slow", DATA, lora=SPEC, training=TRAINING)
    handle.pause()
    moved = VirtualModel(one, "slow").migrate(other)
    assert moved.job is not None and moved.job.status is JobStatus.PAUSED
    moved.job.resume()
    assert len(moved.job.wait(60)) == 12


def test_a_request_under_way_ends_on_the_adapter_that_is_leaving(two: tuple[Runtime, Runtime]) -> None:
    one, _ = two
    one.finetune("leaver", DATA, lora=SPEC, training=TRAINING).wait(60)
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    expected = one.generate("a then ", "leaver", long).token_ids
    request = one.submit("a then ", "leaver", long)
    image = detach_adapter(one, "leaver")
    assert request.result().token_ids == expected
    assert one.stats().arena_bytes_free == one.stats().arena_bytes
    assert image.factors is not None and image.job is None


def test_another_base_refuses_the_image_and_the_adapter_goes_back(base: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    save_tiny(stranger, "llama", seed=7)
    with _runtime(base) as one, _runtime(stranger) as other:
        one.finetune("home", DATA, lora=SPEC, training=TRAINING).wait(60)
        answer = one.generate("c then ", "home", GREEDY).token_ids
        with pytest.raises(AdapterMismatchError, match="another base"):
            VirtualModel(one, "home").migrate(other)
        assert one.generate("c then ", "home", GREEDY).token_ids == answer
        assert other.adapters() == []
        image = detach_adapter(one, "home")
        with pytest.raises(AdapterMismatchError):
            attach_adapter(other, image)
        other.check_integrity()


def test_detaching_an_unknown_name_is_an_error(base: Path) -> None:
    with _runtime(base) as one, pytest.raises(AdapterNotFoundError, match="nobody"):
        detach_adapter(one, "nobody")
