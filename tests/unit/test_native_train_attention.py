"""The C attention of fresh rows, forward and backward, every variant and dtype, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.native import native_library
from torch import Tensor

from loquetier.kernels.attention import MaskRule, span_attention
from loquetier.kernels.native import DTYPE_CODES, ISA_NAMES
from loquetier.kernels.native_train_attention import AttentionSpan, NativeTrainAttention, empty_lse, own_spans

BF16 = torch.bfloat16
TOLERANCE = {torch.float32: 2e-5, BF16: 2e-2}
"""Of the largest value of a result: float32 sums and the exponential's last bits; in bfloat16 P and dS are rounded."""
RULES = [MaskRule(), MaskRule(window=5), MaskRule(window=40, softcap=2.0)]


@pytest.fixture(scope="module", params=[*ISA_NAMES, "amx"])
def kernel(request: pytest.FixtureRequest) -> Iterator[NativeTrainAttention]:
    with native_library("avx512" if request.param == "amx" else request.param) as library:
        found = NativeTrainAttention(library, amx=request.param == "amx")
        if request.param == "amx" and found._level < 2:
            pytest.skip("no AMX")
        yield found


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, spans: list[AttentionSpan], scale: float, rule: MaskRule
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients by autograd through the reference, float64; zero where no span is."""
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    out = torch.zeros_like(inputs[0])
    total = torch.zeros((), dtype=torch.float64)
    for a, b, c, d in spans:
        part = span_attention(
            *(t.transpose(0, 1) for t in (inputs[0][a:b], inputs[1][c:d], inputs[2][c:d])), scale, rule
        )
        out[a:b] = part.detach().transpose(0, 1)
        total = total + (part.transpose(0, 1) * dout[a:b].double()).sum()
    return out, list(torch.autograd.grad(total, inputs))


def assert_near(name: str, ours: Tensor, theirs: Tensor) -> None:
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-3)
    assert error <= TOLERANCE[ours.dtype], f"{name}: {error}"


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"window{rule.window}-softcap{rule.softcap}")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 64), (4, 2, 20), (2, 2, 33)])
def test_both_directions_on_odd_spans(
    kernel: NativeTrainAttention, dtype: torch.dtype, rule: MaskRule, heads: int, kv_heads: int, dim: int
) -> None:
    spans = own_spans([(0, 1), (1, 34), (36, 36), (36, 105)])  # one row, a block and one more, none, a gap before
    wide = random(
        106, heads + 2 * kv_heads, dim, dtype=dtype, seed=dim
    )  # columns of one matrix, as a linear leaves them
    q, k, v = wide.split([heads, kv_heads, kv_heads], dim=1)
    dout = random(106, heads, dim, dtype=dtype, seed=1)
    out, lse = torch.full_like(dout, 7.0), empty_lse(q)
    kernel.forward(q, k, v, out, lse, spans, 0.3, rule)
    theirs, grads = expected(q, k, v, dout, spans, 0.3, rule)
    rows = torch.tensor([r for s in spans for r in range(s.q_start, s.q_stop)])
    assert_near("out", out[rows], theirs[rows])
    assert (out[34:36] == 7.0).all(), "rows of no span are not touched"
    dwide = torch.full_like(wide, 9.0)
    ours = dwide.split([heads, kv_heads, kv_heads], dim=1)
    kernel.backward((q, k, v), out, lse, dout, ours, spans, 0.3, rule)
    for name, mine, other in zip("qkv", ours, grads, strict=True):
        assert_near(f"d{name}", mine[rows], other[rows])
    assert (dwide[34:36] == 9.0).all()


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_queries_behind_a_past(kernel: NativeTrainAttention, dtype: torch.dtype) -> None:
    """A window of rows of a longer example: keys before the first query count, and get gradients."""
    spans = [AttentionSpan(0, 37, 0, 90)]
    q, dout = (random(37, 4, 32, dtype=dtype, seed=s) for s in (0, 1))
    k, v = (random(90, 2, 32, dtype=dtype, seed=s) for s in (2, 3))
    for rule in (MaskRule(), MaskRule(window=20)):
        out, lse = torch.empty_like(q), empty_lse(q)
        kernel.forward(q, k, v, out, lse, spans, 0.2, rule)
        theirs, grads = expected(q, k, v, dout, spans, 0.2, rule)
        assert_near("out", out, theirs)
        ours = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        kernel.backward((q, k, v), out, lse, dout, ours, spans, 0.2, rule)
        for name, mine, other in zip("qkv", ours, grads, strict=True):
            assert_near(f"d{name}", mine, other)


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_a_span_does_not_see_its_neighbours(kernel: NativeTrainAttention, dtype: torch.dtype) -> None:
    """To the bit: alone, among others, and beside one that is not finite."""
    q, k, v = (random(80, 2, 32, dtype=dtype, seed=s) for s in range(3))
    q[50:] = torch.nan
    together, alone = torch.zeros_like(q), torch.zeros_like(q)
    kernel.forward(q, k, v, together, empty_lse(q), own_spans([(0, 50), (50, 80)]), 0.2, MaskRule())
    kernel.forward(q, k, v, alone, empty_lse(q), own_spans([(0, 50)]), 0.2, MaskRule())
    assert torch.equal(together[:50], alone[:50])
    assert together[50:].isnan().all()
