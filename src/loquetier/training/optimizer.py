"""One job's optimizer: float32 master weights, gradients and Adam moments, flat, in the arena's slot layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loquetier.adapters.arena import factor_views, num_a_elements, num_elements
from loquetier.adapters.spec import ModulePlan
from loquetier.config import TrainingConfig
from loquetier.errors import ConfigError


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (0-based), as transformers' schedulers of the same names compute it."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    left = max(1, total_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, (total_steps - step) / left)
    return config.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / left)))


def check_ratio(config: TrainingConfig, modules: tuple[ModulePlan, ...]) -> None:
    """Refuse LoRA+ for a method without a part that learns faster. Raises ConfigError."""
    ratio = config.loraplus_lr_ratio
    if ratio is not None and num_a_elements(modules) == num_elements(modules):
        raise ConfigError(
            f"loraplus_lr_ratio={ratio}: {modules[0].method} has no B that could learn faster; leave it out"
        )


class AdapterOptimizer:
    """AdamW (arXiv 1711.05101) over one adapter, with the job's own clipping and schedule.

    Args:
        weights: flat working copy in the arena, ``[num_elements]``, compute dtype; the forward reads it. When it is
            float32 it is the master itself, otherwise a float32 master is kept and cast into it after each step.
        modules: the slot's layout.
    """

    def __init__(self, weights: Tensor, modules: tuple[ModulePlan, ...], config: TrainingConfig) -> None:
        assert weights.numel() == num_elements(modules)
        self._working = weights
        self.master = weights if weights.dtype == torch.float32 else weights.float()
        self.grad = torch.zeros_like(self.master)
        self.grad_views: dict[int, Any] = factor_views(self.grad, modules)
        self._config = config
        ratio = config.loraplus_lr_ratio
        # LoRA+: A's part of the slot and the rest are two parameters; the flat tensors stay what everybody else sees.
        check_ratio(config, modules)
        border = None if ratio is None else num_a_elements(modules)
        self._parts = [slice(None)] if border is None else [slice(border), slice(border, None)]
        self._ratios = [1.0] if ratio is None else [1.0, ratio]
        # Views of the master rather than itself, so that it keeps no reference to the gradient.
        self._params = [self.master[part] for part in self._parts]
        for param, part in zip(self._params, self._parts, strict=True):
            param.grad = self.grad[part]
        self._adam = torch.optim.AdamW(
            [{"params": [param]} for param in self._params],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, lr: float) -> float:
        """Clip, update, zero the gradient; returns the global gradient norm before clipping.

        A norm that is not finite changes nothing but the gradient, which is zeroed: the caller decides.
        """
        norm = float(torch.linalg.vector_norm(self.grad))
        if math.isfinite(norm):
            limit = self._config.max_grad_norm
            if limit > 0 and norm > limit:
                self.grad.mul_(limit / (norm + 1e-6))  # 1e-6: as torch.nn.utils.clip_grad_norm_
            for group, ratio in zip(self._adam.param_groups, self._ratios, strict=True):
                group["lr"] = lr * ratio
            self._adam.step()
            if self._working is not self.master:
                self._working.copy_(self.master)
        self.grad.zero_()
        return norm

    def drop_gradient(self) -> float:
        """Zero the gradient without an update; returns NaN, the norm of what was not looked at."""
        self.grad.zero_()
        return math.nan

    def state(self) -> dict[str, Tensor]:
        """Moments ``[num_elements]`` in slot layout and step count; empty before the first step. Copy to keep them."""
        states = [self._adam.state.get(param, {}) for param in self._params]
        if len(states) == 1:
            return dict(states[0])
        # The step count is a scalar and the same in both parts.
        return {name: torch.cat([s[name] for s in states]) if t.dim() else t for name, t in states[0].items()}

    def load_state(self, master: Tensor, state: dict[str, Tensor]) -> None:
        """Continue from another optimizer's master weights and `state`, bit for bit."""
        with torch.no_grad():
            self.master.copy_(master)
            if self._working is not self.master:
                self._working.copy_(self.master)
        for param, part in zip(self._params, self._parts, strict=True):
            self._adam.state[param] = {
                name: (tensor[part] if tensor.dim() else tensor).clone().to(self.master.device)
                for name, tensor in state.items()
            }
