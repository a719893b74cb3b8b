"""Cross-entropy in C, every variant and dtype, against torch in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.native import native_library
from torch.nn import functional as F

from loquetier.kernels.native import DTYPE_CODES, ISA_NAMES
from loquetier.kernels.native_loss import NativeCrossEntropy

SMALL = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Of the largest gradient: float32 sums; bfloat16's rounding of the gradient. Losses are float32 either way."""


@pytest.fixture(scope="module", params=ISA_NAMES)
def kernel(request: pytest.FixtureRequest) -> Iterator[NativeCrossEntropy]:
    with native_library(request.param) as library:
        yield NativeCrossEntropy(library)


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 16, 77, 130])
def test_losses_hits_and_gradient(kernel: NativeCrossEntropy, dtype: torch.dtype, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (5 * torch.randn(7, vocab, generator=generator)).to(dtype)
    logits[0, 0] = 90.0  # e^90 is beyond float32
    logits[1] = 2.0  # every logit is the largest: the first counts
    targets = torch.randint(0, vocab, (7,), generator=generator)
    targets[2], targets[3] = vocab - 1, int(logits[3].float().argmax())
    weights = torch.linspace(-1, 2, 7)
    leaf = logits.double().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none")
    (grad,) = torch.autograd.grad(expected, leaf, weights.double())
    before = logits.clone()
    nll, hits = kernel(logits, targets, None)
    assert torch.equal(logits, before), "without weights nothing is written"
    with_weights = kernel(logits, targets, weights)
    assert torch.equal(nll, with_weights[0]) and torch.equal(hits, with_weights[1])
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, (leaf.argmax(-1) == targets).float())
    assert ((logits.double() - grad).abs() <= SMALL[dtype] * grad.abs().amax(-1, keepdim=True) + 1e-7).all()


def test_no_rows(kernel: NativeCrossEntropy) -> None:
    nll, hits = kernel(torch.empty(0, 9), torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert len(nll) == len(hits) == 0


def test_nan_stays_in_its_row(kernel: NativeCrossEntropy) -> None:
    logits, targets = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    clean, _ = kernel(logits.clone(), targets, None)
    logits[1, 39] = torch.nan
    nll, hits = kernel(logits, targets, torch.ones(3))
    assert nll[1].isnan() and hits[1] == 0 and logits[1].isnan().all()
    assert torch.equal(nll[[0, 2]], clean[[0, 2]]) and logits[[0, 2]].isfinite().all()
