"""Each C kernel once against the reference on small random input, before it may run.

A compiler bug, a wrong ISA variant or a broken library shows here, not in somebody's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from loquetier.kernels import reference
from loquetier.kernels.attention import MaskRule, decode_attention, span_attention
from loquetier.kernels.gemm import GemmKernel
from loquetier.kernels.native import NativeLibrary
from loquetier.kernels.native_attention import NativeDecode, NativePrefill
from loquetier.kernels.native_sample import DrawArguments, NativeSample
from loquetier.kernels.native_smlm import NativeSmlm, backward_rows, forward_rows
from loquetier.kernels.reference import Factors, FactorTable, Segment

Check = Callable[[NativeLibrary], str | None]
"""What is wrong with the kernel, in words; None when it does what the reference does."""
_MODULE = 0
_SEGMENTS = (Segment(0, 0, 5), Segment(1, 6, 7), Segment(0, 7, 28))
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the largest value: a few float32 roundings; bfloat16's own rounding on either side."""


def difference(name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> str | None:
    """What to say when two results differ by more than rounding; None when they agree. NaN never agrees."""
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    if error <= _TOLERANCE[dtype]:
        return None
    return f"{name} in {str(dtype).removeprefix('torch.')} is off by {float(error):.1e} of its largest value"


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # A generator of its own: checking must not change what the process draws next.
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def _smlm_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, FactorTable, FactorTable]:
    x_TK, y_TN = _random(30, 83, dtype=dtype), _random(30, 51, dtype=dtype)
    ranks = (3, 9)
    table = {s: {_MODULE: Factors(_random(r, 83), _random(r, 51), 0.5 + s)} for s, r in enumerate(ranks)}
    grads = {s: {_MODULE: Factors(torch.ones(r, 83), torch.ones(r, 51), 1.0)} for s, r in enumerate(ranks)}
    return x_TK, y_TN, table, grads


def check_smlm_forward(library: NativeLibrary) -> str | None:
    """Two adapters, three segments, odd sizes, rows of either dtype."""
    for dtype in _TOLERANCE:
        x_TK, y_TN, table, _ = _smlm_inputs(dtype)
        expected_TN = y_TN.clone()
        reference.smlm_forward(x_TK, expected_TN, _MODULE, _SEGMENTS, table)
        rows = forward_rows(_MODULE, _SEGMENTS, table)
        assert rows is not None
        NativeSmlm(library).forward(x_TK, y_TN, rows)
        if fault := difference("y", y_TN, expected_TN, dtype):
            return fault
    return None


def check_smlm_backward(library: NativeLibrary) -> str | None:
    """The same layout; dx and the gradients of both factors."""
    for dtype in _TOLERANCE:
        x_TK, dy_TN, table, grads = _smlm_inputs(dtype)
        expected = _smlm_inputs(dtype)[3]
        dx_TK, expected_dx_TK = torch.ones_like(x_TK), torch.ones_like(x_TK)
        reference.smlm_backward(x_TK, dy_TN, expected_dx_TK, _MODULE, _SEGMENTS, table, expected)
        rows = backward_rows(_MODULE, _SEGMENTS, table, grads)
        assert rows is not None
        NativeSmlm(library).backward(x_TK, dy_TN, dx_TK, rows)
        pairs = [("dx", dx_TK, expected_dx_TK)]
        for slot in expected:
            ours, theirs = grads[slot][_MODULE], expected[slot][_MODULE]
            pairs += [("dA", ours.a_RK, theirs.a_RK), ("dB", ours.b_RN, theirs.b_RN)]
        if fault := next((f for pair in pairs if (f := difference(*pair, dtype))), None):
            return fault
    return None


