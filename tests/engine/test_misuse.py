"""What a caller can get wrong, and what must happen: a typed error, nothing changed, everybody else goes on."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny

from loquetier import EngineConfig, LoraSpec, Runtime, SamplingParams, TrainingConfig
from loquetier.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterInUseError,
    ConfigError,
    DataError,
    EngineError,
    LoquetierError,
)
from loquetier.info import stats_of
from loquetier.runtime import RuntimeStats

CONFIG = EngineConfig(dtype="float32", kv_memory=4 << 20, adapter_memory=4 << 20)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
DATA = [{"prompt": f"{a} then ", "completion": f"{b}!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("misuse") / "base"
    save_tiny(directory, "llama")
    return directory


@pytest.fixture
def runtime(base: Path) -> Iterator[Runtime]:
    with Runtime(str(base), config=CONFIG) as it:
        yield it
        assert it.generate("still here", None, GREEDY).text is not None
        it.check_integrity()


MISTAKES: dict[str, Callable[[Runtime, Path], Any]] = {
    "empty model": lambda r, p: r.generate("x", ""),
    "model of another type": lambda r, p: r.generate("x", 5),  # type: ignore[arg-type]
    "empty model to evaluate": lambda r, p: r.evaluate("", DATA),
    "prompt None": lambda r, p: r.generate(None),  # type: ignore[arg-type]
    "prompt bytes": lambda r, p: r.generate(b"abc"),  # type: ignore[arg-type]
    "prompt with a lone surrogate": lambda r, p: r.generate("\ud800"),
    "prompt of mixed types": lambda r, p: r.generate([1, "a"]),  # type: ignore[list-item]
    "params as a dictionary": lambda r, p: r.generate("x", None, {}),  # type: ignore[arg-type]
    "priority of another type": lambda r, p: r.submit("x", None, GREEDY, priority="x"),  # type: ignore[arg-type]
    "training as a dictionary": lambda r, p: r.finetune("f", DATA, training={}),  # type: ignore[arg-type]
    "lora as a dictionary": lambda r, p: r.finetune("f", DATA, lora={"r": 8}),  # type: ignore[arg-type]
    "callbacks not a list": lambda r, p: r.finetune("f", DATA, callbacks=print),  # type: ignore[arg-type]
    "data of another type": lambda r, p: r.finetune("f", 5),  # type: ignore[arg-type]
    "eval_every without data": lambda r, p: r.finetune("f", DATA, training=TrainingConfig(eval_every=2)),
    "directory None": lambda r, p: r.load_adapter("a", None),  # type: ignore[arg-type]
    "adapter name of another type": lambda r, p: r.load_adapter(5, p),  # type: ignore[arg-type]
    "unload of another type": lambda r, p: r.unload_adapter(5),  # type: ignore[arg-type]
    "export over a file's child": lambda r, p: r.export_adapter("nobody", p / "x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_typed_error_and_changes_nothing(runtime: Runtime, tmp_path: Path, mistake: str) -> None:
    before = runtime.stats()
    with pytest.raises(LoquetierError):
        MISTAKES[mistake](runtime, tmp_path)
    after = runtime.stats()
    assert (after.num_waiting, after.num_running) == (0, 0)
    assert (after.kv_pages_free, after.arena_bytes_free) == (before.kv_pages_free, before.arena_bytes_free)
    assert runtime.adapters() == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: SamplingParams(temperature="a"),  # type: ignore[arg-type]
        lambda: SamplingParams(logit_bias=[1]),  # type: ignore[arg-type]
        lambda: SamplingParams(stop_token_ids=5),  # type: ignore[arg-type]
        lambda: SamplingParams(ignore_eos="no"),  # type: ignore[arg-type]
        lambda: SamplingParams(stop="text"),  # type: ignore[arg-type]
        lambda: TrainingConfig(learning_rate="x"),  # type: ignore[arg-type]
        lambda: TrainingConfig(shuffle="no"),  # type: ignore[arg-type]
        lambda: TrainingConfig(publish_every=5),
        lambda: EngineConfig(step_time_budget="1"),  # type: ignore[arg-type]
        lambda: EngineConfig(device="tpu"),
    ],
)
def test_settings_of_the_wrong_type_or_without_effect_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_a_bug_in_one_request_ends_what_shared_its_step_and_nothing_else(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loquetier.engine.serving as serving

    def broken(*_: object) -> None:
        raise ValueError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(serving, "advance", broken)
        with pytest.raises(EngineError, match="ValueError: a bug"):
            runtime.generate("x", None, GREEDY)
    assert len(runtime.generate("x", None, GREEDY).token_ids) == 6


def test_result_after_a_failure_raises_again_instead_of_waiting_for_ever(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loquetier.engine.serving as serving

    with monkeypatch.context() as patch:
        patch.setattr(serving, "advance", lambda *_: 1 / 0)
        handle = runtime.submit("x", None, GREEDY)
        for _ in range(2):
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                handle.result()


def test_a_name_in_training_can_be_neither_unloaded_nor_loaded_over(runtime: Runtime, tmp_path: Path) -> None:
    runtime.finetune("other", DATA, training=TrainingConfig(max_steps=2)).wait(60)
    runtime.export_adapter("other", tmp_path / "other")
    job = runtime.finetune("busy", DATA, training=TrainingConfig(max_steps=10_000))
    with pytest.raises(AdapterInUseError, match="busy"):
        runtime.unload_adapter("busy")
    with pytest.raises((AdapterExistsError, AdapterInUseError), match="busy"):
        runtime.load_adapter("busy", tmp_path / "other")
    job.cancel()


def test_a_dropped_handle_and_a_stream_never_read_do_not_go_on(runtime: Runtime) -> None:
    handle = runtime.submit("x", None, LONG)
    stream = runtime.stream("y", None, LONG)
    del handle, stream
    gc.collect()
    assert runtime.stats().num_running == 0


def test_leaving_an_async_stream_early_frees_its_pages(runtime: Runtime) -> None:
    """The engine's thread is held while the client leaves, and the client's event loop stays open: neither the answer's
    own end nor the closed loop may be what ends the request."""
    held = threading.Event()

    async def scenario() -> RuntimeStats:
        answer = runtime.astream("x", None, LONG)
        async for _ in answer:
            runtime._loop.submit(held.wait)
            break
        await answer.aclose()  # type: ignore[attr-defined]
        # Queued behind the abort, before any further step.
        after = runtime._loop.submit(lambda: stats_of(runtime._engine))
        held.set()
        return after.result()

    stats = asyncio.run(scenario())
    assert stats.num_running == 0 and stats.kv_pages_free == stats.kv_pages


def test_a_job_whose_moments_find_no_memory_gives_its_slot_back(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 1 bytes")

    free = runtime.stats().arena_bytes_free
    with monkeypatch.context() as patch:
        patch.setattr("loquetier.engine.entry.AdapterOptimizer", no_memory)
        with pytest.raises(RuntimeError, match="not enough memory"):
            runtime.finetune("f", DATA)
    assert runtime.stats().arena_bytes_free == free


def test_penalties_reach_the_sampler_through_the_engine(runtime: Runtime) -> None:
    """Logits of a random tiny model repeat themselves; a penalty on what was generated must break that."""
    plain = runtime.generate("x", None, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)).token_ids
    assert len(set(plain)) < len(plain), "the test needs a model that repeats itself"
    heavy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(runtime.generate("x", None, heavy).token_ids)) > len(set(plain))


def test_a_stop_string_before_min_tokens_does_not_count(runtime: Runtime) -> None:
    text = runtime.generate("x", None, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)).text
    stop = (text[1],)
    early = runtime.generate("x", None, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop))
    assert early.text == text[:1] and early.answers[0].stop_reason == stop[0]
    late = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop, min_tokens=6)
    assert len(runtime.generate("x", None, late).token_ids) > 6


def test_writing_where_one_cannot_is_a_typed_error(runtime: Runtime, tmp_path: Path) -> None:
    runtime.finetune("f", DATA, lora=LoraSpec(r=2), training=TrainingConfig(max_steps=1)).wait(60)
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError):
        runtime.export_adapter("f", tmp_path / "file" / "below")
    with pytest.raises(DataError):
        runtime.evaluate("f", [])
