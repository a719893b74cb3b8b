"""Chunked cross-entropy against torch's own over whole logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loquetier.training import loss as loss_module
from loquetier.training.loss import LabelledRows, linear_cross_entropy

NUM_ROWS, HIDDEN, VOCAB = 23, 8, 31


def data(num_labels: int, seed: int = 0) -> tuple[Tensor, Tensor, LabelledRows]:
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(NUM_ROWS, num_labels, replace=False)).astype(np.int64)
    labels = LabelledRows(
        rows, rng.integers(0, VOCAB, num_labels), rng.uniform(0.01, 2.0, num_labels).astype(np.float32)
    )
    hidden_TD = torch.randn(NUM_ROWS, HIDDEN, generator=generator)
    return hidden_TD, torch.randn(VOCAB, HIDDEN, generator=generator), labels


@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equals_torch_cross_entropy(chunk: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", chunk)
    hidden_TD, weight_VD, labels = data(9)
    seen: list[int] = []

    def logits_of(hidden_nD: Tensor) -> Tensor:
        logits_nV = hidden_nD @ weight_VD.T
        return logits_nV if softcap is None else softcap * torch.tanh(logits_nV / softcap)

    def head(hidden_nD: Tensor, rows: npt.NDArray[np.int64]) -> Tensor:
        seen.extend(rows.tolist())
        assert len(rows) <= chunk
        return logits_of(hidden_nD)

    losses, grad_TD = linear_cross_entropy(hidden_TD, labels, head, with_grad=True)
    leaf_TD = hidden_TD.clone().requires_grad_()
    logits_LV = logits_of(leaf_TD[torch.from_numpy(labels.rows)])
    nll_L = F.cross_entropy(logits_LV, torch.from_numpy(labels.targets), reduction="none")
    (nll_L * torch.from_numpy(labels.weights)).sum().backward()
    # Softmax and log-sum-exp in float32 in another order of operations.
    torch.testing.assert_close(losses.nll_L, nll_L.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_TD, leaf_TD.grad, rtol=1e-5, atol=1e-6)
    assert losses.correct_L.tolist() == (logits_LV.argmax(-1).numpy() == labels.targets).astype(float).tolist()
    assert seen == labels.rows.tolist()  # rows without a label never reach the head


def test_rows_without_label_get_exactly_zero_gradient() -> None:
    hidden_TD, weight_VD, labels = data(5)
    _, grad_TD = linear_cross_entropy(hidden_TD, labels, lambda h, _: h @ weight_VD.T, with_grad=True)
    assert grad_TD is not None
    rest = np.setdiff1d(np.arange(NUM_ROWS), labels.rows)
    assert torch.count_nonzero(grad_TD[torch.from_numpy(rest)]) == 0
    assert torch.count_nonzero(grad_TD) > 0


def test_without_gradient_nothing_is_recorded() -> None:
    hidden_TD, weight_VD, labels = data(5)
    weight_VD.requires_grad_()
    recording: list[bool] = []

    def head(hidden_nD: Tensor, _: npt.NDArray[np.int64]) -> Tensor:
        recording.append(torch.is_grad_enabled())
        return hidden_nD @ weight_VD.T

    losses, grad_TD = linear_cross_entropy(hidden_TD, labels, head, with_grad=False)
    assert grad_TD is None and recording == [False]
    assert not losses.nll_L.requires_grad and not hidden_TD.requires_grad


def test_no_labelled_rows() -> None:
    hidden_TD, weight_VD, labels = data(0)
    losses, grad_TD = linear_cross_entropy(hidden_TD, labels, lambda h, _: h @ weight_VD.T, with_grad=True)
    assert losses.nll_L.shape == losses.correct_L.shape == (0,)
    assert grad_TD is not None and torch.count_nonzero(grad_TD) == 0


def test_a_row_that_is_nan_leaves_the_others_bit_identical() -> None:
    hidden_TD, weight_VD, labels = data(6)
    poisoned_TD = hidden_TD.clone()
    poisoned_TD[labels.rows[2]] = float("nan")
    (clean, clean_TD), (dirty, dirty_TD) = (
        linear_cross_entropy(h, labels, lambda h, _: h @ weight_VD.T, with_grad=True) for h in (hidden_TD, poisoned_TD)
    )
    assert clean_TD is not None and dirty_TD is not None
    keep = [i for i in range(6) if i != 2]
    assert torch.equal(clean.nll_L[keep], dirty.nll_L[keep]) and bool(dirty.nll_L[2].isnan())
    rows = torch.from_numpy(np.delete(np.arange(NUM_ROWS), labels.rows[2]))
    assert torch.equal(clean_TD[rows], dirty_TD[rows])


def test_a_long_example_never_makes_more_than_a_chunk_of_logits() -> None:
    """The bound on memory: with the chunk as shipped, 600 labelled rows reach the head in pieces of at most 256."""
    hidden_TD, weight_VD = torch.randn(700, HIDDEN), torch.randn(VOCAB, HIDDEN)
    labels = LabelledRows(np.arange(600, dtype=np.int64), np.zeros(600, dtype=np.int64), np.ones(600, dtype=np.float32))
    seen: list[int] = []

    def head(hidden_nD: Tensor, rows: npt.NDArray[np.int64]) -> Tensor:
        seen.append(len(hidden_nD))
        return hidden_nD @ weight_VD.T

    linear_cross_entropy(hidden_TD, labels, head, with_grad=True)
    assert seen == [256, 256, 88]
