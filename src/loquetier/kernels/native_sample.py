"""Choosing tokens on the C library: the largest logit of each row, and draws. One pass over the vocabulary each."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_double, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from loquetier.kernels.native import DTYPE_CODES, NativeLibrary


class DrawArguments(Structure):
    """How row `row` is drawn: options as in `SamplingParams`, and a uniform number in [0, 1)."""

    _fields_ = [
        ("row", c_int64),
        ("top_k", c_int64),
        *((name, c_double) for name in ("temperature", "min_p", "top_p", "uniform")),
    ]


class NativeSample:
    """Both kernels, on CPU logits ``[N, V]`` of a supported dtype whose columns lie side by side."""

    def __init__(self, library: NativeLibrary) -> None:
        self._argmax = library.function("lq_argmax", c_void_p, *(c_int64,) * 3, c_void_p, c_void_p, c_int32)
        self._draw = library.function(
            "lq_draw", c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int32, restype=c_int32
        )

    @staticmethod
    def takes(logits_NV: Tensor) -> bool:
        """Whether these logits are such."""
        return logits_NV.is_cpu and logits_NV.dtype in DTYPE_CODES and logits_NV.stride(1) == 1

    def argmax(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of each row (float32; NaN when the row has one), and the smallest id that has it."""
        rows, vocab = logits_NV.shape
        best_N, ids_N = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        self._argmax(
            logits_NV.data_ptr(), rows, vocab, logits_NV.stride(0), best_N.data_ptr(), ids_N.data_ptr(),
            DTYPE_CODES[logits_NV.dtype],
        )  # fmt: skip
        return best_N, ids_N

    def draw(self, logits_NV: Tensor, best_N: Tensor, draws: Sequence[DrawArguments]) -> Tensor:
        """A token id for each draw. `best_N` is `argmax`'s; a row whose largest logit is not finite gives 0.

        Raises:
            MemoryError: no memory for a row's probabilities.
        """
        assert best_N.dtype == torch.float32 and all(0 <= d.row < len(logits_NV) for d in draws)
        ids_M = torch.empty(len(draws), dtype=torch.int64)
        array = (DrawArguments * len(draws))(*draws)
        failed = self._draw(
            logits_NV.data_ptr(), logits_NV.shape[1], logits_NV.stride(0), best_N.data_ptr(), array, len(draws),
            ids_M.data_ptr(), DTYPE_CODES[logits_NV.dtype],
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory to draw {len(draws)} tokens from {logits_NV.shape[1]}")
        return ids_M
