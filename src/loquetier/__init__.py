"""Loquetier: one frozen base model, many LoRA adapters, served and trained in the same forward pass.

Public names are loaded on first use: ``import loquetier`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loquetier.adapters.methods.ia3 import IA3Spec as IA3Spec
    from loquetier.adapters.spec import LoraSpec as LoraSpec
    from loquetier.config import EngineConfig as EngineConfig
    from loquetier.config import SamplingParams as SamplingParams
    from loquetier.config import TrainingConfig as TrainingConfig
    from loquetier.errors import LoquetierError as LoquetierError
    from loquetier.runtime import Runtime as Runtime

__version__ = "0.1.0"

_HOME_OF = {
    "EngineConfig": "loquetier.config",
    "IA3Spec": "loquetier.adapters.methods.ia3",
    "LoquetierError": "loquetier.errors",
    "LoraSpec": "loquetier.adapters.spec",
    "Runtime": "loquetier.runtime",
    "SamplingParams": "loquetier.config",
    "TrainingConfig": "loquetier.config",
}

__all__ = [
    "EngineConfig",
    "IA3Spec",
    "LoquetierError",
    "LoraSpec",
    "Runtime",
    "SamplingParams",
    "TrainingConfig",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("loquetier.errors")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'loquetier' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
