"""Fresh LoRA weights, as PEFT makes them: A from Kaiming's uniform distribution, B zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from loquetier.adapters.spec import ModulePlan
from loquetier.kernels.reference import Factors


def initialize_slot(views: Mapping[int, Factors], modules: Iterable[ModulePlan], seed: int) -> None:
    """Fill a zeroed slot for training, deterministically from `seed`, whatever the dtype and device.

    ``kaiming_uniform_(a=sqrt(5))`` on A ``[r, in]`` is uniform in +-1/sqrt(in) (PEFT ``reset_lora_parameters``).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        bound = 1 / math.sqrt(module.target.in_features)
        view = views[module.target.index]
        drawn = torch.rand(view.a_RK.shape, generator=generator) * (2 * bound) - bound
        view.a_RK.copy_(drawn)
