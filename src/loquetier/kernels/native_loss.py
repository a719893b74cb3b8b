"""Softmax cross-entropy on the C library: the losses of rows of logits, and their gradient in the logits' place."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from loquetier.kernels.native import DTYPE_CODES, NativeLibrary


class NativeCrossEntropy:
    """The kernel of one library."""

    def __init__(self, library: NativeLibrary) -> None:
        self._run = library.function("lq_cross_entropy", *(c_void_p,) * 5, c_int64, c_int64, c_int32)

    def __call__(self, logits_nV: Tensor, targets_n: Tensor, weights_n: Tensor | None) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood, and 1.0 where the target is the first largest logit; float32 each.

        With weights (float32) the logits are overwritten by ``weight * (softmax - onehot)``.
        """
        rows, vocab = logits_nV.shape
        assert logits_nV.is_contiguous() and targets_n.dtype == torch.int64 and targets_n.shape == (rows,)
        assert rows == 0 or 0 <= int(targets_n.min()) <= int(targets_n.max()) < vocab, "targets are token ids"
        assert weights_n is None or (weights_n.dtype == torch.float32 and weights_n.shape == (rows,))
        nll_n, correct_n = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
        self._run(
            logits_nV.data_ptr(), targets_n.contiguous().data_ptr(),
            None if weights_n is None else weights_n.contiguous().data_ptr(),
            nll_n.data_ptr(), correct_n.data_ptr(), rows, vocab, DTYPE_CODES[logits_nV.dtype],
        )  # fmt: skip
        return nll_n, correct_n
