"""lm_head and the loss in one: packed GEMM, cross-entropy in the logits' place, back through the same weight."""

from __future__ import annotations

from torch import Tensor

from loquetier.base.gemm import BaseGemm
from loquetier.kernels.native_loss import NativeCrossEntropy


class FrozenHead:
    """For bases whose logits are one GEMM of the hidden states, on rows without an adapter there."""

    def __init__(self, gemm: BaseGemm, cross_entropy: NativeCrossEntropy) -> None:
        self._gemm, self._cross_entropy = gemm, cross_entropy

    def losses(
        self, hidden_nD: Tensor, targets_n: Tensor, weights_n: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Negative log-likelihood, 1.0 where the target is the argmax, and with weights the gradient ``[n, D]`` of
        ``sum_i weights[i] * nll[i]``. No autograd; the logits ``[n, V]`` are the only temporary."""
        logits_nV = self._gemm(hidden_nD)
        nll_n, correct_n = self._cross_entropy(logits_nV, targets_n, weights_n)
        if weights_n is None:
            return nll_n, correct_n, None
        dhidden_nD = hidden_nD.new_empty(hidden_nD.shape)
        self._gemm.input_gradient(logits_nV, dhidden_nD)
        return nll_n, correct_n, dhidden_nD
