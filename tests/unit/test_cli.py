"""The command line: exit codes, one-line errors, and a whole train-then-generate round on a tiny random base."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny

import loquetier.finetuning as finetuning
import loquetier.served as served
from loquetier.cli import main
from loquetier.doctor import report
from loquetier.errors import ConfigError
from loquetier.finetuning import FinetuneHandle
from loquetier.kernels.select import KERNELS, active_kernels
from loquetier.training.job import StepRecord


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("base")
    save_tiny(directory, "llama")
    return str(directory)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) + "\n" for n in range(8)))
    return path


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that fails."""
    assert exit_code(*argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def failure_at_end(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Everything on stderr of a command that fails after it has begun; its last line is the error."""
    assert exit_code(*argv) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error [") and "Traceback" not in err, err
    return err


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, loquetier.cli; assert not {'torch', 'transformers', 'rich.live'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_device_that_is_not_there_is_one_line(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "auto, cpu, cuda or cuda:N" in failure(capsys, "generate", "hi", "--base", base, "--device", "tpu")
    if not torch.cuda.is_available():
        assert "no CUDA device is visible" in failure(capsys, "generate", "hi", "--base", base, "--device", "cuda:1")


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "loquetier", "--version"], check=True, timeout=60, capture_output=True)
    assert run.stdout.startswith(b"loquetier ")


@pytest.mark.parametrize("command", ["demo", "generate", "finetune", "doctor", "serve", "bench"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "hi", "--adapter", "nodirectory"),
        ("generate", "hi", "--adapter", "a=x", "--adapter", "a=y"),
        ("generate", "hi", "--adapter", "a=x", "--adapter", "b=y"),
        ("generate", "hi", "--temperature", "warm"),
        ("generate", "hi", "--dtype", "int8"),
        ("finetune", "x.jsonl", "--name", "a", "--out", "b", "--start-from", "c", "--r", "4"),
        ("finetune", "x.jsonl", "--name", "a", "--out", "b", "--max-steps", "3", "--epochs", "2"),
        ("no-such-command",),
    ],
)
def test_usage_errors_exit_with_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_unknown_base_and_bad_values_are_one_line(capsys: pytest.CaptureFixture[str], base: str) -> None:
    assert "[base_not_found]" in failure(capsys, "generate", "hi", "--base", "no-such-base")
    # Checked before the base is loaded: the base does not exist, and yet the value is what is named.
    err = failure(capsys, "generate", "hi", "--base", "no-such-base", "--temperature", "-1")
    assert "[invalid_value]" in err and "--temperature -1.0" in err
    assert "[model_not_found]" in failure(capsys, "generate", "hi", "--base", base, "--model", "nobody")


def test_finetune_checks_everything_before_it_loads_the_base(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    def refused(*argv: str) -> str:
        return failure(capsys, "finetune", *argv, "--base", "no-such-base")

    out = str(tmp_path / "out")
    assert "cannot read" in refused("nowhere.jsonl", "--name", "a", "--out", out)
    assert "[adapter_exists]" in refused(str(data), "--name", "a", "--out", str(tmp_path))
    assert "is not a writable directory" in refused(str(data), "--name", "a", "--out", str(data / "x"))
    # Also for root, whom no permission bit stops, and before an hour of training.
    assert "cannot be written" in refused(str(data), "--name", "a", "--out", "/proc/out")
    assert "--learning-rate 2.0" in refused(str(data), "--name", "a", "--out", out, "--learning-rate", "2")
    assert "adapter name 'a b'" in refused(str(data), "--name", "a b", "--out", out)
    assert "--eval-data" in refused(str(data), "--name", "a", "--out", out, "--eval-every", "5")
    data.write_text('{"prompt": "x"\n')
    assert "line 1" in refused(str(data), "--name", "a", "--out", out)
    assert not Path(out).exists()


def test_train_then_generate_then_continue(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, base: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train = ("finetune", str(data), "--name", "plus", "--base", base, "--dtype", "float32", "--learning-rate", "1e-2")
    options = ("--max-steps", "12", "--r", "4", "--target-modules", "q_proj, v_proj", "--eval-data", str(data))
    assert exit_code(*train, *options, "--out", str(first)) == 0
    out = capsys.readouterr().out
    assert "12 of 12 steps" in out and "held-out: loss" in out
    assert json.loads((first / "adapter_config.json").read_text())["r"] == 4

    ask = ("generate", "3+1=", "--base", base, "--raw", "--max-tokens", "8", "--dtype", "float32")
    assert exit_code(*ask) == 0
    plain = capsys.readouterr().out
    assert exit_code(*ask, "--adapter", f"plus={first}") == 0
    assert capsys.readouterr().out != plain, "the one adapter that is loaded answers without --model"

    assert exit_code(*train, "--max-steps", "2", "--start-from", str(first), "--out", str(second)) == 0
    assert json.loads((second / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_the_options_of_a_job_reach_it(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, base: str
) -> None:
    files, out = tmp_path / "files", tmp_path / "out"
    train = ("finetune", str(data), "--name", "a", "--base", base, "--out", str(out), "--dtype", "float32")
    train += ("--eval-data", str(data), "--eval-every", "2", "--publish", "best", "--output-dir", str(files))
    train += ("--early-stopping-patience", "1", "--early-stopping-threshold", "1000", "--max-steps", "50")
    assert exit_code(*train, "--lora-dropout", "0.1", "--use-rslora", "--r", "2", "--batch-size", "4") == 0
    assert "ended after step 4: early stopping" in capsys.readouterr().out
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["lora_dropout"]) == (2, True, 0.1)
    assert len((files / "results.csv").read_text().splitlines()) == 5
    assert "[invalid_value]" in failure(capsys, *train[:7], str(tmp_path / "new"), "--report-to", "nobody")


def test_interrupted_training_writes_what_was_published(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finetuning.poll_steps

    def interrupted(handle: FinetuneHandle) -> Iterator[StepRecord]:
        yield next(iter(real(handle)))
        raise KeyboardInterrupt  # as Ctrl-C does, in the main thread

    monkeypatch.setattr(finetuning, "poll_steps", interrupted)
    out = tmp_path / "out"
    code = exit_code("finetune", str(data), "--name", "a", "--base", base, "--max-steps", "1000000", "--out", str(out))
    assert code == 130
    assert "did not finish" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").is_file()


def test_an_interrupted_training_goes_on_from_its_checkpoint(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("finetune", str(data), "--name", "a", "--base", base, "--max-steps", "40", "--dtype", "float32")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert exit_code(*train, "--out", str(whole)) == 0
    kept = ("--checkpoint-dir", str(tmp_path / "c"), "--checkpoint-every", "5")
    assert exit_code(*train, "--out", str(out), "--resume") == 2
    assert "--checkpoint-dir" in capsys.readouterr().err
    real = finetuning.poll_steps

    def interrupted(handle: FinetuneHandle) -> Iterator[StepRecord]:
        yield next(iter(real(handle, 0.01)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "poll_steps", interrupted)
        assert exit_code(*train, "--out", str(out), *kept, "--resume") == 130
    err = capsys.readouterr().err
    assert "no checkpoint yet" in err and "interrupted after step" in err and not out.exists()
    assert exit_code(*train, "--out", str(out), *kept) == 1
    assert "--resume" in capsys.readouterr().err
    assert exit_code(*train, "--out", str(out), *kept, "--resume") == 0, "the very same line"
    assert "resumed after step" in capsys.readouterr().err
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_full_disk_at_the_end_keeps_what_was_trained(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told before the first step where it can be, and waited for where it cannot."""
    train = ("finetune", str(data), "--name", "a", "--base", base, "--max-steps", "2", "--out", str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr("loquetier.storage.free_bytes", lambda _: 5000)
        err = failure_at_end(capsys, *train)
        assert "[insufficient_storage]" in err and "5000 are free" in err and "Trying again" not in err
    real, tries = served.write_adapter, []

    def full(*args: Any, **kwargs: Any) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(served, "write_adapter", full)
        patch.setattr("loquetier.storage.FIRST_WAIT", 0.01)
        assert exit_code(*train) == 0
    err = capsys.readouterr().err
    assert err.count("Trying again") == 2 and "bytes needed" in err
    assert len(tries) == 3 and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_nobody_waits_for_room_against_ctrl_c(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(served, "write_adapter", full)
    monkeypatch.setattr("loquetier.cli_finetune.time.sleep", interrupted)
    train = ("finetune", str(data), "--name", "a", "--base", base, "--max-steps", "2", "--out", str(tmp_path / "out"))
    assert "[insufficient_storage]" in failure_at_end(capsys, *train)
    assert not (tmp_path / "out").exists()


def test_doctor_names_machine_kernels_and_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("doctor") == 0
    out = capsys.readouterr().out
    for word in ("cores", "torch", "smlm_forward", "decode_attention", "smollm2-135m", "dtype", "KV cache"):
        assert word in out
    assert [title for title, _ in report()][:3] == ["Machine", "Software", "Kernels on cpu"]


def test_only_backends_that_exist_can_be_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(active_kernels({})) == set(KERNELS)
    assert "asks for it" in active_kernels({"LOQUETIER_KERNELS": "reference"})["smlm_forward"].reason
    with pytest.raises(ConfigError, match=r"'warp'.*reference"):
        active_kernels({"LOQUETIER_KERNELS": "warp"})
    monkeypatch.setenv("LOQUETIER_KERNELS", "warp")
    assert exit_code("doctor") == 1
    assert "[invalid_value]" in capsys.readouterr().err
