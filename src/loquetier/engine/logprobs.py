"""Log-probabilities under the raw logits: of chosen tokens, of the most likely ones, of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loquetier.engine.columns import chunks_of, ids_of, index_of, key_ids, ordered_keys
from loquetier.errors import EngineError
from loquetier.kernels.softmax import probabilities

MIN_LOGPROB = -9999.0
"""Reported in place of -inf, which JSON cannot carry (vLLM uses the same number)."""


def prompt_logprobs(logits_LV: Tensor, next_tokens: Sequence[int], k: int) -> list[dict[int, float]]:
    """Log-probabilities of a prompt: row i of `logits_LV` predicts ``next_tokens[i]``.

    Returns one dict per row: the actual token first, then the `k` most likely ones in descending order, ties by
    smaller id.

    Raises:
        EngineError: a row has NaN or +inf, or only -inf.
    """
    assert logits_LV.shape[0] == len(next_tokens)
    if not next_tokens:
        return []
    bad = torch.isfinite(logits_LV.amax(dim=-1)).logical_not().nonzero().flatten().tolist()
    if bad:
        raise EngineError(f"no prompt logprobs: the logits of {len(bad)} positions, first {bad[0]}, are not finite")
    chosen_L = ids_of(next_tokens, logits_LV.device)
    table = logprob_table(logits_LV, range(len(next_tokens)), chosen_L, k).tolist()
    return [{token: row[0]} | top_dict(row, k, k) for token, row in zip(next_tokens, table, strict=True)]


def logprob_table(logits_NV: Tensor, rows: Sequence[int], chosen_M: Tensor, width: int) -> Tensor:
    """float64 ``[M, 1 + 2 * width]``: the chosen token's logprob, then top token ids, then their logprobs."""
    width = min(width, logits_NV.shape[1])
    parts = []
    for part in chunks_of(len(rows), logits_NV.shape[1]):
        x_MV = logits_NV.index_select(0, index_of(rows[part], logits_NV)).float()
        top_MK = key_ids(ordered_keys(x_MV).topk(width, dim=-1).values)
        # The formula of the loss: what is served has the log-probability that was trained, to the bit.
        found = probabilities(x_MV, torch.cat([chosen_M[part][:, None], top_MK], dim=1)).logprobs_NK
        picked = found.clamp(min=MIN_LOGPROB).double()
        parts.append(torch.cat([picked[:, :1], top_MK.double(), picked[:, 1:]], dim=1))
    return torch.cat(parts)


def top_dict(row: Sequence[float], k: int, width: int) -> dict[int, float]:
    """The first `k` of a table row's `width` alternatives."""
    width = min(width, (len(row) - 1) // 2)
    return {int(row[1 + j]): row[1 + width + j] for j in range(min(k, width))}
