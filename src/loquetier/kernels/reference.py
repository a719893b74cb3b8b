"""SMLM in plain torch: the oracle every other backend is tested against, and the fallback everywhere.

Segmented Multi-LoRA Multiplication adds, for each segment s of rows that run on one adapter,

    y[s] += scale_s * (x[s] @ A_s^T) @ B_s^T

With both factors stored ``[rank, dim]`` (A: ``[R, K]``, B transposed: ``[R, N]``) the forward and the backward
are the same three kernels:

    forward    S  = shrink(x, A)         y  += scale * expand(S, Bt)
    backward   dS = shrink(dy, Bt)       dx += scale * expand(dS, A)
               dA += scale * wgrad(dS, x)     dBt += scale * wgrad(S, dy)

Rows outside every segment (base rows) are never touched and cost nothing; a segment whose adapter has no
factors on this module costs one dictionary look-up. Shapes: T rows, K in, N out, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

FEW_ROWS = 32
"""Up to here torch's float32 GEMM plus conversions beats its bfloat16 one on a CPU (4 rows: 16 against 55 us)."""


class Segment(NamedTuple):
    """Rows ``[start, stop)`` of a step run on the adapter in `slot`."""

    slot: int
    start: int
    stop: int


class Factors(NamedTuple):
    """One adapter's weights (or gradients) on one module, as views of a flat buffer."""

    a_RK: Tensor
    b_RN: Tensor
    """B transposed, so that both factors are ``[rank, dim]``."""
    scale: float


FactorTable = Mapping[int, Mapping[int, Factors]]
"""slot -> module index -> factors. A slot without the module leaves the base's output as it is."""


def shrink(x_TD: Tensor, w_RD: Tensor) -> Tensor:
    """``x @ w^T``: ``[T, D] x [R, D] -> [T, R]``, unscaled.

    Where x is bfloat16 and w float32, the smaller of the two is converted: few rows are computed in float32, many
    in bfloat16. The result's dtype says which, and `expand` follows it.
    """
    if x_TD.dtype != w_RD.dtype and len(x_TD) > FEW_ROWS:
        return x_TD @ w_RD.to(x_TD.dtype).T
    return x_TD.to(w_RD.dtype) @ w_RD.T


def expand(s_TR: Tensor, w_RD: Tensor, y_TD: Tensor, scale: float) -> None:
    """``y += scale * s @ w``, in place on ``y_TD``, computed in s's dtype."""
    w_RD = w_RD.to(s_TR.dtype)
    if y_TD.dtype == s_TR.dtype:
        y_TD.addmm_(s_TR, w_RD, alpha=scale)
    else:
        y_TD.add_(s_TR @ w_RD, alpha=scale)


def wgrad(s_TR: Tensor, x_TD: Tensor, grad_RD: Tensor, scale: float) -> None:
    """``grad += scale * s^T @ x``, in place on the float32 gradient, accumulating over calls."""
    # Rows in bf16 are multiplied in float32, so that accumulation over segments does not round.
    grad_RD.addmm_(s_TR.T.to(grad_RD.dtype), x_TD.to(grad_RD.dtype), alpha=scale)


def smlm_forward(x_TK: Tensor, y_TN: Tensor, module: int, segments: Sequence[Segment], table: FactorTable) -> None:
    """Add every segment's delta to ``y_TN`` in place (``y_TN`` may be a column slice of a wider output)."""
    for slot, start, stop in segments:
        factors = table[slot].get(module)
        if factors is not None and stop > start:
            s_TR = shrink(x_TK[start:stop], factors.a_RK)
            expand(s_TR, factors.b_RN, y_TN[start:stop], factors.scale)


def smlm_backward(
    x_TK: Tensor,
    dy_TN: Tensor,
    dx_TK: Tensor,
    module: int,
    segments: Sequence[Segment],
    table: FactorTable,
    grads: FactorTable,
) -> None:
    """Add the deltas' part to ``dx_TK`` and to the adapters' gradients, both in place.

    Args:
        x_TK: the module's input on the train rows, as in the forward.
        dy_TN: gradient of the module's output on the same rows.
        dx_TK: gradient of the input, already holding the base's part ``dy @ W``.
        module: index of the module in the base's canonical order.
        segments: the train segments, rows counted inside ``[0, T)``.
        table: weights as in the forward.
        grads: float32 buffers of the same shapes, accumulated into.
    """
    for slot, start, stop in segments:
        factors = table[slot].get(module)
        if factors is None or stop == start:
            continue
        x_sK, dy_sN = x_TK[start:stop], dy_TN[start:stop]
        grad = grads[slot][module]
        ds_sR = shrink(dy_sN, factors.b_RN)
        # S is recomputed: [T, R] from [T, K] is a sliver of the base GEMM, and nothing is kept for it.
        wgrad(shrink(x_sK, factors.a_RK), dy_sN, grad.b_RN, factors.scale)
        wgrad(ds_sR, x_sK, grad.a_RK, factors.scale)
        expand(ds_sR, factors.a_RK, dx_TK[start:stop], factors.scale)
