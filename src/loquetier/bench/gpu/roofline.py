"""What the machine can do at best: bytes copied and multiplied numbers per second, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from loquetier.bench.gpu.shapes import Shape, wait

_WARM, _TIMED = 3, 10


def measure(shape: Shape) -> dict[str, Any]:
    """Bandwidth of a large copy (bytes read plus written) and rate of a square GEMM in the shape's dtype."""
    n = shape.gemm
    a, b = (torch.randn(n, n, device=shape.device, dtype=shape.dtype) for _ in range(2))
    out = torch.empty_like(a)
    gemm = _seconds(shape, lambda: torch.mm(a, b, out=out))
    source = torch.zeros(shape.copy_bytes, dtype=torch.uint8, device=shape.device)
    to = torch.empty_like(source)
    copy = _seconds(shape, lambda: to.copy_(source))
    return {"copy_bytes_per_s": 2 * shape.copy_bytes / copy, "gemm_flop_per_s": 2 * n**3 / gemm, "gemm_side": n}


def _seconds(shape: Shape, call: Callable[[], object]) -> float:
    for _ in range(_WARM):
        call()
    times = []
    for _ in range(_TIMED):
        wait(shape)
        started = time.perf_counter()
        call()
        wait(shape)
        times.append(time.perf_counter() - started)
    return median(times)
