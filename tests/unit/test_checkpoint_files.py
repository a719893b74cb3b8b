"""The files of a checkpoint: what comes back, in which order they become durable, and what is left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loquetier.adapters import durable
from loquetier.adapters.arena import num_elements
from loquetier.adapters.spec import LinearTarget, LoraSpec, resolve_modules
from loquetier.config import TrainingConfig
from loquetier.errors import AdapterError, CheckpointError, ConfigError
from loquetier.training import checkpoint
from loquetier.training.checkpoint import JobIdentity, read_checkpoint, write_checkpoint
from loquetier.training.checkpoint_dir import CheckpointConfig, CheckpointDirectory
from loquetier.training.checkpoint_state import DataDigest
from loquetier.training.example import Example
from loquetier.training.job import EvalResult, JobImage, JobStatus, LossSum, StepRecord

TARGETS = tuple(LinearTarget(f"model.layers.{i}.self_attn.q_proj", i, 6, 4, i) for i in range(3))
SPEC = LoraSpec(
    r=2, alpha=0.1, rank_pattern={"layers.1.self_attn.q_proj": 3}, target_modules=("q_proj",), use_rslora=True
)
MODULES = resolve_modules(SPEC, TARGETS)
EXAMPLES = (Example((1, 2, 3), (False, True, True)), Example((1, 2), (False, True)))
DIGEST = DataDigest.of(EXAMPLES, EXAMPLES[:1])
RECORDS = (
    StepRecord(1, 0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, 7, 0.25, EvalResult(float("nan"), 0.5, 3)),
    StepRecord(2, 1e-17, 0.0, 0.0, 2.5, 7, 1e9, None),
)
IMAGE = JobImage(
    name="job",
    spec=SPEC,
    config=TrainingConfig(learning_rate=0.1, max_steps=5, batch_size=3),
    examples=EXAMPLES,
    eval_examples=EXAMPLES[:1],
    status=JobStatus.PAUSED,
    history=RECORDS,
    num_draws=3,
    todo=(1, 2),
    step_labels=4,
    step_rows=5,
    sums=LossSum(0.1, 2.0, 3),
    master=torch.randn(num_elements(MODULES), generator=torch.Generator().manual_seed(1)),
    grad=torch.randn(num_elements(MODULES), generator=torch.Generator().manual_seed(2)),
    moments={"step": torch.tensor(2.0), "exp_avg": torch.full((num_elements(MODULES),), 1e-45)},
)
IDENTITY = JobIdentity(name="job", spec=SPEC, config=IMAGE.config, data=DIGEST, base_fingerprint="f" * 64)


def write(directory: Path, image: JobImage = IMAGE, fail_point: Callable[[str], None] = lambda name: None) -> None:
    write_checkpoint(
        directory, image, MODULES, base_name="b", base_fingerprint="f" * 64, data=DIGEST, fail_point=fail_point
    )


def read(directory: Path) -> JobImage:
    return read_checkpoint(directory, TARGETS, IDENTITY, EXAMPLES, EXAMPLES[:1])[0]


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path / "c")
    back = read(tmp_path / "c")
    for name in ("master", "grad"):
        assert torch.equal(getattr(back, name), getattr(IMAGE, name))
    assert back.moments.keys() == IMAGE.moments.keys()
    assert all(torch.equal(back.moments[k], v) and back.moments[k].dtype == v.dtype for k, v in IMAGE.moments.items())
    rest = {f: getattr(back, f) for f in IMAGE.__slots__ if f not in ("master", "grad", "moments", "history")}
    assert rest == {f: getattr(IMAGE, f) for f in rest}
    assert repr(back.history) == repr(IMAGE.history)  # by text: NaN is not equal to itself


def test_the_same_state_gives_the_same_weights_file(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", read(tmp_path / "a"))
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_file_is_durable_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut may take is what was not synced: the order of the calls is the proof."""
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        calls.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".tmp")[0].lstrip("."))
        fsync(descriptor)

    def noted_rename(source: Any, target: Any) -> None:
        calls.append("rename " + Path(target).name.split(".tmp")[0].lstrip("."))
        rename(source, target)

    monkeypatch.setattr(durable.os, "fsync", noted_fsync)
    monkeypatch.setattr(checkpoint.os, "rename", noted_rename)
    write(tmp_path / "c")
    last = len(calls) - 1 - calls[::-1].index("rename c")
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"):
        assert calls.index(f"sync {name}") < last
    assert calls[last - 1] == "sync c", "the directory's entries, before it gets its name"
    assert calls[last + 1 :] == [f"sync {tmp_path.name}"]