def check_decode_attention(library: NativeLibrary) -> str | None:
    """Three sequences, one longer than a task's chunk, scattered pages; with and without window and softcap."""
    positions_N = torch.tensor([0, 41, 299])
    pages_NB = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: 3 * 13].view(3, 13)
    at_P = torch.arange(13 * 24)
    for dtype in _TOLERANCE:
        k, v, q_NHD = _random(40, 24, 2, 20, dtype=dtype), _random(40, 24, 2, 21, dtype=dtype), _random(3, 6, 20)
        v, q_NHD = v[..., :20].contiguous(), q_NHD.to(dtype)
        for rule in (MaskRule(), MaskRule(window=30, softcap=1.5)):
            visible_NP = at_P <= positions_N[:, None]
            if rule.window is not None:
                visible_NP &= at_P > positions_N[:, None] - rule.window
            expected = decode_attention(q_NHD, k, v, pages_NB, visible_NP, 0.3, rule.softcap)
            ours = NativeDecode(library)(q_NHD, k, v, pages_NB, positions_N, 0.3, rule)
            if fault := difference("out", ours, expected, dtype):
                return fault
    return None


def check_prefill_attention(library: NativeLibrary) -> str | None:
    """Rows after a past, scattered pages; with and without window and softcap; with and without AMX."""
    past, rows, page_size = 90, 37, 24
    pages_B = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:6]
    for dtype in _TOLERANCE:
        k, v, q_LHD = (_random(*shape, 20).to(dtype) for shape in ((9, page_size, 2), (9, page_size, 2), (rows, 6)))
        seen = [c[pages_B].flatten(0, 1)[: past + rows].transpose(0, 1) for c in (k, v)]
        for rule in (MaskRule(), MaskRule(window=30, softcap=1.5)):
            expected = span_attention(q_LHD.transpose(0, 1), seen[0], seen[1], 0.3, rule).transpose(0, 1)
            for level in range(GemmKernel(library).level + 1):
                ours = NativePrefill(library, level)(q_LHD, k, v, pages_B, past, 0.3, rule)
                if fault := difference("out", ours, expected, dtype):
                    return fault
    return None


def check_sample(library: NativeLibrary) -> str | None:
    """The largest logits, and draws under every option, on an odd vocabulary with ties."""
    for dtype in _TOLERANCE:
        logits_NV = (4 * _random(4, 1003)).to(torch.bfloat16).to(dtype)  # ties: few distinct values
        sample = NativeSample(library)
        best_N, ids_N = sample.argmax(logits_NV)
        expected_N = (logits_NV == logits_NV.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)
        if not (torch.equal(ids_N, expected_N) and torch.equal(best_N, logits_NV.float().amax(dim=-1))):
            return "the largest logit of a row is another one"
        options = ((0, 0.0, 1.0), (7, 0.0, 1.0), (0, 0.0, 0.8), (30, 0.0, 0.6), (0, 0.02, 1.0), (9, 0.05, 0.9))
        draws = [DrawArguments(i % 4, k, 0.5 + i / 4, m, p, (0.37 * i) % 1) for i, (k, m, p) in enumerate(options)]
        ids = sample.draw(logits_NV, best_N, draws).tolist()
        for draw, token in zip(draws, ids, strict=True):
            if token != (expected := drawn(logits_NV[draw.row], draw)):
                return f"drew token {token} instead of {expected} (top_k={draw.top_k}, top_p={draw.top_p})"
    return None


def drawn(logits_V: Tensor, draw: DrawArguments) -> int:
    """What `NativeSample.draw` shall give for one row, in float64 and with a sort."""
    mass_V = torch.softmax(logits_V.double() / draw.temperature, dim=-1)
    mass_V[mass_V < draw.min_p * mass_V.max()] = 0
    order_V = torch.argsort(logits_V.double(), descending=True, stable=True)  # ties by smaller id
    sorted_V = mass_V[order_V]
    if draw.top_k > 0:
        sorted_V[draw.top_k :] = 0
    if draw.top_p < 1:
        sorted_V[sorted_V.cumsum(0) - sorted_V >= draw.top_p * sorted_V.sum()] = 0
    cumulative_V = torch.zeros_like(mass_V).scatter_(0, order_V, sorted_V).cumsum(0)
    return int(torch.searchsorted(cumulative_V, draw.uniform * cumulative_V[-1], right=True))


CHECKS: Mapping[str, Check] = {
    "smlm_forward": check_smlm_forward,
    "smlm_backward": check_smlm_backward,
    "decode_attention": check_decode_attention,
    "prefill_attention": check_prefill_attention,
    "sample": check_sample,
}
"""By kernel name (`select.KERNELS`); a kernel without an entry has no C version."""
