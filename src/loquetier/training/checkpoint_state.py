"""A job's image as JSON and back, but for its tensors and its examples. Numbers come back bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
from torch import Tensor

from loquetier.adapters.methods import find_method
from loquetier.adapters.spec import LORA, AdapterSpec, LoraSpec
from loquetier.config import TrainingConfig
from loquetier.errors import CheckpointError, LoquetierError
from loquetier.training.example import Example
from loquetier.training.job import EvalResult, JobImage, JobStatus, LossSum, StepRecord

_ELSEWHERE: Final = frozenset({"examples", "eval_examples", "master", "grad", "moments"})
"""Fields of `JobImage` that are data, which the caller brings, or tensors."""


@dataclass(frozen=True, slots=True)
class DataDigest:
    """Tells data sets apart: sha256 (hex) over the encoded examples, in their order."""

    train: str
    evaluation: str

    @classmethod
    def of(cls, examples: Sequence[Example], eval_examples: Sequence[Example]) -> DataDigest:
        """The digests of a job's data."""
        return cls(_digest(examples), _digest(eval_examples))


def _digest(examples: Sequence[Example]) -> str:
    sha256 = hashlib.sha256()
    for example in examples:
        # Lengths and fixed widths: no two lists of examples give the same bytes.
        sha256.update(len(example.tokens).to_bytes(8, "little"))
        sha256.update(np.asarray(example.tokens, dtype="<i8").tobytes())
        sha256.update(np.asarray(example.learn, dtype=bool).tobytes())
    return sha256.hexdigest()


def encode_image(image: JobImage) -> dict[str, Any]:
    """Everything of an image that is neither a tensor nor an example, as plain JSON values."""
    state = {f.name: getattr(image, f.name) for f in fields(image) if f.name not in _ELSEWHERE}
    state |= {
        "spec": encode_spec(image.spec),
        "config": asdict(image.config),
        "status": image.status.value,
        "history": [asdict(record) for record in image.history],
        "sums": asdict(image.sums),
    }
    plain: dict[str, Any] = _plain(state)
    return plain


def decode_image(
    state: Mapping[str, Any],
    *,
    examples: tuple[Example, ...],
    eval_examples: tuple[Example, ...],
    master: Tensor,
    grad: Tensor,
    moments: dict[str, Tensor],
) -> JobImage:
    """The image that `encode_image` was given.

    Raises:
        CheckpointError: a field is missing, unknown or of the wrong kind: another version of this program wrote it.
    """
    try:
        known = dict(state) | {
            "spec": decode_spec(state["spec"]),
            "config": TrainingConfig(**state["config"]),
            "status": JobStatus(state["status"]),
            "history": tuple(_record(record) for record in state["history"]),
            "todo": tuple(state["todo"]),
            "sums": LossSum(**_numbers(state["sums"])),
        }
        return JobImage(
            **known, examples=examples, eval_examples=eval_examples, master=master, grad=grad, moments=moments
        )
    except (KeyError, TypeError, ValueError, AttributeError, LoquetierError) as error:
        raise CheckpointError(f"its state is not one that this version reads ({error})") from error


def encode_spec(spec: AdapterSpec) -> dict[str, Any]:
    """A spec's fields, and its method where they are not LoRA's (or DoRA's, which has a field to say so)."""
    named = {} if isinstance(spec, LoraSpec) else {"method": spec.method}
    return {**named, **asdict(spec)}


def decode_spec(state: Mapping[str, Any]) -> AdapterSpec:
    """A spec from its JSON form, whose lists were tuples.

    Raises:
        CheckpointError: of a method or with a field that this version does not know.
    """
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in state.items()}
    name = values.pop("method", LORA)
    method = find_method(name)
    if method is None:
        raise CheckpointError(f"its adapter is of method {name!r}, which this version does not have")
    try:
        spec: AdapterSpec = method.spec_type(**values)
    except (TypeError, LoquetierError) as error:
        raise CheckpointError(f"its spec is not one that this version reads ({error})") from error
    return spec


def canonical(value: object) -> bytes:
    """One spelling of JSON for each value, to hash."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def differences(name: str, wanted: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    """One line for each field that two settings do not share, for example ``training.seed: now 1, then 0``."""
    missing = "(not set)"
    return [
        f"{name}.{key}: now {wanted.get(key, missing)!r}, then {held.get(key, missing)!r}"
        for key in sorted(wanted.keys() | held.keys())
        if _plain(wanted.get(key, missing)) != _plain(held.get(key, missing))
    ]


def _record(state: Mapping[str, Any]) -> StepRecord:
    numbers = _numbers({key: value for key, value in state.items() if key != "evaluation"})
    evaluation = state["evaluation"]
    return StepRecord(**numbers, evaluation=None if evaluation is None else EvalResult(**_numbers(evaluation)))


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if isinstance(value, str) else value for key, value in state.items()}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings, which `_numbers` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