@pytest.mark.parametrize("point", ["after_weights", "after_optimizer", "before_rename"])
def test_an_error_on_the_way_leaves_nothing_behind(tmp_path: Path, point: str) -> None:
    def full(name: str) -> None:
        if name == f"checkpoint.{point}":
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "c", fail_point=full)
    assert list(tmp_path.iterdir()) == []


def test_what_must_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="NaN"):
        write(tmp_path / "c", replace(IMAGE, master=torch.full_like(IMAGE.master, float("nan"))))
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "c")
    with pytest.raises(CheckpointError, match="exists"):
        write(tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"sha256": 1, "state": []}', b"[" * 100_000])
def test_a_state_that_is_none_is_damage(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "c")
    (tmp_path / "c" / "trainer_state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        read(tmp_path / "c")


def test_every_flipped_bit_of_the_state_is_noticed_or_harmless(tmp_path: Path) -> None:
    write(tmp_path / "c")
    path = tmp_path / "c" / "trainer_state.json"
    good, whole = path.read_bytes(), json.loads(path.read_bytes())
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        try:
            read(tmp_path / "c")
        except CheckpointError:
            continue
        assert json.loads(path.read_bytes()) == whole, f"byte {at}"  # white space became other white space


def test_a_later_format_is_refused_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        write(tmp_path / "c")
    with pytest.raises(CheckpointError, match="format 2; this version reads format 1"):
        read(tmp_path / "c")


def test_another_environment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = checkpoint.environment()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "environment", lambda: now | {"threads": 99})
        write(tmp_path / "c")
    different = read_checkpoint(tmp_path / "c", TARGETS, IDENTITY, EXAMPLES, EXAMPLES[:1])[1]
    assert different == [f"environment.threads: now {torch.get_num_threads()}, then 99"]


def test_digests_tell_data_apart() -> None:
    variants = [
        EXAMPLES,
        EXAMPLES[::-1],
        EXAMPLES[:1],
        (Example((1, 2, 3), (False, True, False)), EXAMPLES[1]),
        (Example((1, 2, 3, 1, 2), (False, True, True, False, True)),),
        (Example((1, 2, 4), (False, True, True)), EXAMPLES[1]),
    ]
    assert len({DataDigest.of(v, ()).train for v in variants}) == len(variants)


def test_names_leftovers_and_pruning(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    leftovers = [f".step-000003.tmp-{token}", f"..step-000003.tmp-{token}.tmp-{token}", f".step-1.old-{token}"]
    for name in (*leftovers, ".mine", "notes"):
        (tmp_path / name).mkdir()
    directory = CheckpointDirectory(CheckpointConfig(directory=tmp_path, keep=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".mine", "notes"]
    for step in (1, 999_999, 999_999, 1_000_000, 999_999):
        directory.add(step, Path.mkdir)
    assert [p.name for p in directory.checkpoints()] == ["step-999999.1", "step-999999.2", "step-1000000"]
    directory.close()
    with pytest.raises(ConfigError, match="step-1000000 is the newest"):
        CheckpointDirectory(CheckpointConfig(directory=tmp_path))
    CheckpointDirectory(CheckpointConfig(directory=tmp_path, resume=True)).close()  # the refusal let go of the lock


def test_what_is_held_stays_until_it_is_let_go(tmp_path: Path) -> None:
    directory = CheckpointDirectory(CheckpointConfig(directory=tmp_path, keep=1, are_held=True))
    steps = lambda: [int(path.name[5:]) for path in directory.checkpoints()]  # noqa: E731
    for step in (1, 2, 3):
        directory.add(step, Path.mkdir)
    directory.let_go(2)
    directory.let_go(1)  # told late: what was let go stays so
    assert steps() == [1, 2, 3]
    directory.add(4, Path.mkdir)
    assert steps() == [3, 4]
    directory.close()
    again = CheckpointDirectory(CheckpointConfig(directory=tmp_path, keep=1, are_held=True, resume=True))
    again.add(5, Path.mkdir)
    assert steps() == [3, 4, 5], "held anew: nobody has said that they are not needed"
    again.close()
