"""Every setting of a job can be asked for on the command line, and arrives as it was given."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loquetier.adapters.spec import LoraSpec
from loquetier.cli_options import LORA, TRAINING, with_options
from loquetier.config import TrainingConfig

VALUES: dict[str, tuple[list[str], Any]] = {
    "learning_rate": (["--learning-rate", "0.5"], 0.5),
    "lr_scheduler_type": (["--lr-scheduler", "cosine"], "cosine"),
    "warmup_ratio": (["--warmup-ratio", "0"], 0.0),
    "weight_decay": (["--weight-decay", "0.1"], 0.1),
    "adam_beta1": (["--adam-beta1", "0.8"], 0.8),
    "adam_beta2": (["--adam-beta2", "0.99"], 0.99),
    "adam_epsilon": (["--adam-epsilon", "1e-6"], 1e-6),
    "loraplus_lr_ratio": (["--loraplus-lr-ratio", "2"], 2.0),
    "max_grad_norm": (["--max-grad-norm", "0"], 0.0),
    "batch_size": (["--batch-size", "3"], 3),
    "gradient_accumulation_steps": (["--gradient-accumulation-steps", "2"], 2),
    "max_seq_len": (["--max-seq-len", "64"], 64),
    "num_epochs": (["--epochs", "2"], 2),
    "max_steps": (["--max-steps", "9"], 9),
    "shuffle": (["--no-shuffle"], False),
    "seed": (["--seed", "0"], 0),
    "publish": (["--publish", "every_n_steps"], "every_n_steps"),
    "publish_every": (["--publish-every", "4"], 4),
    "eval_every": (["--eval-every", "5"], 5),
    "early_stopping_patience": (["--early-stopping-patience", "3"], 3),
    "early_stopping_threshold": (["--early-stopping-threshold", "0.25"], 0.25),
    "r": (["--r", "4"], 4),
    "alpha": (["--alpha", "32"], 32.0),
    "dropout": (["--lora-dropout", "0.05"], 0.05),
    "target_modules": (["--target-modules", "q_proj, v_proj"], ("q_proj", "v_proj")),
    "exclude_modules": (["--exclude-modules", "k_proj"], ("k_proj",)),
    "use_rslora": (["--use-rslora"], True),
    "use_dora": (["--use-dora"], True),
    "rank_pattern": (["--rank-pattern", "q_proj=4", "--rank-pattern", "v=w=8"], {"q_proj": 4, "v=w": 8}),
    "alpha_pattern": (["--alpha-pattern", "q_proj=0.5"], {"q_proj": 0.5}),
    "layers_to_transform": (["--layers-to-transform", "0,2"], (0, 2)),
    "layers_pattern": (["--layers-pattern", "layers"], ("layers",)),
}


def arrived(*argv: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command with the options is given for these arguments."""
    got: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def command(training: dict[str, Any], lora: dict[str, Any]) -> None:
        got.append((training, lora))

    app = typer.Typer()
    app.command()(with_options(command))
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    return got[0]


def test_every_field_of_the_settings_has_a_flag() -> None:
    assert TRAINING.keys() == {f.name for f in dataclasses.fields(TrainingConfig)}
    assert LORA.keys() == {f.name for f in dataclasses.fields(LoraSpec)}


def test_every_flag_arrives_as_its_field_and_the_dataclasses_take_it() -> None:
    assert VALUES.keys() == TRAINING.keys() | LORA.keys()
    training, lora = arrived(*(part for argv, _ in VALUES.values() for part in argv))
    assert training | lora == {name: value for name, (_, value) in VALUES.items()}
    config, spec = TrainingConfig(**training), LoraSpec(**lora)
    assert (config.publish_every, config.shuffle, spec.rank_pattern) == (4, False, {"q_proj": 4, "v=w": 8})


def test_what_is_not_given_is_left_to_the_dataclasses() -> None:
    assert arrived() == ({}, {})
    assert arrived("--target-modules", "All-Linear", "--no-use-rslora") == (
        {},
        {"target_modules": "All-Linear", "use_rslora": False},
    )


@pytest.mark.parametrize(
    "argv", [("--rank-pattern", "q_proj"), ("--rank-pattern", "q_proj=x"), ("--layers-to-transform", "0,a")]
)
def test_a_malformed_value_is_a_usage_error_that_names_the_flag(argv: tuple[str, str]) -> None:
    app = typer.Typer()

    def command(training: dict[str, Any], lora: dict[str, Any]) -> None:
        raise AssertionError("must not run")

    app.command()(with_options(command))
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 2 and argv[0] in result.output
