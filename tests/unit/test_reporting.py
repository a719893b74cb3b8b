"""A job's files, callbacks and reporters, fed with made-up events."""

from __future__ import annotations

import csv
import json
import math
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.errors import ConfigError, TrainingDivergedError
from loquetier.reporting.callbacks import as_observer
from loquetier.reporting.events import JobEvent, JobObserver, JobStart
from loquetier.reporting.files import JobFiles, csv_cell
from loquetier.reporting.pump import EventPump
from loquetier.reporting.reporters import open_reporters
from loquetier.training.job import EvalResult, JobStatus, StepRecord

RUNNING, DONE, FAILED = JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED
CONFIG = TrainingConfig(batch_size=2, eval_every=2, max_steps=4)


def start(output_dir: Path | None = None) -> JobStart:
    return JobStart("job", CONFIG, LoraSpec(), 4, 5, 2, output_dir)


def record(step: int, loss: float = 1.5, evaluation: EvalResult | None = None, reason: str | None = None) -> StepRecord:
    skipped = reason is not None
    return StepRecord(step, loss, 0.25, 1e-3, 2.0, 30, 0.1, evaluation, skipped, reason)


def events() -> list[JobEvent]:
    """Four steps; evaluations after 2 and 4, step 3 skipped; the job is stopped before the last evaluation is done."""
    bad = record(3, math.nan, reason="loss nan")
    return [
        JobEvent("step", "job", RUNNING, record(1)),
        JobEvent("step", "job", RUNNING, record(2), is_evaluation_due=True),
        JobEvent("evaluation", "job", RUNNING, record(2, evaluation=EvalResult(2.0, 0.5, 7))),
        JobEvent("warning", "job", RUNNING, bad, reason="loss nan"),
        JobEvent("step", "job", RUNNING, bad, reason="loss nan"),
        JobEvent("status", "job", JobStatus.PAUSED),
        JobEvent("step", "job", RUNNING, record(4), is_evaluation_due=True),
        JobEvent("status", "job", FAILED, error=TrainingDivergedError("why"), reason="stopped"),
    ]


def deliver(observer: JobObserver, output_dir: Path | None = None, pairs: list[JobEvent] | None = None) -> EventPump:
    pump = EventPump([observer], "test")
    pump.begin(start(output_dir))
    for event in events() if pairs is None else pairs:
        pump.put(event)
    pump.close()
    assert pump.join(30)
    return pump


# --- files ---


def test_files_hold_every_event_and_one_row_per_step(tmp_path: Path) -> None:
    place = tmp_path / "new" / "job"
    assert not deliver(JobFiles(place), place).errors
    rows = list(csv.reader((place / "results.csv").open()))
    assert rows == [
        ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"],
        ["1", "1.5", "0.25", "", ""],
        ["2", "1.5", "0.25", "2.0", "0.5"],
        ["3", "nan", "0.25", "", ""],
        ["4", "1.5", "0.25", "", ""],
    ]

    def strict(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=strict) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["begin", *(event.kind for event in events())]
    assert lines[0]["config"]["batch_size"] == 2 and lines[0]["spec"]["r"] == 8 and lines[0]["total_steps"] == 4
    assert lines[3]["valid_loss"] == 2.0 and lines[3]["valid_perplexity"] == pytest.approx(math.e**2)
    assert lines[5]["loss"] is None and lines[5]["skipped"] and lines[5]["reason"] == "loss nan"
    assert lines[-1]["error"] == {"code": "training_diverged", "message": "why"} and lines[-1]["reason"] == "stopped"


def test_every_event_is_on_disk_before_the_next(tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "job")
    files.begin(start())
    rows = []
    for event in events():
        files.event(event)
        rows.append(len((tmp_path / "job" / "results.csv").read_text().splitlines()) - 1)
        assert len((tmp_path / "job" / "metrics.jsonl").read_text().splitlines()) == len(rows) + 1
    assert rows == [1, 1, 2, 2, 3, 3, 3, 4]
    files.close()


