"""Drawing tokens after temperature, min_p, top_k and top_p, in fixed point: sums whose order does not matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loquetier.config import SamplingParams
from loquetier.engine.columns import chunks_of, column_of, index_of, key_ids, ordered_keys
from loquetier.kernels.transfer import to_device

_MASS_ONE = float(1 << 60)
"""Fixed point of probabilities: keeps every bit of a float32 >= 2**-36, and a row's sum stays below 2**63."""
_TOP_P_WIDTH = 1024
"""Sorted tokens tried first for top_p on a CPU; the whole vocabulary is sorted only when they do not suffice."""


def draw_rows(
    logits_NV: Tensor,
    best_N: Tensor,
    ok_N: Tensor,
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    u_M: npt.NDArray[np.float64],
) -> Tensor:
    """Token ids ``[M]`` of the given rows, a few rows at a time."""
    ids = []
    for part in chunks_of(len(rows), logits_NV.shape[1]):
        index_M = index_of(rows[part], logits_NV)
        x_MV = logits_NV.index_select(0, index_M).float()
        temperature_M1 = column_of([p.temperature for p in params[part]], x_MV)
        # Subtracting first keeps every quotient <= 0: nothing overflows at any temperature.
        z_MV = (x_MV - best_N.index_select(0, index_M).float()[:, None]) / temperature_M1
        z_MV.masked_fill_(~ok_N.index_select(0, index_M)[:, None], 0.0)  # failed rows: any harmless value
        u_M_part = to_device(u_M[part], x_MV.device)
        ids.append(draw(kept_mass(z_MV, params[part]), u_M_part))
    return torch.cat(ids)


def draw(mass_MV: Tensor, u_M: Tensor) -> Tensor:
    """Inverse of the cumulative distribution, in order of token ids.

    Args:
        mass_MV: int64 weights >= 0, each row's sum in [1, 2**63).
        u_M: float64 in [0, 1].

    Returns:
        int64 ``[M]``, always a token of positive mass: integer sums have no rounding and so no end to fall off.
    """
    cumulative_MV = mass_MV.cumsum(dim=-1)
    total_M1 = cumulative_MV[:, -1:]
    target_M1 = (u_M[:, None] * total_M1.double()).to(torch.int64).minimum(total_M1 - 1)
    return torch.searchsorted(cumulative_MV, target_M1, right=True).squeeze(-1)


def kept_mass(z_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities after temperature as int64 fixed point, 0 where min_p, top_k or top_p removed the token.

    top_k keeps exactly k tokens, ties by smaller id; top_p works on what min_p and top_k left, renormalised, and
    keeps the token that reaches top_p. The most likely token always stays.

    Args:
        z_MV: float32 logits over temperature, no NaN, at least one finite value per row.
        params: the rows' options.
    """
    vocab = z_MV.shape[1]
    probs_MV = torch.softmax(z_MV, dim=-1)
    if any(p.min_p > 0 for p in params):
        floor_M1 = column_of([p.min_p for p in params], z_MV) * probs_MV.amax(dim=-1, keepdim=True)
        probs_MV = probs_MV.masked_fill(probs_MV < floor_M1, 0.0)
    mass_MV = (probs_MV.double() * _MASS_ONE).to(torch.int64)
    rows = [i for i, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1]
    if not rows:
        return mass_MV
    index_F = index_of(rows, z_MV)
    kept_FV = _keep_top(z_MV.index_select(0, index_F), mass_MV.index_select(0, index_F), [params[i] for i in rows])
    return mass_MV.index_copy(0, index_F, kept_FV)


def _keep_top(z_FV: Tensor, mass_FV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`mass_FV` with everything below each row's cut set to 0."""
    vocab = z_FV.shape[1]
    limits = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    # On a GPU a look at the first width's outcome would be one more wait for the device; its sort is fast.
    first = vocab if z_FV.is_cuda else min(vocab, _TOP_P_WIDTH)
    width = max(limit if limit < vocab else first for limit in limits)
    keys_FV = ordered_keys(z_FV)
    count_F, keys_FW = _count_kept(keys_FV, mass_FV, limits, params, width)
    if any(limit > width for limit in limits):
        reached_F = (count_F < width) | (index_of(limits, z_FV) <= width)
        if not bool(reached_F.all()):
            count_F, keys_FW = _count_kept(keys_FV, mass_FV, limits, params, vocab)
    cut_F1 = keys_FW.gather(1, count_F[:, None] - 1)
    return mass_FV.masked_fill(keys_FV < cut_F1, 0)


def _count_kept(
    keys_FV: Tensor, mass_FV: Tensor, limits: Sequence[int], params: Sequence[SamplingParams], width: int
) -> tuple[Tensor, Tensor]:
    """How many of the `width` highest keys stay (``[F]``, >= 1), and these keys, descending (``[F, width]``)."""
    vocab = keys_FV.shape[1]
    keys_FW = keys_FV.topk(width, dim=-1).values
    limit_F1 = index_of(limits, keys_FV)[:, None]
    within_FW = torch.arange(width, device=keys_FV.device) < limit_F1
    sorted_FW = mass_FV.gather(1, key_ids(keys_FW)) * within_FW
    total_F1 = torch.where(limit_F1 < vocab, sorted_FW.sum(-1, keepdim=True), mass_FV.sum(-1, keepdim=True))
    before_FW = sorted_FW.cumsum(dim=-1) - sorted_FW
    top_p_F1 = to_device(np.array([p.top_p for p in params]), keys_FV.device)[:, None]
    inside_FW = (top_p_F1 >= 1) | (before_FW.double() < top_p_F1 * total_F1.double())
    return (within_FW & inside_FW).sum(dim=-1), keys_FW
