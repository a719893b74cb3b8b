"""The checks of the kernels that only training uses; see `kernels.selfcheck`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from loquetier.kernels import reference
from loquetier.kernels.attention import MaskRule, span_attention
from loquetier.kernels.native import DTYPE_CODES, NativeLibrary
from loquetier.kernels.native_loss import NativeCrossEntropy
from loquetier.kernels.native_smlm_long import NativeLongSmlm
from loquetier.kernels.native_train_attention import NativeTrainAttention, empty_lse, own_spans
from loquetier.kernels.reference import Factors, Segment
from loquetier.kernels.rowgrads import RowGrads
from loquetier.kernels.rowops import GELU_TANH, SILU, Norm
from loquetier.kernels.selfcheck import Check, difference


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))  # checking must not change what the process draws next
    return torch.randn(*shape, generator=generator).to(dtype)


@torch.enable_grad()  # the first to ask may be in a step without gradients
def check_train_attention(library: NativeLibrary) -> str | None:
    """Two spans, grouped heads of an odd size, with and without window and softcap; both directions."""
    kernel, spans = NativeTrainAttention(library), own_spans([(0, 41), (41, 48)])
    for dtype in DTYPE_CODES:
        q, k, v, dout = (_random(48, heads, 20, dtype=dtype) for heads in (4, 2, 2, 4))
        v, dout = v.flip(0), dout.flip(0)
        for rule in (MaskRule(), MaskRule(window=9, softcap=1.5)):
            leaves = [t.double().requires_grad_() for t in (q, k, v)]
            parts = []
            for s in spans:
                q_s, k_s, v_s = (t[s.q_start : s.q_stop].transpose(0, 1) for t in leaves)
                parts.append(span_attention(q_s, k_s, v_s, 0.3, rule))
            expected = torch.cat(parts, dim=1).transpose(0, 1)
            grads = torch.autograd.grad(expected, leaves, dout.double())
            out, lse = torch.empty_like(q), empty_lse(q)
            kernel.forward(q, k, v, out, lse, spans, 0.3, rule)
            ours = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
            kernel.backward((q, k, v), out, lse, dout, ours, spans, 0.3, rule)
            pairs = [("out", out, expected.detach()), *zip(("dq", "dk", "dv"), ours, grads, strict=True)]
            if fault := next((f for pair in pairs if (f := difference(*pair, dtype))), None):
                return fault
    return None


@torch.enable_grad()  # the first to ask may be in a step without gradients
def check_row_grads(library: NativeLibrary) -> str | None:
    """RMSNorm, rotary and the gated activation on odd sizes against autograd in float64."""
    kernel = RowGrads(library)
    for dtype in DTYPE_CODES:
        x, dy, weight = _random(3, 45, dtype=dtype), _random(3, 45, dtype=dtype).flip(0), _random(45, dtype=dtype)
        pairs: list[tuple[str, Tensor, Tensor]] = []
        for one_plus in (False, True):
            leaf = x.double().requires_grad_()
            normed = leaf * leaf.square().mean(-1, keepdim=True).rsqrt() * (weight.double() + one_plus)
            dx = torch.empty_like(x)
            kernel.rms_norm(x, Norm(weight, 0.0, one_plus), dy, dx)
            pairs.append(("norm", dx, torch.autograd.grad(normed, leaf, dy.double())[0]))
        wide, dinner = _random(3, 42, dtype=dtype), _random(3, 21, dtype=dtype)
        for number, activation in ((SILU, F.silu), (GELU_TANH, partial(F.gelu, approximate="tanh"))):
            leaf, dwide = wide.double().requires_grad_(), torch.empty_like(wide)
            gate, up = leaf.chunk(2, dim=-1)
            kernel.gated(wide, dinner, dwide, number)
            pairs.append(("gated", dwide, torch.autograd.grad(activation(gate) * up, leaf, dinner.double())[0]))
        turned, cos, sin = (_random(*shape, dtype=dtype) for shape in ((3, 44), (3, 22), (3, 22)))
        d, c, s = turned.double().view(3, 2, 22), cos.double()[:, None], sin.double()[:, None]
        ds = d * s
        expected_turned = d * c + torch.cat([ds[..., 11:], -ds[..., :11]], dim=-1)
        kernel.rotary(turned, cos, sin, 2)
        pairs.append(("rotary", turned, expected_turned.view(3, 44)))
        if fault := next((f for pair in pairs if (f := difference(*pair, dtype))), None):
            return fault
    return None


@torch.enable_grad()  # the first to ask may be in a step without gradients
def check_cross_entropy(library: NativeLibrary) -> str | None:
    """Losses and gradient of a vocabulary of odd size."""
    for dtype in DTYPE_CODES:
        logits, targets, weights = _random(5, 83, dtype=dtype), torch.tensor([0, 82, 40, 7, 7]), torch.arange(1.0, 6.0)
        leaf = logits.double().requires_grad_()
        expected = F.cross_entropy(leaf, targets, reduction="none")
        (grad,) = torch.autograd.grad(expected, leaf, weights.double())
        nll, _ = NativeCrossEntropy(library)(logits, targets, weights)
        for pair in (("nll", nll, expected.detach()), ("dlogits", logits, grad)):
            if fault := difference(*pair, dtype):
                return fault
    return None


def check_smlm_long(library: NativeLibrary) -> str | None:
    """Two adapters of odd ranks on odd numbers of rows; passes without AMX, since nothing runs there then."""
    kernel = NativeLongSmlm(library)
    if not kernel.available:
        return None
    x, y, dx = (_random(*shape, dtype=torch.bfloat16) for shape in ((70, 64), (70, 96), (70, 64)))
    segments = (Segment(0, 0, 37), Segment(1, 40, 70))
    table = {s: {0: Factors(_random(r, 64, dtype=torch.float32), _random(r, 96, dtype=torch.float32), 0.5 + s)}
             for s, r in ((0, 5), (1, 19))}  # fmt: skip
    grads, expected = ({s: {0: Factors(torch.ones_like(f[0].a_RK), torch.ones_like(f[0].b_RN), 1.0)}
                        for s, f in table.items()} for _ in range(2))  # fmt: skip
    right_y, right_dx = y.clone(), dx.clone()
    reference.smlm_forward(x, right_y, 0, segments, table)
    reference.smlm_backward(x, right_y, right_dx, 0, segments, table, expected)
    kernel.forward(x, y, 0, segments, table)
    kernel.backward(x, right_y, dx, 0, segments, table, grads)
    pairs = [("y", y, right_y), ("dx", dx, right_dx)]
    for slot in table:
        pairs += [
            ("dA", grads[slot][0].a_RK, expected[slot][0].a_RK),
            ("dB", grads[slot][0].b_RN, expected[slot][0].b_RN),
        ]
    return next((f for pair in pairs if (f := difference(*pair, torch.bfloat16))), None)


CHECKS: Mapping[str, Check] = {
    "train_attention": check_train_attention,
    "row_grads": check_row_grads,
    "cross_entropy": check_cross_entropy,
    "smlm_long": check_smlm_long,
}
"""Joined with `selfcheck.CHECKS` in `kernels.select`."""