def test_files_of_another_run_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("precious")
    with pytest.raises(ConfigError, match=r"File exists.*give a new or empty directory"):
        JobFiles(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]
    assert (tmp_path / "results.csv").read_text() == "precious"
    with pytest.raises(ConfigError, match="output_dir"):
        JobFiles(tmp_path / "results.csv")


def life(place: Path, history: tuple[StepRecord, ...], pairs: list[JobEvent], **more: Any) -> None:
    """One life of a job that goes on after `history`, and whose process dies without a word."""
    files = JobFiles(place, "job")
    files.begin(replace(start(place), history=history, **more))
    for event in pairs:
        files.event(event)
    files.close()


def test_a_resumed_jobs_files_have_each_step_once(tmp_path: Path) -> None:
    """The checkpoint knows less than the files (steps 2 and 3 are made again), then more (4 was never written)."""
    evaluated = record(2, 1.25, EvalResult(2.0, 0.5, 7))
    steps = [JobEvent("step", "job", RUNNING, record(i)) for i in range(1, 5)]
    life(tmp_path, (), [steps[0], JobEvent("step", "job", RUNNING, record(2, 9.0)), steps[2]])
    for name in ("metrics.jsonl", "results.csv"):
        with (tmp_path / name).open("a") as file:
            file.write('{"event": "st' if name == "metrics.jsonl" else "4,1")  # cut off by the kill
    again = [
        JobEvent("step", "job", RUNNING, record(2, 1.25), is_evaluation_due=True),
        JobEvent("evaluation", "job", RUNNING, evaluated),
    ]
    life(tmp_path, (record(1),), again)
    bad = record(3, math.nan, reason="loss nan")
    life(tmp_path, (record(1), evaluated, bad, record(4)), [JobEvent("status", "job", DONE)])
    rows = (tmp_path / "results.csv").read_text().splitlines()
    header = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert rows == [header, "1,1.5,0.25,,", "2,1.25,0.25,2.0,0.5", "3,nan,0.25,,", "4,1.5,0.25,,"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("step", line.get("resumed_after_step"))) for line in lines] == [
        ("begin", None),
        ("step", 1),
        ("begin", 1),
        ("step", 2),
        ("evaluation", 2),
        ("warning", 3),
        ("step", 3),
        ("step", 4),
        ("begin", 4),
        ("status", None),
    ]
    assert lines[3]["loss"] == 1.25 and sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "results.csv"]


def test_an_evaluation_that_was_cut_off_brings_its_row_once(tmp_path: Path) -> None:
    whole = record(2, evaluation=EvalResult(2.0, 0.5, 7))
    life(tmp_path, (), [JobEvent("step", "job", RUNNING, record(1))])
    after = [JobEvent("evaluation", "job", RUNNING, whole), JobEvent("step", "job", RUNNING, record(3))]
    life(tmp_path, (record(1), record(2)), after, is_evaluation_due=True)
    rows = [row.split(",")[0] for row in (tmp_path / "results.csv").read_text().splitlines()]
    assert rows == ["step", "1", "2", "3"]
    # The job ends before that evaluation is done: the row comes all the same.
    life(tmp_path, (record(1), record(2)), [JobEvent("status", "job", FAILED)], is_evaluation_due=True)
    assert (tmp_path / "results.csv").read_text().splitlines()[1:] == ["1,1.5,0.25,,", "2,1.5,0.25,,"]


def test_a_resumed_job_takes_no_files_but_its_own(tmp_path: Path) -> None:
    deliver(JobFiles(tmp_path), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="was not written by job 'other'"):
        JobFiles(tmp_path, "other")
    (tmp_path / "results.csv").write_text("precious")
    with pytest.raises(ConfigError, match="is not a job's table"):
        JobFiles(tmp_path, "job")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    (tmp_path / "results.csv").write_text("step,tr")  # killed while its first bytes were written
    files = JobFiles(tmp_path, "job")
    files.remove()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before, "what was there stays"


