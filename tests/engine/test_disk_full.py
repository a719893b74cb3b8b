"""A full disk holds a job and loses nothing: it goes on by itself, and ends with the bytes of an unbroken run."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine.test_checkpoint import CONFIG, SPEC, TRAINING, curve, exported, names, start, unbroken
from tests.tiny import save_tiny

from loquetier import Runtime
from loquetier.adapters.durable import append_durably
from loquetier.errors import InsufficientStorageError
from loquetier.finetuning import FinetuneHandle, JobEvent
from loquetier.storage import StorageWait
from loquetier.training.job import JobStatus

PAUSED = JobStatus.PAUSED


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


@dataclass
class Disk:
    """A disk that is full when it is told to be."""

    is_full: bool = False
    tries: int = 0

    def write(self, place: str) -> None:
        if self.is_full and place == "checkpoint.after_optimizer":
            self.tries += 1
            raise OSError(errno.ENOSPC, "No space left on device")


@dataclass
class Watch:
    """Callback that lets a test wait for what it has seen."""

    seen: list[tuple[str, str | None]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, event: JobEvent) -> None:
        with self.changed:
            self.seen.append((event.status.value if event.kind == "status" else event.kind, event.reason))
            self.changed.notify_all()

    def wait(self, kind: str, reason: str = "", count: int = 1) -> None:
        with self.changed:
            assert self.changed.wait_for(
                lambda: sum(k == kind and reason in (r or "") for k, r in self.seen) >= count, 60
            ), self.seen


def start_held(
    runtime: Runtime, directory: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> tuple[FinetuneHandle, Disk]:
    """A job that is held because its first checkpoint finds no room; nothing tries again by the clock."""
    disk = Disk(is_full=True)
    monkeypatch.setattr(runtime._engine.jobs, "fail_point", disk.write)
    monkeypatch.setattr("loquetier.storage.FIRST_WAIT", 1000.0)
    monkeypatch.setattr("loquetier.storage.LONGEST_WAIT", 1000.0)
    handle = start(
        runtime, directory, checkpoint_every=1, callbacks=[watch], training=replace(TRAINING, max_steps=300), **more
    )
    watch.wait("paused", "insufficient_storage")
    assert handle.status is PAUSED
    return handle, disk


def test_it_goes_on_by_itself_and_ends_as_if_nothing_had_been(
    runtime: Runtime, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = replace(TRAINING, max_steps=40)
    weights, expected = unbroken(base, tmp_path, training=training)
    monkeypatch.setattr("loquetier.storage.FIRST_WAIT", 0.01)
    disk, watch = Disk(is_full=True), Watch()
    monkeypatch.setattr(runtime._engine.jobs, "fail_point", disk.write)
    handle = start(runtime, tmp_path / "c", checkpoint_every=1, callbacks=[watch], training=training)
    watch.wait("paused", "insufficient_storage")
    assert handle.reason is None or ("bytes needed" in handle.reason and str(tmp_path / "c") in handle.reason)
    disk.is_full = False
    assert curve(handle.wait(60)) == expected
    assert exported(runtime, tmp_path / "out") == weights
    assert handle.checkpoint_errors == [] and disk.tries >= 1
    assert names(tmp_path / "c")[-1] == "step-000040"
    assert (tmp_path / "c" / "step-000040" / "adapter_model.safetensors").read_bytes() == weights


def test_its_owner_pauses_and_resumes_it_meanwhile(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    handle, disk = start_held(runtime, tmp_path / "c", watch, monkeypatch)
    handle.pause()
    assert handle.status is PAUSED and handle.reason is None
    disk.is_full = False
    handle._storage_waits[0].try_now()
    while runtime._loop.call(lambda: bool(handle.job.holds)):
        pass
    assert handle.status is PAUSED, "its owner wants it paused"
    steps = len(handle.history)
    handle.resume()
    watch.wait("step", count=steps + 1)
    handle.cancel()
    handle.wait(60)


def test_resume_tries_at_once_and_no_earlier_than_there_is_room(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    handle, disk = start_held(runtime, tmp_path / "c", watch, monkeypatch)
    steps = len(handle.history)
    handle.resume()
    while disk.tries < 2:
        pass
    assert handle.status is PAUSED and len(handle.history) <= steps + 1
    disk.is_full = False
    handle.resume()
    watch.wait("step", count=steps + 2)
    handle.cancel()
    handle.wait(60)


def test_cancelled_while_the_disk_is_full(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, _ = start_held(runtime, tmp_path / "c", Watch(), monkeypatch)
    handle.cancel()
    handle.wait(60)
    assert handle.status is JobStatus.CANCELLED and handle.reason is None
    assert [getattr(e, "errno", None) for e in handle.checkpoint_errors][-1] == errno.ENOSPC


def test_closing_does_not_wait_for_room(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(str(base), config=CONFIG)
    handle, _ = start_held(runtime, tmp_path / "c", Watch(), monkeypatch)
    runtime.close()
    assert handle.status is JobStatus.FAILED and names(tmp_path / "c") == []


def test_no_row_of_the_files_is_lost(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loquetier.storage.FIRST_WAIT", 0.01)
    tries = {"left": 5}

    def append(descriptor: int, data: bytes) -> None:
        if threading.current_thread().name == "loquetier-job-files" and b'"event": "step"' in data and tries["left"]:
            tries["left"] -= 1
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        append_durably(descriptor, data)

    monkeypatch.setattr("loquetier.reporting.files.append_durably", append)
    watch = Watch()
    handle = start(runtime, output_dir=tmp_path / "out", callbacks=[watch])
    assert len(handle.wait(60)) == 10 and handle.file_errors == [] and tries["left"] == 0
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 11))
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(1, 11))]


def test_too_little_room_is_told_before_the_first_step(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loquetier.storage.free_bytes", lambda _: 1000)
    with pytest.raises(InsufficientStorageError, match=r"3 checkpoints of job 'fox' need \d+ bytes.*1000 are free"):
        start(runtime, tmp_path / "c")
    assert runtime.adapters() == []
    monkeypatch.undo()
    start(runtime, tmp_path / "c").wait(60)  # the directory is free again


def test_what_was_refused_room_for_is_enough(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes asked for are those that checkpoints take, with a margin for text that is not tenfold."""
    asked: list[int] = []
    monkeypatch.setattr("loquetier.checkpointing.check_room", lambda _path, needed, *_: asked.append(needed))
    start(runtime, tmp_path / "c", checkpoint_every=1, checkpoints_to_keep=2, lora=replace(SPEC, r=32)).wait(60)
    held = sum(f.stat().st_size for f in (tmp_path / "c").rglob("*") if f.is_file())
    assert held * 3 / 2 <= asked[0] <= 1.5 * held * 3 / 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` on this machine")
    if done.returncode:
        pytest.skip(f"this machine does not let us mount a small tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.timeout(120)
def test_on_a_real_full_disk(
    runtime: Runtime, base: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loquetier.storage.FIRST_WAIT", 0.01)
    training = replace(TRAINING, max_steps=60)
    weights, expected = unbroken(base, tmp_path, training=training)
    watch = Watch()
    handle = start(
        runtime,
        small_disk / "c",
        checkpoint_every=5,
        callbacks=[watch],
        training=training,
        output_dir=small_disk / "out",
    )
    watch.wait("step")
    with pytest.raises(OSError, match="No space"), open(small_disk / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    watch.wait("paused", "insufficient_storage")
    assert handle.status is PAUSED
    (small_disk / "ballast").unlink()
    assert curve(handle.wait(60)) == expected
    assert exported(runtime, tmp_path / "exported") == weights
    assert handle.checkpoint_errors == [] and handle.file_errors == []
    rows = (small_disk / "out" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == list(map(str, range(1, 61)))


# --- the parts ---


def test_appending_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "file", "xb") as file:
        append_durably(file.fileno(), b"one\n")
        write, calls = os.write, []

        def half(descriptor: int, data: Any) -> int:
            calls.append(1)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data[:2])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            append_durably(file.fileno(), b"two\n")
        assert (tmp_path / "file").read_bytes() == b"one\n"
        monkeypatch.undo()
        append_durably(file.fileno(), b"two\n")
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n"


def test_other_errors_are_raised_at_once(tmp_path: Path) -> None:
    held: list[str] = []
    wait = StorageWait(tmp_path, held.append, lambda: held.append("released"))

    def broken() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        wait.run(broken, 1)
    assert held == []


def test_waiting_doubles_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Clock(threading.Condition):
        def wait_for(self, predicate: Any, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    monkeypatch.setattr(threading, "Condition", Clock)
    reasons: list[str] = []
    wait = StorageWait(tmp_path, reasons.append, lambda: reasons.append("released"))
    left = 9

    def write() -> None:
        nonlocal left
        left -= 1
        if left:
            raise OSError(errno.ENOSPC, "No space left on device")

    wait.run(write, 77)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert reasons[-1] == "released" and all("77 bytes needed" in r and str(tmp_path) in r for r in reasons[:-1])
