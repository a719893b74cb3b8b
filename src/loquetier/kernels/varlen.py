"""Causal attention over sequences packed behind each other, by torch's flash attention on a GPU: train and eval rows.

`torch.nn.attention.varlen.varlen_attn` has changed its arguments with each release (2.10: `is_causal`; 2.12 and later:
`window_size`, `scale`, `enable_gqa`). What this torch's version takes is read from its signature, and what it does not
take is done here (scale, repeated kv heads) or left to SDPA, a sequence at a time (window, softcap).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from loquetier.kernels.attention import MaskRule, span_attention
from loquetier.kernels.transfer import to_device

TYPES: Final = (torch.bfloat16, torch.float16)
LARGEST_HEAD: Final = 256
"""Elements per head that flash attention takes, in multiples of 8."""


@dataclass(frozen=True, slots=True)
class Varlen:
    """One release's function, and what it can be told."""

    function: Callable[..., Any]
    names: frozenset[str]

    def takes(self, rule: MaskRule) -> bool:
        """Whether it can hide what this rule hides."""
        return rule.softcap is None and (rule.window is None or "window_size" in self.names)

    def __call__(
        self,
        q_HTD: Tensor,
        k_KPD: Tensor,
        v_KPD: Tensor,
        lengths: Sequence[tuple[int, int]],
        scale: float,
        rule: MaskRule,
    ) -> Tensor:
        """``[H, T, D]``, differentiable; sequence i's queries are the last of its positions.

        Args:
            q_HTD: the sequences' queries behind each other; k_KPD, v_KPD: their keys and values.
            lengths: queries and keys of each sequence.
        """
        q_THD, k_PKD, v_PKD = (x.transpose(0, 1) for x in (q_HTD, k_KPD, v_KPD))
        options: dict[str, Any] = {}
        if "window_size" in self.names:  # keys to the left beside one's own
            options["window_size"] = (-1 if rule.window is None else rule.window - 1, 0)
        else:
            options["is_causal"] = True
        if "enable_gqa" in self.names:
            options["enable_gqa"] = True
        else:
            groups = q_HTD.shape[0] // k_KPD.shape[0]
            k_PKD, v_PKD = (x.repeat_interleave(groups, dim=1) for x in (k_PKD, v_PKD))
        if "scale" in self.names:
            options["scale"] = scale
        else:
            q_THD = q_THD * (scale * math.sqrt(q_THD.shape[-1]))
        cumulative = [_cumulative(tuple(pair[i] for pair in lengths), q_HTD.device) for i in range(2)]
        longest = [max(pair[i] for pair in lengths) for i in range(2)]
        out: Tensor = self.function(q_THD, k_PKD, v_PKD, *cumulative, *longest, **options)
        return out.transpose(0, 1)


@lru_cache(maxsize=4)
def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 ``[0, l0, l0 + l1, ...]``, sent once per step: its layers ask for the same one."""
    return to_device(np.fromiter(accumulate(lengths, initial=0), dtype=np.int32), device)


def adapted(function: Callable[..., Any]) -> Varlen | None:
    """`function` if it is a form of varlen attention that can be causal, else None."""
    names = frozenset(inspect.signature(function).parameters)
    return Varlen(function, names) if names & {"window_size", "is_causal"} else None


def of_this_torch() -> Varlen | None:
    """What this torch has; None before 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return adapted(varlen_attn)


def is_absent(device: torch.device) -> bool:
    """Whether there is nothing to check: no GPU, or a torch without packed attention."""
    return device.type != "cuda" or of_this_torch() is None


def why_not(device: torch.device) -> str | None:
    """Why packed attention cannot run on this device, or disagrees with SDPA there; None when it may run."""
    if device.type != "cuda":
        return "torch's packed attention needs a GPU"
    varlen = of_this_torch()
    if varlen is None:
        return f"torch {torch.__version__} has no packed attention"
    try:
        return disagreement(varlen, device)
    except Exception as error:  # an old GPU, another signature, a driver: they share no type
        return f"torch's packed attention fails with {type(error).__name__}: {error}"


def disagreement(varlen: Varlen, device: torch.device) -> str | None:
    """Forward and backward against a sequence at a time, grouped queries, one sequence with earlier keys."""
    generator = torch.Generator().manual_seed(0)
    lengths = ((5, 5), (3, 11), (7, 7))
    shapes = ((4, 15, 32), (2, 23, 32), (2, 23, 32))
    inputs = [torch.randn(s, generator=generator).to(device, TYPES[0]) for s in shapes]
    for rule in (MaskRule(), MaskRule(window=4)):
        if not varlen.takes(rule):
            continue
        results = []
        for run in (varlen, _one_by_one):
            leaves = [x.clone().requires_grad_() for x in inputs]
            with torch.enable_grad():
                out = run(leaves[0], leaves[1], leaves[2], lengths, 0.3, rule)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, inputs[0].view(out.shape))))
        for name, ours, theirs in zip(("out", "dq", "dk", "dv"), *results, strict=True):
            error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            if not error <= 2e-2:  # bfloat16's rounding on either side; NaN fails
                return f"{name} of torch's packed attention is off by {error:.1e} of its largest value"
    return None


def _one_by_one(
    q_HTD: Tensor, k_KPD: Tensor, v_KPD: Tensor, lengths: Sequence[tuple[int, int]], scale: float, rule: MaskRule
) -> Tensor:
    rows, keys = ([pair[i] for pair in lengths] for i in range(2))
    parts = zip(*(torch.split(x, n, dim=1) for x, n in ((q_HTD, rows), (k_KPD, keys), (v_KPD, keys))), strict=True)
    return torch.cat([span_attention(q, k, v, scale, rule) for q, k, v in parts], dim=1)


@cache
def _chosen(device_type: str) -> Varlen | None:
    from loquetier.kernels.select import process_kernels

    packed = process_kernels(device_type).choices["span_attention"].backend == "packed"
    return of_this_torch() if packed else None


def packed_attention(q_HTD: Tensor, rule: MaskRule) -> Varlen | None:
    """Packed attention if it is what runs for queries like these."""
    varlen = _chosen(q_HTD.device.type)
    if varlen is None or q_HTD.dtype not in TYPES or q_HTD.shape[2] % 8 or q_HTD.shape[2] > LARGEST_HEAD:
        return None
    return varlen if varlen.takes(rule) else None
