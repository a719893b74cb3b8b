"""What the machine allows: memory read once, and floating-point operations, at the rates measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loquetier.adapters.spec import LinearTarget
from loquetier.base.loading import LoadedBase
from loquetier.bench.kernels import read_bandwidth
from loquetier.bench.traffic import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Of a base, what each token costs."""

    body: int
    """Weights of all linears in the decoder layers."""
    head: int
    """Weights of the output projection."""
    bytes_per_weight: int

    @classmethod
    def of(cls, loaded: LoadedBase, targets: Sequence[LinearTarget]) -> ModelSize:
        """Counted from the base's linears and its vocabulary."""
        body = sum(t.in_features * t.out_features for t in targets if t.layer is not None)
        config = loaded.model.config
        return cls(
            body=body,
            head=int(config.vocab_size) * int(config.hidden_size),
            bytes_per_weight=loaded.model.dtype.itemsize,
        )

    @property
    def num_bytes(self) -> int:
        """Read once per step, however few rows it has."""
        return (self.body + self.head) * self.bytes_per_weight


def gemm_rate(dtype: torch.dtype, size: int = 2048, seconds: float = 1.0) -> float:
    """Floating-point operations per second of torch's square matrix product: the best of `seconds` seconds."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def measure(size: ModelSize, dtype: torch.dtype) -> dict[str, float]:
    """This machine, now, on torch's threads."""
    bandwidth = read_bandwidth()
    return {
        "bytes_per_s": bandwidth,
        "flops_per_s": gemm_rate(dtype),
        "weights_s": size.num_bytes / bandwidth,
    }


def bounds(size: ModelSize, traffic: Traffic, rates: dict[str, Any], labelled: float) -> dict[str, float]:
    """The best that the rates allow for a row of the table, by `Row.best`; the weights' work alone, no attention.

    A decode step reads the weights once or multiplies its rows by them, whichever takes longer; a prompt multiplies
    its rows by the layers, and one row by the head; training does so twice (frozen weights need no gradient), and
    multiplies the `labelled` part of its rows by the head.

    Returns:
        tokens per second ("decode", "prefill", "train"), milliseconds per token ("single").
    """
    operation = 2 / rates["flops_per_s"]  # seconds for one multiply-add
    read = size.num_bytes / rates["bytes_per_s"]
    row = (size.body + size.head) * operation
    prompts = sum(traffic.lengths) * size.body * operation
    steps = traffic.new_tokens * max(read, traffic.streams * row)
    return {
        "decode": traffic.streams * traffic.new_tokens / (prompts + steps),
        "single": 1e3 * max(read, row),
        "prefill": traffic.long_prompt / (traffic.long_prompt * size.body * operation + size.head * operation),
        "train": 1 / (2 * operation * (size.body + labelled * size.head)),
    }
