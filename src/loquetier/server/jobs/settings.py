"""What a job was asked to do, and what "auto" in it means: pure functions from a body and the data's size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.errors import ConfigError
from loquetier.server.problems import bad, unsupported
from loquetier.server.schemas.jobs import CreateJob, Hyperparameters, LoraOptions, TrainingOptions

BASE_RATE: Final = 2e-4
"""Learning rate at a multiplier of 1."""
_EPOCHS, _MIN_EXAMPLES, _MAX_EXAMPLES, _MOST_EPOCHS = 3, 100, 25_000, 25
"""As OpenAI's published estimate: 3 epochs, more for less than 100 examples in all, fewer for more than 25,000."""
_MOST_BATCH: Final = 8
_CHECKPOINT_EVERY: Final = 50
_TUPLES: Final = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_PAIRS: Final = (("batch_size", "batch_size"), ("n_epochs", "num_epochs"))
"""(hyperparameter, field of `training`) that say the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """What the engine runs."""

    spec: LoraSpec
    training: TrainingConfig
    checkpoint_every: int


def asked(body: CreateJob) -> dict[str, Any]:
    """The settings of a request as JSON, checked as far as that goes without the data.

    Raises:
        ApiError: 400 with the field for what is refused or contradicts itself.
    """
    for name in body.model_extra or {}:  # a setting one level too high would be ignored without a word
        for where, options in (("lora", LoraOptions), ("training", TrainingOptions)):
            if name in options.model_fields:
                raise bad(f"{name} belongs into {where!r}, as {where}.{name}", name, "invalid_value")
    if body.integrations:
        raise unsupported("integrations", "; events, metrics and the result file have the same numbers")
    if body.method is not None and body.method.type != "supervised":
        raise unsupported("method.type", f": {body.method.type!r}; only 'supervised' is")
    chosen = body.hyperparameters or Hyperparameters()
    if body.method is not None and body.method.supervised is not None:
        chosen = body.method.supervised.hyperparameters or chosen
    hyper = {name: value if value is not None else "auto" for name, value in chosen.model_dump().items()}
    hyper = {name: hyper[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
    training = {} if body.training is None else body.training.model_dump(exclude_none=True)
    lora = {} if body.lora is None else body.lora.model_dump(exclude_none=True)
    for name, field in _PAIRS:
        if field in training and hyper[name] not in ("auto", training[field]):
            raise bad(f"training.{field} and {name} are both given and differ", f"training.{field}", "invalid_value")
    if "learning_rate" in training and hyper["learning_rate_multiplier"] != "auto":
        raise bad(
            f"training.learning_rate and learning_rate_multiplier (times {BASE_RATE:g}) are both given; give one",
            "training.learning_rate",
            "invalid_value",
        )
    if training.get("eval_every") and body.validation_file is None:
        raise bad("training.eval_every needs a validation_file", "training.eval_every", "invalid_value")
    lora_seed = lora.pop("seed", None)
    if None not in (lora_seed, body.seed) and lora_seed != body.seed:
        raise bad("lora.seed and seed are both given and differ; there is one seed", "lora.seed", "invalid_value")
    seed = body.seed if body.seed is not None else lora_seed
    settings = {"hyperparameters": hyper, "lora": lora, "training": training, "seed": seed or 0}
    _check(settings, body.validation_file is not None)
    return settings


def _check(settings: Mapping[str, Any], has_validation: bool) -> None:
    try:
        spec = LoraSpec(**_spec_fields(settings["lora"]))
    except ConfigError as error:
        raise _named(error, "lora") from error
    try:
        training = _config({**settings, "hyperparameters": numbers(settings, 100)})
    except ConfigError as error:
        raise _named(error, "training") from error
    del spec
    for name, value in training.evaluation_users:
        if not has_validation:
            raise bad(f"training.{name}={value!r} needs a validation_file", f"training.{name}", "invalid_value")


def _named(error: ConfigError, where: str) -> Exception:
    found = re.match(r"\w+", str(error))
    return bad(f"{where}.{error}"[:1000], f"{where}.{found[0]}" if found else where, "invalid_value")


def numbers(settings: Mapping[str, Any], num_examples: int) -> dict[str, Any]:
    """The three hyperparameters without "auto", for a training file of so many examples."""
    hyper, training = dict(settings["hyperparameters"]), settings["training"]
    epochs = _EPOCHS
    if num_examples * epochs < _MIN_EXAMPLES:
        epochs = min(_MOST_EPOCHS, -(-_MIN_EXAMPLES // max(1, num_examples)))
    elif num_examples * epochs > _MAX_EXAMPLES:
        epochs = max(1, _MAX_EXAMPLES // num_examples)
    # Small sets get more than a step or two an epoch.
    batch = min(_MOST_BATCH, max(1, num_examples // 8))
    rate = training.get("learning_rate", BASE_RATE) / BASE_RATE
    automatic = {
        "n_epochs": training.get("num_epochs", epochs),
        "batch_size": training.get("batch_size", batch),
        "learning_rate_multiplier": rate,
    }
    return {name: automatic[name] if value == "auto" else value for name, value in hyper.items()}


def resolve(settings: Mapping[str, Any], num_examples: int) -> dict[str, Any]:
    """`settings` with a number for every "auto", and all fields of `lora` and `training` that the job will have."""
    found = {**settings, "hyperparameters": numbers(settings, num_examples), "is_resolved": True}
    ready = resolved(found)
    training = asdict(ready.training) | {"checkpoint_every": ready.checkpoint_every}
    del training["seed"]
    return found | {"lora": asdict(ready.spec), "training": training}


def resolved(settings: Mapping[str, Any]) -> Resolved:
    """The engine's settings, the same in every life of the job. Raises ConfigError."""
    return Resolved(
        spec=LoraSpec(**_spec_fields(settings["lora"])),
        training=_config(settings),
        checkpoint_every=settings["training"].get("checkpoint_every", _CHECKPOINT_EVERY),
    )


def _config(settings: Mapping[str, Any]) -> TrainingConfig:
    hyper, training = settings["hyperparameters"], dict(settings["training"])
    training.pop("checkpoint_every", None)
    training |= {"batch_size": hyper["batch_size"], "num_epochs": hyper["n_epochs"], "seed": settings["seed"]}
    training.setdefault("learning_rate", BASE_RATE * hyper["learning_rate_multiplier"])
    return TrainingConfig(**training)


def _spec_fields(lora: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where a spec has tuples."""
    return {k: tuple(v) if k in _TUPLES and isinstance(v, list) else v for k, v in lora.items()}


def total_steps(ready: Resolved, num_examples: int) -> int:
    """Optimizer steps at most."""
    per_step = ready.training.batch_size * ready.training.gradient_accumulation_steps
    return ready.training.max_steps or ready.training.num_epochs * -(-num_examples // per_step)
