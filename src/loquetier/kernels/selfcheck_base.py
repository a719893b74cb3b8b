"""The checks of the base's kernels, as `kernels.selfcheck` has them for adapters and attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loquetier.kernels.gemm import AVX512_BF16, GemmKernel, pack_weights
from loquetier.kernels.native import DTYPE_CODES, NativeLibrary
from loquetier.kernels.rowops import RowOps
from loquetier.kernels.selfcheck import Check, difference


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))  # checking must not change what the process draws next
    return torch.randn(*shape, generator=generator).to(dtype)


def check_base_gemm(library: NativeLibrary) -> str | None:
    """Every level that this machine has, on odd sizes, with and without a bias."""
    for level in range(AVX512_BF16, GemmKernel(library).level + 1):
        for rows, n, k in ((1, 33, 70), (7, 48, 64), (16, 40, 31), (40, 72, 96)):
            x, w, bias = (_random(*shape, dtype=torch.bfloat16) for shape in ((rows, k), (n, k), (n,)))
            for b in (None, bias):
                (packed,) = pack_weights(GemmKernel(library, level), [w], [b])
                expected = x.double() @ w.double().T + (0 if b is None else b.double())
                if fault := difference("y", packed(x), expected, torch.bfloat16):
                    return fault
    return None


def check_row_ops(library: NativeLibrary) -> str | None:
    """Each operation on odd sizes against float64."""
    ops = RowOps(library)
    for dtype in DTYPE_CODES:
        x, delta, weight = (_random(*shape, dtype=dtype) for shape in ((3, 45), (3, 45), (45,)))
        total = x + delta
        y, expected = torch.empty_like(x), total.double() * total.double().square().mean(-1, keepdim=True).rsqrt()
        ops.rms_norm(x, weight, 0.0, y, delta)
        wide, half = _random(3, 42, dtype=dtype), torch.empty(3, 21, dtype=dtype)
        ops.swiglu(wide, half)
        gate, up = wide.double().chunk(2, dim=-1)
        q, cos, sin = (_random(*shape, dtype=dtype) for shape in ((3, 44), (3, 22), (3, 22)))
        heads = q.double().view(3, 2, 22)
        turned = torch.cat([-heads[..., 11:], heads[..., :11]], dim=-1)
        rotated = heads * cos.double()[:, None] + turned * sin.double()[:, None]
        ops.rotary(q, cos, sin, 2)
        pairs = [
            ("x", x, total),
            ("norm", y, expected * weight.double()),
            ("swiglu", half, gate * gate.sigmoid() * up),
            ("rotary", q, rotated.view(3, 44)),
        ]
        if fault := next((f for pair in pairs if (f := difference(*pair, dtype))), None):
            return fault
    return None


CHECKS: Mapping[str, Check] = {"base_gemm": check_base_gemm, "row_ops": check_row_ops}
"""Joined with `selfcheck.CHECKS` in `kernels.select`."""
