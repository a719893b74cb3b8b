"""publish="checkpoint" serves what is on the disk; the best checkpoint stays, and is served after a break."""

from __future__ import annotations

import json
import math
import queue
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import save_tiny

from loquetier import EngineConfig, LoraSpec, Runtime, TrainingConfig
from loquetier.checkpointing import _Writer
from loquetier.errors import ConfigError
from loquetier.finetuning import FinetuneHandle, JobEvent
from loquetier.storage import StorageWait
from loquetier.training.checkpoint_dir import CheckpointDirectory
from loquetier.training.job import FinetuneJob
from loquetier.virtual import VirtualModel

DATA = [{"prompt": f"{a} then ", "completion": f"{b}!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
CONFIG = EngineConfig(dtype="float32", kv_memory=4 << 20, adapter_memory=4 << 20, keep_versions=20)
TRAINING = TrainingConfig(batch_size=2, max_steps=7, learning_rate=1e-2, publish="checkpoint")
BEST = replace(TRAINING, publish="best", eval_every=1, max_steps=8, learning_rate=0.3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("base")
    save_tiny(directory, "llama")
    return str(directory)


def start(runtime: Runtime, directory: Path, training: TrainingConfig, **more: Any) -> FinetuneHandle:
    lora, every = LoraSpec(r=4, alpha=8), more.pop("checkpoint_every", 2)
    return runtime.finetune(
        "fox", DATA, lora=lora, training=training, checkpoint_dir=directory, checkpoint_every=every, **more
    )


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def assert_serves(runtime: Runtime, model: str, checkpoint: Path, place: Path) -> None:
    """What is served is what the checkpoint holds, bit for bit."""
    runtime.export_adapter(model, place)
    served, saved = weights(place), weights(checkpoint)
    assert served.keys() == saved.keys() and all(torch.equal(served[key], saved[key]) for key in saved)


def test_every_checkpoint_is_served_bit_for_bit_once_it_is_on_the_disk(base: str, tmp_path: Path) -> None:
    saved: list[JobEvent] = []
    listen = lambda event: saved.append(event) if event.kind == "checkpoint" else None  # noqa: E731
    with Runtime(base, config=CONFIG) as runtime:
        job = start(runtime, tmp_path / "c", TRAINING, checkpoints_to_keep=9, callbacks=[listen])
        job.wait(60)
        assert job._pump.join(60)
        assert [e.record.step for e in saved if e.record][-1] == 7
        versions = dict(job.job.versions)
        assert runtime.versions("fox") == sorted(versions.values()) and 7 in versions
        for step, number in versions.items():
            path = job.checkpoint_at(step)
            assert path is not None and path.name == f"step-{step:06d}"
            assert_serves(runtime, f"fox@{number}", path, tmp_path / f"out-{step}")
        assert runtime.adapter("fox").version == versions[7]


def test_a_checkpoint_is_served_while_its_job_goes_on(base: str, tmp_path: Path) -> None:
    ready, paused = threading.Event(), threading.Event()

    def pause(event: JobEvent) -> None:
        if event.kind == "checkpoint" and not paused.is_set() and ready.wait(60):
            job.pause()
            paused.set()

    with Runtime(base, config=CONFIG) as runtime:
        many = replace(TRAINING, max_steps=5000)  # so many that the pause comes before the end
        job = start(runtime, tmp_path / "c", many, checkpoints_to_keep=9999, callbacks=[pause])
        ready.set()
        assert paused.wait(60)
        while not (versions := runtime._loop.call(lambda: dict(job.job.versions))):
            assert not job.status.is_final
        step, number = next(iter(versions.items()))
        path = job.checkpoint_at(step)
        assert path is not None
        assert_serves(runtime, f"fox@{number}", path, tmp_path / "out")
        job.cancel()


def test_the_writer_leaves_none_out_and_says_when_it_is_behind(tmp_path: Path) -> None:
    written: list[str] = []
    writing, go_on, at_end = threading.Event(), threading.Event(), threading.Event()

    def write(image: Any) -> None:
        writing.set()
        assert go_on.wait(60)
        written.append(image.name)

    writer = _Writer(write, [], StorageWait(tmp_path, lambda reason: None, lambda: None))
    images: list[Any] = [SimpleNamespace(name=name, master=torch.zeros(1)) for name in "abcde"]
    writer.put(images[0])
    assert writing.wait(60)
    assert not writer.is_full
    told: list[bool] = []
    for image in images[1:4]:
        writer.put(image, lambda: told.append(writer.is_full))
        assert writer.is_full
    writer.finish(images[4], at_end.set, is_patient=True)
    go_on.set()
    writer.join()
    assert written == list("abcde") and at_end.is_set() and told == [True, True, False]


def test_a_job_that_is_faster_than_the_disk_waits_for_it(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, add = threading.Semaphore(0), CheckpointDirectory.add
    entered: queue.SimpleQueue[int] = queue.SimpleQueue()

    def slow(directory: CheckpointDirectory, step: int, *rest: Any) -> Path:
        entered.put(step)
        assert go_on.acquire(timeout=60)
        return add(directory, step, *rest)

    monkeypatch.setattr(CheckpointDirectory, "add", slow)
    with Runtime(base, config=CONFIG) as runtime:
        job = start(runtime, tmp_path / "c", TRAINING, checkpoints_to_keep=9, checkpoint_every=1)
        try:
            assert entered.get(timeout=60) == 1
            while len(job.history) < 2:
                job._ended.wait(0.01)
            runtime.generate("many steps of the engine, none of them the job's")
            assert len(job.history) == 2, "one is being written and one waits"
            go_on.release()
            assert entered.get(timeout=60) == 2
        finally:
            go_on.release(99)
        job.wait(60)
        runtime.check_integrity()
        assert [job.checkpoint_at(step) is not None for step in range(1, 8)] == [True] * 7


def test_after_a_break_the_checkpoint_is_served_at_once(base: str, tmp_path: Path) -> None:
    with Runtime(base, config=CONFIG) as runtime:
        job = start(runtime, tmp_path / "c", replace(TRAINING, max_steps=10**6))
        while not job.history:
            job._ended.wait(0.01)
    with Runtime(base, config=CONFIG) as runtime:
        job = start(runtime, tmp_path / "c", replace(TRAINING, max_steps=10**6), resume=True)
        assert job.resumed is not None and job.job.versions[job.resumed.step] == 1
        job.pause()
        assert_serves(runtime, "fox@1", job.resumed.path, tmp_path / "out")
        with pytest.raises(ConfigError, match="publish='checkpoint'"):
            VirtualModel(runtime, "fox", job).detach()
        assert job.status.value == "paused"


def test_it_needs_checkpoints(base: str) -> None:
    with (
        Runtime(base, config=CONFIG) as runtime,
        pytest.raises(ConfigError, match=r"publish='checkpoint'.*checkpoint_dir"),
    ):
        runtime.finetune("fox", DATA, training=TRAINING)


def test_the_best_checkpoint_stays_and_is_served_after_a_break(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is the best, its checkpoint falls between two periodic ones, and only one is to be kept."""
    attach = FinetuneJob.attach_evaluation
    losses = {2: 0.25}

    def fake(job: FinetuneJob, result: Any) -> None:
        attach(job, replace(result, loss=losses.get(job.num_steps, 3.0 + job.num_steps)))

    monkeypatch.setattr(FinetuneJob, "attach_evaluation", fake)
    more: dict[str, Any] = {"eval_data": DATA[:2], "checkpoint_every": 3, "checkpoints_to_keep": 1}
    place = tmp_path / "c"
    with Runtime(base, config=CONFIG) as runtime:
        job = start(runtime, place, BEST, output_dir=tmp_path / "files", **more)
        job.wait(60)
        best = job.best
        assert best is not None and (best.step, best.loss, best.checkpoint) == (2, 0.25, place / "step-000002")
        assert best.perplexity == pytest.approx(math.exp(0.25)) and best.version == job.job.versions[2]
        assert sorted(p.name for p in place.iterdir() if p.name != ".lock") == ["step-000002", "step-000008"]
        assert_serves(runtime, "fox", best.checkpoint, tmp_path / "first")
    lines = [json.loads(line) for line in (tmp_path / "files" / "metrics.jsonl").read_text().splitlines()]
    perplexities = [line["valid_perplexity"] for line in lines if line["event"] == "evaluation"]
    assert len(perplexities) == 8 and perplexities[1] == pytest.approx(math.exp(0.25))
    with Runtime(base, config=CONFIG) as runtime:  # it had ended: what it served is served again
        job = start(runtime, place, BEST, resume=True, **more)
        job.wait(60)
        assert_serves(runtime, "fox", place / "step-000002", tmp_path / "second")
        assert job.best is not None and (job.best.step, job.best.version) == (2, 1)
