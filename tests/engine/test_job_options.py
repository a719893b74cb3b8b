"""`Runtime.finetune` with dropout, files, callbacks of transformers' kind and reporters."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny

from loquetier.adapters.spec import LoraSpec
from loquetier.config import MIB, EngineConfig, TrainingConfig
from loquetier.errors import ConfigError, DataError
from loquetier.finetuning import FinetuneHandle
from loquetier.reporting.events import JobEvent, JobStart
from loquetier.runtime import Runtime
from loquetier.training.job import JobStatus

DATA = [{"prompt": f"{letter} then ", "completion": f"{letter}{letter}"} for letter in "abcd"]
TRAINING = TrainingConfig(batch_size=2, max_steps=6, learning_rate=1e-2)
ENGINE = EngineConfig(dtype="float32", device="cpu", kv_memory=MIB, adapter_memory=4 * MIB)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    base = tmp_path_factory.mktemp("base")
    save_tiny(base, "llama")
    with Runtime(str(base), config=ENGINE) as runtime:
        yield runtime


def test_dropout_trains_and_is_repeatable(runtime: Runtime) -> None:
    losses = []
    for name, dropout in (("a", 0.3), ("b", 0.3), ("c", 0.0)):
        job = runtime.finetune(name, DATA, lora=LoraSpec(r=4, alpha=64, dropout=dropout), training=TRAINING)
        losses.append([r.loss for r in job.wait(60)])
        assert runtime.adapter(name).spec.dropout == dropout
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][-1] < losses[0][0]


def test_files_are_complete_when_wait_returns(runtime: Runtime, tmp_path: Path) -> None:
    training = replace(TRAINING, eval_every=2)
    job = runtime.finetune("files", DATA, training=training, eval_data=DATA, output_dir=tmp_path / "out")
    history = job.wait(60)
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, record in zip(rows, history, strict=True):
        assert (float(row["train_loss"]), float(row["train_accuracy"])) == (record.loss, record.accuracy)
        if record.evaluation is None:
            assert row["valid_loss"] == row["valid_mean_token_accuracy"] == ""
        else:
            assert float(row["valid_loss"]) == record.evaluation.loss
            assert float(row["valid_mean_token_accuracy"]) == record.evaluation.accuracy
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("step") == 6
    assert [line["event"] for line in lines].count("evaluation") == 3
    assert lines[0]["event"] == "begin" and lines[-1]["status"] == "succeeded"
    assert job.file_errors == [] and job.best is not None and job.best.step == 6


def test_a_job_that_does_not_start_leaves_no_files(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs eval_data"):
        config = TrainingConfig(eval_every=1, early_stopping_patience=1)
        runtime.finetune("x", DATA, training=config, output_dir=tmp_path / "out")
    with pytest.raises(DataError):
        runtime.finetune("x", [{"wrong": 1}], output_dir=tmp_path / "out")
    with pytest.raises(DataError, match="eval_data: Example 1"):
        runtime.finetune("x", DATA, eval_data=[{"wrong": 1}], output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="callbacks"):
        runtime.finetune("x", DATA, output_dir=tmp_path / "out", callbacks=[7])
    with pytest.raises(ConfigError, match="report_to"):
        runtime.finetune("x", DATA, output_dir=tmp_path / "out", report_to=["nobody"])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    runtime.finetune("x", DATA, training=TRAINING, output_dir=tmp_path / "out").wait(60)
    with pytest.raises(ConfigError, match="give a new or empty directory"):
        runtime.finetune("x", DATA, training=TRAINING, output_dir=tmp_path / "out")


def test_a_callback_can_stop_the_job(runtime: Runtime) -> None:
    ended = threading.Event()

    class StopsAtTwo:
        def on_step_end(self, args: Any, state: Any, control: Any) -> None:
            control.should_training_stop = state.global_step >= 2

        def on_train_end(self, args: Any, state: Any, control: Any) -> None:
            ended.set()

    training = TrainingConfig(batch_size=2, max_steps=100_000)
    job = runtime.finetune("stopped", DATA, training=training, callbacks=[StopsAtTwo()])
    assert len(job.wait(60)) >= 2
    assert job.status is JobStatus.CANCELLED and job.reason == "a callback set control.should_training_stop"
    assert ended.wait(60) and job.callback_errors == []


def test_a_failing_reporter_and_a_broken_disk_fail_nothing(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def begin(self, start: JobStart) -> None:
            raise RuntimeError("no network")

        def event(self, event: JobEvent) -> None:
            raise RuntimeError("no network")

        def close(self) -> None: ...

    def broken(*_: object) -> None:
        if threading.current_thread().name == "loquetier-job-files":  # the header was written at the start
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("loquetier.reporting.files.append_durably", broken)
    job: FinetuneHandle = runtime.finetune(
        "robust", DATA, training=TRAINING, output_dir=tmp_path / "out", report_to=[Broken()]
    )
    assert len(job.wait(60)) == 6 and job.status is JobStatus.SUCCEEDED
    assert {type(e) for e in job.file_errors} == {OSError}
    assert job._pump.join(60) and len(job.callback_errors) == 10
