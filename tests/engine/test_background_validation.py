"""Data read on a thread of its own: the handle is there at once, requests are answered, and errors fail the job."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.engine.test_checkpoint import CONFIG, DATA, GREEDY, broken_off, curve, exported, start, unbroken
from tests.tiny import save_tiny

from loquetier import Runtime
from loquetier.adapters.spec import LoraSpec
from loquetier.errors import ConfigError, DataError, EngineStoppedError, JobStateError, OutOfAdapterMemoryError
from loquetier.finetuning import JobEvent
from loquetier.training.job import JobStatus

VALIDATING = JobStatus.VALIDATING_FILES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "base"
    save_tiny(directory, "llama")
    return directory


@pytest.fixture
def runtime(base: Path) -> Iterator[Runtime]:
    with Runtime(str(base), config=CONFIG) as runtime:
        yield runtime
        runtime.check_integrity()


class Slow(Sequence[Any]):
    """Records that are not there before they are let through."""

    def __init__(self, records: Sequence[Any] = DATA) -> None:
        self._records, self.may_go = records, threading.Event()

    def __len__(self) -> int:
        assert self.may_go.wait(60)
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        assert self.may_go.wait(60)
        return self._records[index]


def test_it_ends_as_if_the_data_had_been_read_before(runtime: Runtime, base: Path, tmp_path: Path) -> None:
    weights, expected = unbroken(base, tmp_path)
    data, seen = Slow(), []

    def watch(event: JobEvent) -> None:
        if event.kind == "status":
            seen.append(event.status.value)

    handle = start(
        runtime, tmp_path / "c", data=data, callbacks=[watch], output_dir=tmp_path / "o", validate_in_background=True
    )
    assert handle.status is VALIDATING and handle.total_steps == 0 and handle.estimate is None
    runtime.generate("hello", None, GREEDY)  # the engine is free meanwhile
    with pytest.raises(ConfigError, match="already training 'fox'"):
        start(runtime)
    data.may_go.set()
    assert curve(handle.wait(60)) == expected
    assert exported(runtime, tmp_path / "out") == weights
    assert handle._pump.join(60) and seen == ["validating_files", "queued", "running", "succeeded"]
    events = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events[:4]] == ["status", "begin", "status", "status"]
    assert handle.total_steps == 10 and handle.estimate is not None


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": [DATA[0], {"wrong": 1}]}, DataError, "Example 2"),
        ({"data": "/no/such/file.jsonl"}, DataError, "no/such/file"),
        ({"data": [{"input_ids": [1, 10**6], "labels": [1, 10**6]}]}, DataError, "1000000"),
        ({"lora": LoraSpec(r=4096)}, OutOfAdapterMemoryError, "adapter_memory"),
    ],
)
def test_what_is_wrong_fails_the_job(
    runtime: Runtime, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    handle = start(runtime, tmp_path / "c", validate_in_background=True, **settings)
    with pytest.raises(error, match=message):
        handle.wait(60)
    assert handle.status is JobStatus.FAILED
    assert handle.error is not None
    start(runtime, tmp_path / "c").wait(60)  # name and directory are free again


def test_what_needs_no_data_is_still_told_at_once(runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match="base"):
        start(runtime, name=runtime.base_name, validate_in_background=True)
    assert runtime.adapters() == []


def test_paused_resumed_and_cancelled_while_validating(runtime: Runtime, tmp_path: Path) -> None:
    data = Slow()
    handle = start(runtime, data=data, validate_in_background=True)
    handle.pause()
    assert handle.status is JobStatus.PAUSED
    handle.resume()
    assert handle.status is VALIDATING
    handle.pause()
    data.may_go.set()
    while not handle.total_steps:
        pass
    assert handle.status is JobStatus.PAUSED and not handle.history
    handle.resume()
    assert len(handle.wait(60)) == 10

    data = Slow()
    handle = start(runtime, tmp_path / "c", name="dog", data=data, validate_in_background=True)
    handle.cancel()
    assert handle.wait(60) == () and handle.status is JobStatus.CANCELLED
    with pytest.raises(JobStateError, match="cancelled"):
        handle.resume()
    data.may_go.set()
    start(runtime, name="dog").wait(60)


def test_closing_saves_a_job_whose_data_was_read_on_the_thread(base: Path, tmp_path: Path) -> None:
    weights, expected = unbroken(base, tmp_path)
    first = broken_off(base, tmp_path / "c", after=4, checkpoint_every=100, validate_in_background=True)
    assert len(first.history) < 10, "the runtime was closed too late for this test to test anything"
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, tmp_path / "c", checkpoint_every=100, validate_in_background=True, resume=True)
        assert curve(handle.wait(60)) == expected
        assert handle.resumed is not None and handle.resumed.step >= 4
        assert exported(runtime, tmp_path / "out") == weights


def test_closing_while_validating(base: Path) -> None:
    runtime, data = Runtime(str(base), config=CONFIG), Slow()
    handle = start(runtime, data=data, validate_in_background=True)
    runtime.close()
    data.may_go.set()
    with pytest.raises(EngineStoppedError):
        handle.wait(60)
