"""Log-probabilities of a large vocabulary, against float64."""

from __future__ import annotations

import pytest
import torch

from loquetier.kernels.softmax import probabilities


@pytest.mark.parametrize("offset", [0.0, -300.0, 300.0])
@pytest.mark.parametrize("vocab", [3, 300, 49152])
def test_logprobs_are_exact_to_rounding(vocab: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    x_NV = 3 * torch.randn(32, vocab, generator=generator)
    x_NV[::2, 1] += 12  # rows whose answer is nearly certain, and rows whose answer is not
    # The offset itself rounds the logits: what is compared is the softmax of these float32 numbers.
    x_NV += offset
    ids_NK = torch.stack([x_NV.argmax(-1), x_NV.argmin(-1), torch.ones(32, dtype=torch.int64)], dim=1)
    found = probabilities(x_NV, ids_NK)
    exact = torch.log_softmax(x_NV.double(), -1).gather(-1, ids_NK)
    # A few roundings of 6e-8 of values up to 30; torch.log_softmax is 9e-6 off here, logsumexp 1e-5 at offset 300.
    torch.testing.assert_close(found.logprobs_NK.double(), exact, rtol=2e-7, atol=5e-7)
    softmax = (found.exp_NV / found.total_N1).double()
    torch.testing.assert_close(softmax, torch.softmax(x_NV.double(), -1), rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_is_not_hidden(bad: float) -> None:
    x_NV = torch.zeros(2, 5)
    x_NV[0, 3] = bad
    found = probabilities(x_NV, torch.zeros(2, 1, dtype=torch.int64))
    assert torch.isnan(found.logprobs_NK[0, 0])
    assert float(found.logprobs_NK[1, 0].exp()) == pytest.approx(0.2)


def test_a_masked_token_has_no_probability() -> None:
    x_NV = torch.tensor([[0.0, float("-inf")]])
    assert probabilities(x_NV, torch.tensor([[0, 1]])).logprobs_NK.tolist() == [[0.0, float("-inf")]]
