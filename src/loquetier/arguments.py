"""What callers of the Python API hand in, checked and brought into one form before the engine sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loquetier.adapters.spec import AdapterSpec, LoraSpec
from loquetier.errors import ConfigError, DataError
from loquetier.training.checkpoint_dir import CheckpointConfig
from loquetier.training.data import render_chat
from loquetier.training.files import read_records

T = TypeVar("T")

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages (rendered through the model's own template)."""
Data = str | os.PathLike[str] | Sequence[Mapping[str, Any]]
"""Records, or the path of a file of them: JSON lines, .json, .csv or .parquet, also compressed."""


def encode_prompt(prompt: Prompt, tokenizer: Any, base_name: str) -> list[int]:
    """Token ids of a prompt; errors as `Runtime.encode`."""
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise ConfigError(
            f"prompt is {type(prompt).__name__}: must be a string, a list of token ids, or a list of chat messages"
        )
    if not isinstance(prompt, str) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        return [int(t) for t in prompt]  # type: ignore[arg-type]
    if tokenizer is None:
        raise ConfigError(f"base {base_name!r} has no tokenizer; give token ids instead of text")
    if isinstance(prompt, str):
        try:
            return list(tokenizer(prompt)["input_ids"])
        except (UnicodeError, TypeError) as error:  # a lone surrogate is not text
            raise ConfigError(f"prompt is not valid Unicode text: {error}") from error
    if not all(isinstance(m, Mapping) for m in prompt):
        raise ConfigError("prompt must be a string, a list of token ids, or a list of chat messages")
    if tokenizer.chat_template is None:
        raise ConfigError(f"base {base_name!r} has no chat template; give the prompt as text")
    return render_chat(tokenizer, prompt, add_generation_prompt=True)  # type: ignore[arg-type]


def given(value: T | None, kind: type[T], name: str) -> T | None:
    """`value` if it is None or what it should be; a dictionary in its place would be silently ignored otherwise."""
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name} is {type(value).__name__}: must be {kind.__name__}, or None for its defaults")
    return value


def given_spec(lora: LoraSpec | None, spec: AdapterSpec | None) -> AdapterSpec | None:
    """The settings of the adapter to train, from whichever argument has them; None for neither.

    Raises:
        ConfigError: both, or something that is no spec.
    """
    if lora is not None and spec is not None:
        raise ConfigError("lora and spec are both given: spec is for any method, lora for LoRA and DoRA; give one")
    if spec is None:
        return given(lora, LoraSpec, "lora")
    if isinstance(spec, type) or not isinstance(spec, AdapterSpec):
        raise ConfigError(f"spec is {type(spec).__name__}: must be a LoraSpec, an IA3Spec, or None for the defaults")
    return spec


def checkpoint_config(
    directory: str | os.PathLike[str] | None, every: int, keep: int, resume: bool, are_held: bool
) -> CheckpointConfig | None:
    """Where and how often to save; None = never. Raises ConfigError where the settings contradict each other."""
    if directory is None:
        if resume:
            raise ConfigError("resume=True needs the checkpoint_dir to go on from")
        if are_held:
            raise ConfigError("hold_checkpoints=True needs the checkpoint_dir whose checkpoints are held")
        return None
    return CheckpointConfig(directory=path_of(directory), every=every, keep=keep, resume=resume, are_held=are_held)


def path_of(directory: str | os.PathLike[str]) -> Path:
    """A path, or ConfigError for what is none."""
    if not isinstance(directory, (str, os.PathLike)):
        raise ConfigError(f"directory is {type(directory).__name__}: must be a path")
    return Path(directory)


def records_of(data: Data) -> Sequence[Mapping[str, Any]]:
    """The records themselves, read from a file if `data` names one. Raises DataError."""
    if isinstance(data, (str, os.PathLike)):
        return read_records(Path(data))
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise DataError(f"data is {type(data).__name__}: must be a list of records or the path of a file")
    return data
