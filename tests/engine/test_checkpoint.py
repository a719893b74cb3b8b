"""Jobs with checkpoints: what comes back after an end, a close or a damage is what would have been there without."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.tiny import save_tiny, tiny_model

from loquetier import EngineConfig, LoraSpec, Runtime, SamplingParams, TrainingConfig
from loquetier.errors import CheckpointError, ConfigError, EngineStoppedError, TrainingDivergedError
from loquetier.finetuning import FinetuneHandle, JobEvent
from loquetier.training.job import FinetuneJob, JobStatus, StepRecord

SPEC = LoraSpec(r=4, alpha=8)
TRAINING = TrainingConfig(batch_size=2, max_steps=10, learning_rate=1e-2, seed=3, lr_scheduler_type="cosine")
DATA = [{"prompt": f"{a} then ", "completion": f"{b}!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
CONFIG = EngineConfig(dtype="float32", kv_memory=4 << 20, adapter_memory=4 << 20)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "base"
    save_tiny(directory, "llama")
    return directory


def start(runtime: Runtime, directory: Path | None = None, **settings: Any) -> FinetuneHandle:
    """The job of these tests; `settings` replace its own."""
    if directory is not None:
        settings = {"checkpoint_dir": directory, "checkpoint_every": 3} | settings
    wanted = {"name": "fox", "data": DATA, "lora": SPEC, "training": TRAINING} | settings
    return runtime.finetune(wanted.pop("name"), wanted.pop("data"), **wanted)


def exported(runtime: Runtime, directory: Path) -> bytes:
    runtime.export_adapter("fox", directory, overwrite=True)
    return (directory / "adapter_model.safetensors").read_bytes()


def curve(history: tuple[StepRecord, ...]) -> list[StepRecord]:
    """Everything but the time it took."""
    return [replace(record, seconds=0.0) for record in history]


def unbroken(base: Path, directory: Path, **settings: Any) -> tuple[bytes, list[StepRecord]]:
    with Runtime(str(base), config=CONFIG) as runtime:
        history = start(runtime, **settings).wait(60)
        return exported(runtime, directory / "unbroken"), curve(history)


def broken_off(base: Path, directory: Path, after: int, **settings: Any) -> FinetuneHandle:
    """Start the job in a runtime of its own and close that as soon as `after` steps are done."""
    reached = threading.Event()

    def watch(event: JobEvent) -> None:
        if event.record is not None and event.record.step >= after:
            reached.set()

    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, directory, callbacks=[watch], **settings)
        assert reached.wait(60)
    return handle


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name != ".lock")


def test_a_checkpoint_at_the_end_and_only_the_newest_stay(base: Path, tmp_path: Path) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, tmp_path / "c", checkpoint_every=1)
        handle.wait(60)
        kept = names(tmp_path / "c")
        assert kept[-1] == "step-000010" and len(kept) == 2
        assert handle.checkpoint_errors == [] and handle.resumed is None
        # The last checkpoint is the served adapter, byte for byte: float32 serving copies the master weights.
        last = (tmp_path / "c" / "step-000010" / "adapter_model.safetensors").read_bytes()
        assert last == exported(runtime, tmp_path / "out")
        runtime.check_integrity()


def test_closed_midway_and_resumed_ends_where_the_unbroken_run_does(base: Path, tmp_path: Path) -> None:
    weights, expected = unbroken(base, tmp_path)
    first = broken_off(base, tmp_path / "c", after=4)
    with pytest.raises(EngineStoppedError):
        first.wait(0)
    done = len(first.history)
    assert done < 10, "the runtime was closed too late for this test to test anything"
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, tmp_path / "c", resume=True)
        assert handle.resumed is not None and 4 <= handle.resumed.step <= done
        assert handle.resumed.skipped == () and handle.resumed.differences == ()
        # No tolerance: the same numbers through the same kernels in the same order.
        assert curve(handle.wait(60)) == expected
        assert exported(runtime, tmp_path / "out") == weights
        runtime.check_integrity()


def test_a_step_cut_in_the_middle_of_its_accumulation_is_made_up_for(base: Path, tmp_path: Path) -> None:
    training = replace(TRAINING, max_steps=4, batch_size=8)
    config = replace(CONFIG, max_train_rows=16)  # one or two examples a tape: a step takes several
    with Runtime(str(base), config=config) as runtime:
        expected = curve(start(runtime, training=training).wait(60))
        weights = exported(runtime, tmp_path / "unbroken")
    runtime = Runtime(str(base), config=config)
    handle = start(runtime, tmp_path / "c", training=training, checkpoint_every=100)

    def in_the_middle() -> bool:
        job = handle.job
        if job.num_steps >= 1 and not job.has_open_rows and 0 < len(job._todo) < 8:
            runtime._intake._savers[0][0].save(job)
            runtime._engine.jobs.set_status(job, JobStatus.DETACHED)  # ends it; no further checkpoint
        return job.status.is_final

    while not runtime._loop.call(in_the_middle):
        pass
    runtime.close()
    assert handle.status is JobStatus.DETACHED, "no call fell between two tapes of one step"
    (name,) = names(tmp_path / "c")
    state = json.loads((tmp_path / "c" / name / "trainer_state.json").read_text())["state"]["job"]
    assert 0 < len(state["todo"]) < 8
    with Runtime(str(base), config=config) as runtime:
        handle = start(runtime, tmp_path / "c", training=training, checkpoint_every=100, resume=True)
        assert curve(handle.wait(60)) == expected
        assert exported(runtime, tmp_path / "out") == weights


def test_an_evaluation_cut_off_runs_again(base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training": replace(TRAINING, eval_every=2), "eval_data": DATA[:3]}
    weights, expected = unbroken(base, tmp_path, **settings)
    runtime = Runtime(str(base), config=CONFIG)
    handle = start(runtime, tmp_path / "c", checkpoint_every=100, **settings)

    def in_evaluation() -> bool:
        if handle.job.evaluation is not None:
            runtime._intake._savers[0][0].save(handle.job)
            runtime._engine.jobs.set_status(handle.job, JobStatus.DETACHED)  # ends it; no further checkpoint
        return handle.status.is_final

    while not runtime._loop.call(in_evaluation):
        pass
    runtime.close()
    assert handle.status is JobStatus.DETACHED and handle.history[-1].evaluation is None
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, tmp_path / "c", resume=True, **settings)
        assert curve(handle.wait(60)) == expected
        assert [r.step for r in handle.history if r.evaluation] == [2, 4, 6, 8, 10]
        assert exported(runtime, tmp_path / "out") == weights


def test_a_finished_job_is_served_again_and_not_trained_again(base: Path, tmp_path: Path) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        history = start(runtime, tmp_path / "c").wait(60)
        answer = runtime.generate("c then ", "fox", GREEDY).token_ids
    before = names(tmp_path / "c")
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, tmp_path / "c", resume=True)
        assert handle.wait(60) == history and handle.status is JobStatus.SUCCEEDED
        assert runtime.generate("c then ", "fox", GREEDY).token_ids == answer
    assert names(tmp_path / "c") == before


def test_a_cancelled_job_can_be_resumed(base: Path, tmp_path: Path) -> None:
    weights, expected = unbroken(base, tmp_path)
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, tmp_path / "c", checkpoint_every=100)
        while len(handle.history) < 2:
            runtime.stats()
        handle.cancel()
        done = len(handle.wait(60))
        assert 2 <= done < 10
        again = start(runtime, tmp_path / "c", resume=True)
        assert again.resumed is not None and again.resumed.step == done
        assert curve(again.wait(60)) == expected
        assert exported(runtime, tmp_path / "out") == weights


def test_peft_loads_a_checkpoint(base: Path, tmp_path: Path) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        start(runtime, tmp_path / "c").wait(60)
        tokens = runtime.encode("c then ")
        ours = runtime.generate(tokens, "fox", GREEDY).token_ids
    model = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "c" / "step-000010")).eval()
    out = model.generate(
        input_ids=torch.tensor([tokens]), max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True
    )
    assert out[0, len(tokens) :].tolist() == ours


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json")


@pytest.fixture(scope="module")
def stopped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two checkpoints of a run that was cancelled."""
    directory = tmp_path_factory.mktemp("stopped") / "c"
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, directory, checkpoint_every=1, checkpoints_to_keep=1000)
        while len(handle.history) < 6:
            runtime.stats()
        handle.cancel()
        handle.wait(60)
    for old in sorted(directory.glob("step-*"))[:-2]:
        shutil.rmtree(old)
    assert len(names(directory)) == 2
    return directory


