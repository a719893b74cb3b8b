"""Errors name the options of the command that was run."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from tests.unit.test_cli import failure

from loquetier.adapters.peft_write import check_place
from loquetier.cli import app
from loquetier.cli_words import command_of, in_words_of
from loquetier.config import TrainingConfig
from loquetier.errors import AdapterExistsError, ConfigError

ROOT = typer.main.get_command(app)


@pytest.mark.parametrize(
    ("line", "message", "said"),
    [
        ("finetune x", "r=0: must be positive", "--r 0: must be positive"),
        ("finetune x", "Lower max_seq_len, batch_size or r.", "Lower --max-seq-len, --batch-size or --r."),
        ("finetune x", "adapter_memory=1048576 (1.0 MiB)", "--adapter-memory 1048576 (1.0 MiB)"),
        ("finetune x", "EngineConfig.keep_versions (now 2)", "--keep-versions (now 2)"),
        ("finetune x", "resume=True needs the checkpoint_dir", "--resume needs the --checkpoint-dir"),
        ("finetune x", "with shuffle=False it", "with --no-shuffle it"),
        ("finetune x", "job 'max_seq_len' and \"r=3\" stay", "job 'max_seq_len' and \"r=3\" stay"),
        ("finetune x", "a/b.max_steps and x_max_steps stay", "a/b.max_steps and x_max_steps stay"),
        ("finetune x", "publish at the end, a name, the seed", "publish at the end, a name, the seed"),
        ("finetune x", "target_modules='q proj': no", "--target-modules 'q proj': no"),
        ("adapters load a b", "exists; or say load_inplace=true", "exists; or say --replace"),
        ("adapters load a b", "set 'load_inplace' to True.", "give --replace."),
        ("adapters load a b", "pass load_inplace=True", "pass --replace"),
        ("adapters export a b", "pass overwrite=True", "pass --overwrite"),
        ("jobs create", "training.max_seq_len=5000: too long", "--max-seq-len 5000: too long"),
        ("jobs create", "lora: lower r or lora.alpha=3", "lora: lower --r or --alpha 3"),
        ("serve b", "raise kv_memory or max_rows", "raise --kv-memory or max_rows"),
        ("adapters", "r=3 and overwrite=True", "r=3 and overwrite=True"),
    ],
)
def test_options_in_place_of_fields(line: str, message: str, said: str) -> None:
    assert in_words_of(command_of(ROOT, line.split()), message) == said


def test_the_errors_themselves(tmp_path: Path) -> None:
    """What is raised today still has the form that is understood."""
    with pytest.raises(AdapterExistsError) as exists:
        check_place(tmp_path, False)
    said = in_words_of(command_of(ROOT, ["adapters", "export"]), str(exists.value))
    assert said == f"{str(tmp_path)!r} exists; choose another directory or pass --overwrite"
    with pytest.raises(ConfigError) as wrong:
        TrainingConfig(warmup_ratio=2.0)
    assert in_words_of(command_of(ROOT, ["finetune"]), str(wrong.value)).startswith("--warmup-ratio 2.0")


def test_a_command_that_fails_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "finetune", "x.jsonl", "--name", "a", "--out", str(tmp_path / "o"), "--publish-every", "3")
    assert "--publish-every 3" in said and "publish_every" not in said, said
