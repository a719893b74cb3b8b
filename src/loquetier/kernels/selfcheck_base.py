"""The checks of the base's kernels, as `kernels.selfcheck` has them for adapters and attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from loquetier.kernels.gemm import AVX512_BF16, GemmKernel, pack_weights
from loquetier.kernels.kv_write import NativeKvWrite
from loquetier.kernels.native import DTYPE_CODES, NativeLibrary
from loquetier.kernels.rowops import GELU_TANH, SILU, Norm, RowOps
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
        wide, half = _random(3, 42, dtype=dtype), torch.empty(3, 21, dtype=dtype)
        gate, up = wide.double().chunk(2, dim=-1)
        pairs = [*_normed(ops, dtype, one_plus=False), *_normed(ops, dtype, one_plus=True)]
        for number, active in ((SILU, gate * gate.sigmoid()), (GELU_TANH, F.gelu(gate, approximate="tanh"))):
            ops.gated(wide, half, number)
            pairs.append(("gated", half.clone(), active * up))
        q, cos, sin = (_random(*shape, dtype=dtype) for shape in ((3, 44), (3, 22), (3, 22)))
        rotated = _rotated(q.view(3, 2, 22), cos, sin)
        ops.rotary(q, cos, sin, 2)
        pairs.append(("rotary", q, rotated.view(3, 44)))
        if fault := next((f for pair in pairs if (f := difference(*pair, dtype))), None):
            return fault
    return None


def _normed(ops: RowOps, dtype: torch.dtype, *, one_plus: bool) -> list[tuple[str, Tensor, Tensor]]:
    """A norm of a sum, without and with a norm of what is added."""
    x, weight_D = _random(3, 45, dtype=dtype), _random(45, dtype=dtype)
    delta, y = x.flip(0), torch.empty_like(x)
    norm, post = Norm(weight_D, 0.0, one_plus), Norm(weight_D.flip(0), 0.0, one_plus)
    total = x + delta
    ops.rms_norm(x, norm, y, delta)
    pairs = [("x", x.clone(), total), ("norm", y.clone(), _norm(total, norm))]
    total = x + _norm(delta, post).to(dtype)
    ops.rms_norm(x, norm, y, delta, post)
    return [*pairs, ("x", x, total), ("norm behind", y, _norm(total, norm))]


def _norm(x: Tensor, norm: Norm) -> Tensor:
    x = x.double()
    return x * x.square().mean(-1, keepdim=True).rsqrt() * (norm.weight_D.double() + norm.one_plus)


def _rotated(x_MHD: Tensor, cos_MD: Tensor, sin_MD: Tensor) -> Tensor:
    x = x_MHD.double()
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos_MD.double()[:, None] + turned * sin_MD.double()[:, None]


def check_kv_write(library: NativeLibrary) -> str | None:
    """Heads of which a part turns, lying row by row and head by head; the last two of three rows are written."""
    write = NativeKvWrite(library)
    for dtype in DTYPE_CODES:
        cos, sin = _random(3, 14, dtype=dtype), _random(3, 14, dtype=dtype).flip(0)
        for heads_first in (False, True):
            shape = (4, 3, 22) if heads_first else (3, 4, 22)
            q, k, v = (_random(*shape, dtype=dtype).flip(i) for i in range(3))
            if heads_first:
                q, k, v = (t.transpose(0, 1) for t in (q, k, v))
            expected = [torch.cat([_rotated(t[..., :14], cos, sin), t[..., 14:].double()], -1) for t in (q, k)]
            keys, values = torch.zeros(2, 2, 2, 4, 22, dtype=dtype)
            write(q, k, v, (cos, sin), (keys, values, torch.tensor([3, 1])))
            right = [torch.zeros(4, 4, 22, dtype=torch.double) for _ in range(2)]
            for cache, rows in zip(right, (expected[1], v), strict=True):
                cache[3], cache[1] = rows[1], rows[2]
            pairs = [
                *zip(("q", "k"), (q, k), expected, strict=True),
                ("K", keys.view(4, 4, 22), right[0]),
                ("V", values.view(4, 4, 22), right[1]),
            ]
            if fault := next((f for pair in pairs if (f := difference(*pair, dtype))), None):
                return fault
    return None


CHECKS: Mapping[str, Check] = {"base_gemm": check_base_gemm, "row_ops": check_row_ops, "kv_write": check_kv_write}
"""Joined with `selfcheck.CHECKS` in `kernels.select`."""
