"""Dataclass fields as options of a command: one line per field here, its type and default from the dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from loquetier.adapters.spec import ALL_LINEAR, LoraSpec
from loquetier.config import TrainingConfig


@dataclass(frozen=True, slots=True)
class Flag:
    """How a field is asked for on the command line."""

    help: str
    panel: str
    aliases: tuple[str, ...] = ()
    """More spellings, besides the field's name."""
    is_repeated_pair: bool = False
    """A mapping, given as KEY=NUMBER any number of times."""
    is_list: bool = False
    """Several values in one, with commas."""


_OPTIMIZER, _DATA, _SERVING, _EVALUATION = "Optimizer", "Data and length", "Publishing", "Evaluation"
_ADAPTER = "Adapter"

TRAINING: Mapping[str, Flag] = {
    "learning_rate": Flag("Peak learning rate.", _OPTIMIZER),
    "lr_scheduler_type": Flag("Shape after the warm-up.", _OPTIMIZER, ("--lr-scheduler",)),
    "warmup_ratio": Flag("Part of all steps that warm up.", _OPTIMIZER),
    "weight_decay": Flag("AdamW's decoupled weight decay.", _OPTIMIZER),
    "adam_beta1": Flag("AdamW's first decay rate.", _OPTIMIZER),
    "adam_beta2": Flag("AdamW's second decay rate.", _OPTIMIZER),
    "adam_epsilon": Flag("AdamW's epsilon.", _OPTIMIZER),
    "loraplus_lr_ratio": Flag("LoRA+: B learns at this many times the rate of A.", _OPTIMIZER),
    "max_grad_norm": Flag("Clip the gradient's norm; 0 = never.", _OPTIMIZER),
    "batch_size": Flag("Examples per micro-batch.", _DATA),
    "gradient_accumulation_steps": Flag("Micro-batches per optimizer step.", _DATA),
    "max_seq_len": Flag("Tokens after which an example is cut.", _DATA),
    "num_epochs": Flag("Passes over the data.", _DATA, ("--epochs",)),
    "max_steps": Flag("Optimizer steps, instead of --num-epochs.", _DATA),
    "shuffle": Flag("A new order each epoch.", _DATA),
    "seed": Flag("Seeds initial weights, data order and dropout.", _DATA),
    "publish": Flag("When the weights in training become what is served, and exported.", _SERVING),
    "publish_every": Flag("Steps between two publishes, with --publish every_n_steps.", _SERVING),
    "eval_every": Flag("Steps between evaluations; 0 = only after the last.", _EVALUATION),
    "early_stopping_patience": Flag("End after this many evaluations without improvement.", _EVALUATION),
    "early_stopping_threshold": Flag("What an improvement must be more than.", _EVALUATION),
}
"""One flag for every field of `TrainingConfig`."""

LORA: Mapping[str, Flag] = {
    "r": Flag("Rank.", _ADAPTER),
    "alpha": Flag("Scale is alpha/r.", _ADAPTER),
    "dropout": Flag("Dropout on the adapter's input in training.", _ADAPTER, ("--lora-dropout",)),
    "target_modules": Flag(f"{ALL_LINEAR}, or names with commas: q_proj,v_proj.", _ADAPTER, is_list=True),
    "exclude_modules": Flag("Names with commas.", _ADAPTER, is_list=True),
    "use_rslora": Flag("Scale by alpha/sqrt(r).", _ADAPTER),
    "use_dora": Flag("DoRA: a magnitude per row beside the factors.", _ADAPTER),
    "rank_pattern": Flag("Rank of the modules that match; repeatable.", _ADAPTER, is_repeated_pair=True),
    "alpha_pattern": Flag("Alpha of the modules that match; repeatable.", _ADAPTER, is_repeated_pair=True),
    "layers_to_transform": Flag("Layer numbers with commas.", _ADAPTER, is_list=True),
    "layers_pattern": Flag("Names of the lists that hold the layers, with commas.", _ADAPTER, is_list=True),
}
"""One flag for every field of `LoraSpec`."""

DEFAULT_URL = "http://127.0.0.1:8000"
UrlOption = Annotated[str, typer.Option("--url", envvar="LOQUETIER_URL", help="Where the server listens.")]
KeyOption = Annotated[
    str | None,
    typer.Option("--api-key", envvar="LOQUETIER_API_KEY", help="Better in the variable: others see command lines."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")]
"""What every command has that talks to a server."""

Command = Callable[..., None]


def with_options(command: Command, defaults: Mapping[str, str] | None = None) -> Command:
    """Give `command` an option for each field; it gets what was given as two mappings, `training` and `lora`.

    What was not given is not in the mappings: the dataclasses own their defaults. `defaults` says for some fields
    what the help shows instead, where somebody else decides.
    """
    shown = defaults or {}
    own = {
        name: parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name not in ("training", "lora")
    }
    groups = {"training": _parameters(TrainingConfig, TRAINING, shown), "lora": _parameters(LoraSpec, LORA, shown)}

    def run(**values: Any) -> None:
        given: dict[str, dict[str, Any]] = {"training": {}, "lora": {}}
        for group, flags in (("training", TRAINING), ("lora", LORA)):
            for name, flag in flags.items():
                value = values.pop(name)
                if value not in (None, []):
                    given[group][name] = _value(flag, name, value)
        command(**values, **given)

    parameters = [*own.values(), *(p for group in groups.values() for p in group.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def spelled(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def _parameters(kind: type, flags: Mapping[str, Flag], shown: Mapping[str, str]) -> dict[str, inspect.Parameter]:
    types = get_type_hints(kind)
    return {
        f.name: inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _type(types[f.name], flags[f.name]),
                _option(f.name, flags[f.name], shown.get(f.name, f.default)),
            ],
        )
        for f in fields(kind)
        if f.name in flags
    }


def _type(hint: Any, flag: Flag) -> Any:
    """What typer shall parse: None stands for "not given"."""
    if flag.is_repeated_pair:
        return list[str] | None
    return str | None if flag.is_list else hint | None


def _option(name: str, flag: Flag, default: object) -> Any:
    spellings = [spelled(name), *flag.aliases]
    if isinstance(default, bool):
        spellings = [f"{s}/--no-{s.removeprefix('--')}" for s in spellings]
    shown = default if default not in (None, (), MISSING) else False
    return typer.Option(
        *spellings,
        help=flag.help,
        rich_help_panel=flag.panel,
        show_default=str(shown) if shown is not False or isinstance(default, bool) else False,
        metavar="PATTERN=NUMBER" if flag.is_repeated_pair else None,
    )


def _value(flag: Flag, name: str, given: Any) -> Any:
    """What the dataclass takes."""
    if flag.is_repeated_pair:
        return dict(_pair(name, text) for text in given)
    if not flag.is_list:
        return given
    if name == "target_modules" and given.lower() == ALL_LINEAR:
        return given
    parts = tuple(part.strip() for part in given.split(","))
    return tuple(_number(name, part) for part in parts) if name == "layers_to_transform" else parts


def _pair(name: str, text: str) -> tuple[str, float]:
    pattern, equals, number = text.rpartition("=")
    if not (pattern and equals):
        raise typer.BadParameter(f"{text!r} is not PATTERN=NUMBER", param_hint=spelled(name))
    try:
        return pattern, int(number) if name == "rank_pattern" else float(number)
    except ValueError:
        raise typer.BadParameter(f"{number!r} is not a number", param_hint=spelled(name)) from None


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number", param_hint=spelled(name)) from None