def test_a_job_that_was_killed_before_its_beginning_is_taken_up(tmp_path: Path) -> None:
    files = JobFiles(tmp_path, "job")
    files.event(JobEvent("status", "job", JobStatus.VALIDATING_FILES))
    files.close()
    with pytest.raises(ConfigError, match="was not written by job 'other'"):
        JobFiles(tmp_path, "other")
    life(tmp_path, (), [JobEvent("step", "job", RUNNING, record(1))])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["status", "begin", "step"]


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-cmd", "@SUM(A1)", "\tx", -math.inf])
def test_cells_that_a_spreadsheet_would_run_are_made_text(formula: object) -> None:
    assert csv_cell(formula) == f"'{formula}"


@pytest.mark.parametrize("value", [1, -1.5, -1e-9, 0.0, "", "text"])
def test_other_cells_stay_as_they_are(value: object) -> None:
    assert csv_cell(value) == str(value)


# --- callbacks ---


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Written for transformers' Trainer: knows nothing of us."""

    def __init__(self, stop_at: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.stop_at = stop_at

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.calls.append(("begin", args.per_device_train_batch_size, state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        self.calls.append(("step", state.global_step, state.epoch))
        control.should_training_stop = state.global_step == self.stop_at
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.calls.append(("log", sorted(logs)[0]))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        self.calls.append(("evaluate", metrics["eval_loss"], state.best_metric))

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.calls.append(("end", state.best_metric, len(state.log_history)))


def test_a_trainer_callback_is_called_as_by_transformers() -> None:
    stops: list[int] = []
    target = Recorder(stop_at=3)
    assert not deliver(as_observer(target, lambda: stops.append(1))).errors
    assert target.calls == [
        ("begin", 2, 4),
        ("step", 1, 1 / 3),
        ("log", "epoch"),
        ("step", 2, 2 / 3),
        ("log", "epoch"),
        ("log", "epoch"),
        ("evaluate", 2.0, None),
        ("step", 3, 1.0),
        ("log", "epoch"),
        ("step", 4, 4 / 3),
        ("log", "epoch"),
        ("log", "epoch"),
        ("end", 2.0, 6),
    ]
    assert stops == [1]


def test_a_resumed_job_begins_where_it_was() -> None:
    target = Recorder()
    observer = as_observer(target, lambda: None)
    history = (record(1), record(2, evaluation=EvalResult(2.0, 0.5, 7)))
    observer.begin(replace(start(), history=history))
    observer.event(JobEvent("step", "job", RUNNING, record(3)))
    observer.event(JobEvent("evaluation", "job", RUNNING, record(3, evaluation=EvalResult(3.0, 0.5, 7))))
    assert target.calls[:3] == [("begin", 2, 4), ("step", 3, 1.0), ("log", "epoch")]
    assert target.calls[-1] == ("evaluate", 3.0, 2.0), "the best before the break is known"


def test_transformers_own_early_stopping_callback_works() -> None:
    stops: list[int] = []
    pairs = [
        JobEvent("evaluation", "job", RUNNING, record(i, evaluation=EvalResult(loss, 0.5, 7)))
        for i, loss in enumerate((2.0, 1.0, 1.5, 1.2), 1)
    ]
    observer = as_observer(EarlyStoppingCallback(2), lambda: stops.append(1))
    assert not deliver(observer, pairs=pairs[:3]).errors and stops == []
    assert not deliver(observer, pairs=pairs).errors and stops == [1]


def test_an_object_with_some_methods_and_flags_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    class Partial:
        seen = 0

        def on_step_end(self, args: Any, state: Any, control: Any) -> None:
            self.seen += 1
            control.should_save = True

    target = Partial()
    assert not deliver(as_observer(target, lambda: None)).errors
    assert target.seen == 4 and "should_save" in caplog.text


@pytest.mark.parametrize("wrong", [3, "on_step_end", object(), Recorder])
def test_what_is_no_callback_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="callbacks: "):
        as_observer(wrong, lambda: None)


def test_one_observer_that_raises_does_not_cost_the_others_anything() -> None:
    class Broken:
        def begin(self, start: JobStart) -> None:
            raise ValueError("begin")

        def event(self, event: JobEvent) -> None:
            raise ValueError(event.kind)

        def close(self) -> None:
            raise ValueError("close")

    heard: list[str] = []
    threads: set[int] = set()

    def listen(event: JobEvent) -> None:
        heard.append(event.kind)
        threads.add(threading.get_ident())

    pump = EventPump([Broken(), as_observer(listen, lambda: None)], "test")
    pump.begin(start())
    for event in events():
        pump.put(event)
    pump.close()
    assert pump.join(30)
    kinds = [event.kind for event in events()]
    assert heard == kinds and [str(e) for e in pump.errors] == ["begin", *kinds, "close"]
    assert threads.isdisjoint({threading.get_ident()})


def test_a_pump_without_observers_keeps_nothing() -> None:
    pump = EventPump([], "test")
    pump.begin(start())
    pump.put(events()[0])
    pump.close()
    assert pump.join(0) and pump._queue.empty()


# --- reporters ---


class Log(list[Any]):
    """Stands for a package: notes every call and returns itself, so that chains work."""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self.append((name, args, named))
            return None if name == "get_experiment_by_name" else self

        return call

    info = SimpleNamespace(run_id="run-1")


MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
ENDS = {
    "tensorboard": ("close", (), {}),
    "wandb": ("finish", (), {"exit_code": 1}),
    "mlflow": ("set_terminated", ("run-1",), {"status": "FAILED"}),
    "trackio": ("finish", (), {}),
}


@pytest.mark.parametrize("name", MODULES)
def test_reporters_report_every_finite_number_at_its_step(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module: Any = ModuleType(MODULES[name])
    log = module.log = Log()
    for entry in ("SummaryWriter", "init", "MlflowClient"):
        setattr(module, entry, getattr(log, entry))
    monkeypatch.setitem(sys.modules, MODULES[name], module)
    (reporter,) = open_reporters([name])
    assert not deliver(reporter, tmp_path).errors
    seen: dict[tuple[str, int], float] = {}
    for call, args, named in log:
        if call == "add_scalar":
            seen[args[0], args[2]] = args[1]
        elif call == "log_metric":
            seen[args[1], named["step"]] = args[2]
        elif call == "log":
            seen |= {(metric, named["step"]): value for metric, value in args[0].items()}
    assert {step for _, step in seen} == {1, 2, 3, 4}
    assert (seen["train/loss", 1], seen["eval/loss", 2], seen["train/skipped", 3]) == (1.5, 2.0, 1.0)
    assert ("train/loss", 3) not in seen and ("eval/loss", 4) not in seen
    assert all(math.isfinite(value) for value in seen.values())
    assert log[-1] == ENDS[name]


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_package_is_a_typed_error_with_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)  # import raises ModuleNotFoundError
    with pytest.raises(ConfigError, match=rf"report_to='{name}'.*pip install {name}"):
        open_reporters([name])


def test_reporters_of_ones_own_and_wrong_ones() -> None:
    class Mine:
        def begin(self, start: JobStart) -> None: ...
        def event(self, event: JobEvent) -> None: ...
        def close(self) -> None: ...

    mine = Mine()
    assert open_reporters([mine]) == [mine] and open_reporters([]) == []
    with pytest.raises(ConfigError, match="unknown; use tensorboard, wandb, mlflow, trackio"):
        open_reporters(["tensorbored"])
    with pytest.raises(ConfigError, match=r"report_to='wandb': give a list"):
        open_reporters("wandb")
    with pytest.raises(ConfigError, match="give a list"):
        open_reporters(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no method begin, event, close"):
        open_reporters([object()])  # type: ignore[list-item]


def test_a_reporter_whose_run_does_not_start_stays_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("wandb")

    def init(**_: object) -> None:
        raise ConnectionError("no network")

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    (reporter,) = open_reporters(["wandb"])
    assert [type(e) for e in deliver(reporter).errors] == [ConnectionError]
