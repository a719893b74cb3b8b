"""Each Triton kernel once against the reference on small random input on its device, before it may run.

A compiler bug, a driver that does not fit or a wrong shape shows here, not in somebody's answers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loquetier.kernels import attention, reference, triton_rows
from loquetier.kernels.attention import MaskRule
from loquetier.kernels.dropout import DropoutRows, dropped_TK, row_keys
from loquetier.kernels.reference import Factors, FactorTable, Segment
from loquetier.kernels.rowops import SILU, Norm
from loquetier.kernels.selfcheck import difference
from loquetier.kernels.triton_attention import TritonAttention
from loquetier.kernels.triton_load import Check
from loquetier.kernels.triton_rows import TritonRowOps
from loquetier.kernels.triton_smlm import TritonSmlm

_MODULE, _ROWS, _IN, _OUT = 0, 40, 83, 51
_SEGMENTS = (Segment(0, 0, 5), Segment(1, 6, 7), Segment(0, 7, 39))
_TYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same on every device, from a generator of its own: checking must not change what the process draws next."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _table(dtype: torch.dtype, device: torch.device) -> FactorTable:
    def factors(slot: int, rank: int) -> Factors:
        a, b = (random(rank, n, dtype=dtype, device=device) for n in (_IN, _OUT))
        return Factors(a, b, 0.5 + slot)

    return {slot: {_MODULE: factors(slot, rank)} for slot, rank in enumerate((3, 17))}


def _grads(device: torch.device) -> FactorTable:
    shapes = ((3, _IN), (3, _OUT)), ((17, _IN), (17, _OUT))
    return {
        slot: {_MODULE: Factors(torch.ones(a, device=device), torch.ones(b, device=device), 1.0)}
        for slot, (a, b) in enumerate(shapes)
    }


def _dropping(device: torch.device) -> tuple[DropoutRows, Tensor, FactorTable]:
    """Slot 0 drops a third; what that makes of the input, and of the scale, for the reference."""
    rate = 1 / 3
    keys_T = torch.from_numpy(row_keys(1, 2, 3, _ROWS)).to(device)
    kept_TK = ~dropped_TK(keys_T, _MODULE, _IN, rate)
    kept_TK[6:7] = True
    table = _table(torch.float32, device)
    own = table[0][_MODULE]
    return DropoutRows({0: rate}, keys_T), kept_TK, {**table, 0: {_MODULE: own._replace(scale=own.scale / (1 - rate))}}


def check_smlm_forward(device: torch.device) -> str | None:
    """Two adapters, three segments, odd sizes, both types; then with dropout."""
    for dtype in _TYPES:
        x_TK, y_TN = (random(_ROWS, n, dtype=dtype, device=device) for n in (_IN, _OUT))
        table, expected_TN = _table(dtype, device), y_TN.clone()
        reference.smlm_forward(x_TK, expected_TN, _MODULE, _SEGMENTS, table)
        TritonSmlm().forward(x_TK, y_TN, _MODULE, _SEGMENTS, table)
        if fault := difference("y", y_TN, expected_TN, dtype):
            return fault
    dropout, kept_TK, rescaled = _dropping(device)
    x_TK, y_TN = (random(_ROWS, n, dtype=torch.float32, device=device) for n in (_IN, _OUT))
    expected_TN = y_TN.clone()
    reference.smlm_forward(x_TK * kept_TK, expected_TN, _MODULE, _SEGMENTS, rescaled)
    TritonSmlm().forward(x_TK, y_TN, _MODULE, _SEGMENTS, _table(torch.float32, device), None, dropout)
    return difference("y under dropout", y_TN, expected_TN, torch.float32)


def check_smlm_backward(device: torch.device) -> str | None:
    """The same layout; dx and the gradients of both factors."""
    for dtype in _TYPES:
        x_TK, dy_TN = (random(_ROWS, n, dtype=dtype, device=device) for n in (_IN, _OUT))
        table, ours, theirs = _table(dtype, device), _grads(device), _grads(device)
        dx_TK, expected_TK = torch.ones_like(x_TK), torch.ones_like(x_TK)
        reference.smlm_backward(x_TK, dy_TN, expected_TK, _MODULE, _SEGMENTS, table, theirs)
        TritonSmlm().backward(x_TK, dy_TN, dx_TK, _MODULE, _SEGMENTS, table, ours)
        if fault := _gradients_differ(dx_TK, expected_TK, ours, theirs, dtype):
            return fault
    dropout, kept_TK, rescaled = _dropping(device)
    x_TK, dy_TN = (random(_ROWS, n, dtype=torch.float32, device=device) for n in (_IN, _OUT))
    ours, theirs, dx_TK, delta_TK = _grads(device), _grads(device), torch.ones_like(x_TK), torch.zeros_like(x_TK)
    reference.smlm_backward(x_TK * kept_TK, dy_TN, delta_TK, _MODULE, _SEGMENTS, rescaled, theirs)
    table = _table(torch.float32, device)
    TritonSmlm().backward(x_TK, dy_TN, dx_TK, _MODULE, _SEGMENTS, table, ours, None, dropout)
    return _gradients_differ(dx_TK, 1 + delta_TK * kept_TK, ours, theirs, torch.float32)


def _gradients_differ(
    dx_TK: Tensor, expected_TK: Tensor, ours: FactorTable, theirs: FactorTable, dtype: torch.dtype
) -> str | None:
    pairs = [("dx", dx_TK, expected_TK)]
    for slot in theirs:
        own, other = ours[slot][_MODULE], theirs[slot][_MODULE]
        pairs += [("dA", own.a_RK, other.a_RK), ("dB", own.b_RN, other.b_RN)]
    return next((f for pair in pairs if (f := difference(*pair, dtype))), None)


def check_decode_attention(device: torch.device) -> str | None:
    """Three sequences on scattered pages and a chunk with a past; with and without window and softcap."""
    positions_N = torch.tensor([0, 41, 149], device=device)
    pages_NB = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: 3 * 10].view(3, 10).to(device)
    at_P, kernel = torch.arange(160, device=device), TritonAttention()
    for dtype in _TYPES:
        k, v = (random(40, 16, 2, 20 + i, dtype=dtype, device=device)[..., :20].contiguous() for i in range(2))
        q_NHD = random(3, 6, 20, dtype=dtype, device=device)
        for rule in (MaskRule(), MaskRule(window=30, softcap=1.5)):
            visible_NP = at_P <= positions_N[:, None]
            if rule.window is not None:
                visible_NP &= at_P > positions_N[:, None] - rule.window
            expected = attention.decode_attention(q_NHD, k, v, pages_NB, visible_NP, 0.3, rule.softcap)
            ours = kernel.decode(q_NHD, k, v, pages_NB, positions_N, 0.3, rule)
            if fault := difference("a decode row", ours, expected, dtype):
                return fault
            k_KPD, v_KPD = (c[pages_NB[2]].flatten(0, 1)[:50].transpose(0, 1) for c in (k, v))
            expected = attention.span_attention(q_NHD.transpose(0, 1), k_KPD, v_KPD, 0.3, rule).transpose(0, 1)
            ours = kernel.chunk(q_NHD, k, v, pages_NB[2], 47, 0.3, rule)
            if fault := difference("a chunk's row", ours, expected, dtype):
                return fault
    return None


def check_row_ops(device: torch.device) -> str | None:
    """Each operation on odd sizes against float64, backward too."""
    ops, epsilon = TritonRowOps(), 1e-5
    for dtype in _TYPES:
        x, delta, dy, weight = (random(*s, dtype=dtype, device=device) for s in ((3, 45), (4, 45), (5, 45), (45,)))
        delta, dy = delta[:3], dy[:3]
        total, y = (x + delta).double().requires_grad_(), torch.empty_like(x)
        with torch.enable_grad():
            norm = weight.double() * total * (total.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        ops.rms_norm(x, Norm(weight, epsilon), y, delta)
        wide, half = random(3, 42, dtype=dtype, device=device), torch.empty(3, 21, dtype=dtype, device=device)
        gate, up = (t.double().requires_grad_() for t in wide.chunk(2, dim=-1))
        with torch.enable_grad():
            gated = gate * gate.sigmoid() * up
        ops.gated(wide, half, SILU)
        ours = triton_rows.gated_backward(wide[:, :21], wide[:, 21:], dy[:, :21], SILU)
        theirs = torch.autograd.grad(gated, (gate, up), dy[:, :21].double())
        (dx,) = torch.autograd.grad(norm, total, dy.double())
        pairs = [
            ("x", x, total.detach()),
            ("norm", y, norm.detach()),
            ("dx", triton_rows.rms_norm_backward(x, weight, epsilon, dy, one_plus=False), dx),
            ("swiglu", half, gated.detach()),
            ("dgate", ours[0], theirs[0]),
            ("dup", ours[1], theirs[1]),
            *_rotated(dtype, device),
        ]
        if fault := next((f for pair in pairs if (f := difference(*pair, dtype))), None):
            return fault
    return None


def _rotated(dtype: torch.dtype, device: torch.device) -> list[tuple[str, Tensor, Tensor]]:
    """Two query heads, one kv head of 22; the last of three rows goes to the cache."""
    qkv, cos, sin = (random(*s, dtype=dtype, device=device) for s in ((3, 88), (3, 22), (3, 22)))
    k, v = (torch.zeros(1, 4, 1, 22, dtype=dtype, device=device) for _ in range(2))
    heads = qkv.double()[:, :66].view(3, 3, 22)
    turned = torch.cat([-heads[..., 11:], heads[..., :11]], dim=-1)
    rotated = (heads * cos.double()[:, None] + turned * sin.double()[:, None]).view(3, 66)
    values = qkv[2, 66:].clone()
    TritonRowOps().rotary_and_write(qkv, (cos, sin), 2, 1, (k, v, torch.tensor([3], device=device)))
    return [("rotary", qkv[:, :66], rotated), ("K", k[0, 3, 0], rotated[2, 44:]), ("V", v[0, 3, 0], values)]


CHECKS: Mapping[str, Check] = {
    "smlm_forward": check_smlm_forward,
    "smlm_backward": check_smlm_backward,
    "decode_attention": check_decode_attention,
    "row_ops": check_row_ops,
}
"""By kernel name (`select.KERNELS`); a kernel without an entry has no Triton version."""
