"""Log-probabilities over a whole vocabulary, for losses and for what is reported of answers alike."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Probabilities(NamedTuple):
    """``exp_NV / total_N1`` is the softmax."""

    logprobs_NK: Tensor
    """Of the ids asked for."""
    exp_NV: Tensor
    total_N1: Tensor


def probabilities(logits_NV: Tensor, ids_NK: Tensor) -> Probabilities:
    """The softmax of float32 logits, not divided yet, and the log-probabilities of `ids_NK`.

    The largest logit is subtracted and stays apart from the logarithm of the sum: adding the two, as `logsumexp` does,
    rounds the result at the size of the logits (1e-6 at 20). The sum is torch's pairwise one; its `log_softmax` adds
    a row of 49k terms up less exactly (up to 9e-6 off). A row with NaN or +inf gives NaN.
    """
    shifted_NV = logits_NV - logits_NV.amax(dim=-1, keepdim=True)
    picked_NK = shifted_NV.gather(-1, ids_NK)
    exp_NV = shifted_NV.exp_()  # in place: one copy of [N, V] lives here
    total_N1 = exp_NV.sum(dim=-1, keepdim=True)
    return Probabilities(picked_NK - total_N1.log(), exp_NV, total_N1)
