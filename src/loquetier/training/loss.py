"""Chunked linear cross-entropy with a frozen head, over labelled rows only.

Prompt rows have no label and never reach lm_head. The gradient with respect to the hidden states is computed in
the forward, chunk by chunk, so that no more than one chunk of ``[rows, V]`` float32 logits lives at a time
(the idea of Liger's fused linear cross-entropy, without its per-call synchronisation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loquetier.kernels.softmax import Probabilities, probabilities
from loquetier.kernels.transfer import to_device

CHUNK_ROWS = 256
"""256 rows x 128k vocabulary x 4 bytes = 128 MiB of logits at a time."""

HeadFunction = Callable[[Tensor, npt.NDArray[np.int64]], Tensor]
"""``(hidden [n, D], row numbers, ascending) -> logits [n, V]``."""


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Which rows have a label: row ``rows[i]`` must predict ``targets[i]`` and counts ``weights[i]``. Rows ascend."""

    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    """The row's share of its job's loss: 1 / labelled tokens of the whole optimizer step."""


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Per labelled row, on the device, float32: negative log-likelihood, and 1.0 where argmax is the target."""

    nll_L: Tensor
    correct_L: Tensor


class PlainHead(Protocol):
    """`base.frozen_head.FrozenHead`: head and loss without autograd."""

    def losses(
        self, hidden_nD: Tensor, targets_n: Tensor, weights_n: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses, hits and, with weights, the gradient of the hidden states."""
        ...


def linear_cross_entropy(
    hidden_TD: Tensor, labels: LabelledRows, head: HeadFunction, *, with_grad: bool, plain: PlainHead | None = None
) -> tuple[RowLosses, Tensor | None]:
    """Losses of the labelled rows and, if asked, ``d(sum_i weights[i] * nll[i]) / d hidden`` as ``[T, D]``.

    An adapter on lm_head gets its gradient as a side effect of the same backward, as everywhere. `plain` does the same
    as `head` and the loss in fewer passes, where it may: not with an adapter on lm_head.
    """
    grad_TD = torch.zeros_like(hidden_TD) if with_grad else None
    nll, correct = [], []
    for at in range(0, len(labels.rows), CHUNK_ROWS):
        part = slice(at, at + CHUNK_ROWS)
        chunk = LabelledRows(labels.rows[part], labels.targets[part], labels.weights[part])
        losses = _chunk(hidden_TD, chunk, head, grad_TD) if plain is None else _plain(hidden_TD, chunk, plain, grad_TD)
        nll.append(losses.nll_L)
        correct.append(losses.correct_L)
    empty = hidden_TD.new_zeros(0, dtype=torch.float32)
    return RowLosses(torch.cat(nll) if nll else empty, torch.cat(correct) if correct else empty), grad_TD


def _chunk(hidden_TD: Tensor, labels: LabelledRows, head: HeadFunction, grad_TD: Tensor | None) -> RowLosses:
    """One chunk's losses; its gradient goes into `grad_TD`. A function of its own: its logits end with it."""
    with_grad, device = grad_TD is not None, hidden_TD.device
    rows_n, targets_n = to_device(np.stack([labels.rows, labels.targets]), device)
    hidden_nD = hidden_TD.index_select(0, rows_n).requires_grad_(with_grad)
    with torch.set_grad_enabled(with_grad):
        logits_nV = head(hidden_nD, labels.rows)
    logits32_nV = logits_nV.detach().float()
    found = probabilities(logits32_nV, targets_n[:, None])
    correct_n = (logits32_nV.argmax(-1) == targets_n).float()
    if grad_TD is not None:
        weights_n = to_device(labels.weights, device)
        dlogits_nV = _dlogits(found, targets_n, weights_n).to(logits_nV.dtype)
        (dhidden_nD,) = torch.autograd.grad(logits_nV, hidden_nD, dlogits_nV)
        grad_TD.index_copy_(0, rows_n, dhidden_nD)
    return RowLosses(-found.logprobs_NK[:, 0], correct_n)


def _plain(hidden_TD: Tensor, labels: LabelledRows, head: PlainHead, grad_TD: Tensor | None) -> RowLosses:
    """`_chunk` on a head without adapters."""
    rows_n, targets_n = torch.from_numpy(labels.rows), torch.from_numpy(labels.targets)
    weights_n = None if grad_TD is None else torch.from_numpy(labels.weights)
    nll_n, correct_n, dhidden_nD = head.losses(hidden_TD.index_select(0, rows_n), targets_n, weights_n)
    if grad_TD is not None:
        assert dhidden_nD is not None
        grad_TD.index_copy_(0, rows_n, dhidden_nD)
    return RowLosses(nll_n, correct_n)


def _dlogits(found: Probabilities, targets_n: Tensor, weights_n: Tensor) -> Tensor:
    """``weight * (softmax - onehot)``, in place of the exponentials."""
    d_nV = found.exp_NV.div_(found.total_N1)
    d_nV[torch.arange(len(targets_n), device=d_nV.device), targets_n] -= 1.0
    return d_nV.mul_(weights_n[:, None])