@pytest.fixture
def runtime(base: Path) -> Any:
    with Runtime(str(base), config=CONFIG) as it:
        yield it
        it.check_integrity()


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flip", "truncate", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    runtime: Runtime, stopped: Path, tmp_path: Path, file: str, damage: Callable[[Path], object], caplog: Any
) -> None:
    directory = tmp_path / "c"
    shutil.copytree(stopped, directory)
    older, newer = names(directory)
    damage(directory / newer / file)
    handle = start(runtime, directory, resume=True)
    assert handle.resumed is not None and handle.resumed.path.name == older
    assert len(handle.resumed.skipped) == 1 and newer in handle.resumed.skipped[0]
    assert "set aside" in caplog.text and newer in caplog.text
    assert [n for n in names(directory) if n.startswith(f"damaged-{newer}")]
    assert [r.step for r in handle.wait(60)] == list(range(1, 11))


def test_with_every_checkpoint_damaged_nothing_is_begun_anew(runtime: Runtime, stopped: Path, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    shutil.copytree(stopped, directory)
    before = names(directory)
    for name in before:
        flip(directory / name / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"no good checkpoint.*optimizer\.safetensors"):
        start(runtime, directory, resume=True)
    assert names(directory) == before and runtime.adapters() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": replace(TRAINING, seed=4)}, r"training\.seed: now 4, then 3"),
        ({"training": replace(TRAINING, max_steps=12)}, r"training\.max_steps: now 12, then 10"),
        ({"lora": LoraSpec(r=2, alpha=8)}, r"lora\.r: now 2, then 4"),
        ({"data": DATA[:-1]}, r"data\.train"),
        ({"eval_data": DATA}, r"data\.evaluation"),
        ({"name": "dog"}, r"job\.name: now 'dog', then 'fox'"),
    ],
)
def test_another_job_is_refused_by_what_differs(
    runtime: Runtime, stopped: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    directory = tmp_path / "c"
    shutil.copytree(stopped, directory)
    with pytest.raises(ConfigError, match=message):
        start(runtime, directory, resume=True, **settings)
    start(runtime, directory, resume=True).wait(60)  # the directory was let go, and is as it was


def test_another_base_is_refused(stopped: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", "llama", seed=7)
    shutil.copytree(stopped, tmp_path / "c")
    with (
        Runtime(str(tmp_path / "other"), config=CONFIG) as runtime,
        pytest.raises(ConfigError, match=r"base\.fingerprint"),
    ):
        start(runtime, tmp_path / "c", resume=True)


def test_a_directory_with_checkpoints_is_not_begun_anew_by_accident(runtime: Runtime, stopped: Path) -> None:
    with pytest.raises(ConfigError, match="resume=True"):
        start(runtime, stopped)
    with pytest.raises(ConfigError, match="checkpoint_dir"):
        start(runtime, resume=True)
    with pytest.raises(ConfigError, match="checkpoint_every=0"):
        start(runtime, stopped, checkpoint_every=0)


def test_a_place_that_cannot_be_written_is_told_before_the_start(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match=r"checkpoint_dir=.*file"):
        start(runtime, tmp_path / "file")
    assert runtime.adapters() == []


def test_two_jobs_cannot_share_a_directory(runtime: Runtime, tmp_path: Path) -> None:
    first = start(runtime, tmp_path / "c", training=replace(TRAINING, max_steps=1000))
    with pytest.raises(ConfigError, match="another job"):
        start(runtime, tmp_path / "c", name="dog")
    first.cancel()
    first.wait(60)


def test_a_write_that_fails_is_told_and_the_job_goes_on(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _ = unbroken(Path(runtime._engine.base.loaded.source), tmp_path)

    def broken(path: Path, chunks: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("loquetier.training.checkpoint.write_file", broken)
    handle = start(runtime, tmp_path / "c")
    assert len(handle.wait(60)) == 10
    assert handle.checkpoint_errors and all("Input/output" in str(e) for e in handle.checkpoint_errors)
    assert names(tmp_path / "c") == []
    assert exported(runtime, tmp_path / "out") == weights


def test_publishing_rarely_is_taken_up_again(base: Path, tmp_path: Path) -> None:
    training = replace(TRAINING, publish="every_n_steps", publish_every=3)
    weights, expected = unbroken(base, tmp_path, training=training)
    broken_off(base, tmp_path / "c", after=5, training=training)
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, tmp_path / "c", resume=True, training=training)
        assert curve(handle.wait(60)) == expected
        assert exported(runtime, tmp_path / "out") == weights


def test_a_diverged_job_leaves_its_last_good_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, expected = unbroken(base, tmp_path)
    step = FinetuneJob.optimizer_step

    def poisoned(job: FinetuneJob) -> StepRecord:
        if job.num_steps >= 7:  # three skipped steps in a row fail the job
            job.optimizer.grad.fill_(float("nan"))
        return step(job)

    with monkeypatch.context() as patch, Runtime(str(base), config=CONFIG) as runtime:
        patch.setattr(FinetuneJob, "optimizer_step", poisoned)
        with pytest.raises(TrainingDivergedError):
            start(runtime, tmp_path / "c", checkpoint_every=1, checkpoints_to_keep=1000).wait(60)
    assert names(tmp_path / "c")[-1] <= "step-000007"
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = start(runtime, tmp_path / "c", resume=True)
        assert curve(handle.wait(60)) == expected
        assert exported(runtime, tmp_path / "out") == weights


def test_four_jobs_save_at_once(base: Path, tmp_path: Path) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        handles = [
            start(runtime, tmp_path / str(i), name=f"fox-{i}", lora=LoraSpec(r=2 + i), checkpoint_every=1)
            for i in range(4)
        ]
        for handle in handles:
            handle.wait(60)
            assert handle.checkpoint_errors == []
        runtime.check_integrity()
    assert all(names(tmp_path / str(i))[-1] == "step-000010" for i in range(4))
