"""Norms, rotary with the KV write and gated activations against Hugging Face's own code."""

from __future__ import annotations

import pytest
import torch
from tests.triton.device import DEVICE, FLOAT32
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from loquetier.kernels import triton_rows
from loquetier.kernels.rowops import GELU_TANH, SILU, Norm
from loquetier.kernels.triton_rows import TritonRowOps

TOLERANCE = {torch.float32: FLOAT32, torch.bfloat16: 1.6e-2}
"""A few float32 roundings; two bfloat16 ones of 2**-7 each, since the interpreter cuts off where a GPU rounds."""
TYPES = list(TOLERANCE)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy, at large gates
NORMS = {"llama": (LlamaRMSNorm, False), "gemma": (Gemma2RMSNorm, True)}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (5, 45), (3, 600), (0, 8)])
def test_norm_forward_and_backward(rows: int, dim: int, name: str, dtype: torch.dtype) -> None:
    module_type, one_plus = NORMS[name]
    module = module_type(dim, eps=1e-5).to(DEVICE, dtype)
    module.weight.data.copy_(1 + 0.3 * random(dim))
    wide = random(rows, dim + 7, dtype=dtype)
    x = wide[:, 3 : 3 + dim]  # rows with gaps between them
    close(triton_rows.rms_norm(x, module.weight.data, 1e-5, one_plus=one_plus), module(x).detach(), dtype)
    exact = x.double().requires_grad_()
    dy = random(rows, dim, dtype=dtype, seed=1)
    weight = module.weight.data.double() + (1 if one_plus else 0)
    y = weight * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    (dx,) = torch.autograd.grad(y, exact, dy.double())
    close(triton_rows.rms_norm_backward(x, module.weight.data, 1e-5, dy, one_plus=one_plus), dx, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norm_with_residual_and_of_heads(dtype: torch.dtype) -> None:
    ops, norm = TritonRowOps(), LlamaRMSNorm(45, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data.copy_(1 + 0.3 * random(45))
    x, delta = random(4, 45, dtype=dtype), random(4, 45, dtype=dtype, seed=1)
    total, y = x + delta, torch.empty_like(x)
    ops.rms_norm(x, Norm(norm.weight.data, 1e-5), y, delta)
    close(x, total, dtype)
    close(y, norm(total).detach(), dtype)
    heads = random(3, 7 * 12, dtype=dtype)
    before, small = heads.clone(), LlamaRMSNorm(12, eps=1e-5).to(DEVICE, dtype)
    ops.head_norm(heads, 24, 3, Norm(small.weight.data, 1e-5))
    close(heads[:, 24:60], small(before[:, 24:60].view(3, 3, 12)).detach().view(3, 36), dtype)
    assert torch.equal(heads[:, :24], before[:, :24]) and torch.equal(heads[:, 60:], before[:, 60:])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "theirs"), [(SILU, F.silu), (GELU_TANH, lambda x: F.gelu(x, approximate="tanh"))]
)
@pytest.mark.parametrize(("rows", "dim"), [(3, 5), (2, 1100), (0, 4)])
def test_gated(rows: int, dim: int, activation: int, theirs: object, dtype: torch.dtype) -> None:
    wide = 3 * random(rows, 2 * dim, dtype=dtype)
    gate, up = wide[:, :dim], wide[:, dim:]
    y = torch.empty(rows, dim, dtype=dtype, device=DEVICE)
    triton_rows.gated(gate, up, y, activation)
    assert callable(theirs)
    exact_gate, exact_up = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = theirs(exact_gate) * exact_up
    close(y, theirs(gate) * up, dtype)
    dy = random(rows, dim, dtype=dtype, seed=1)
    expected = torch.autograd.grad(exact, (exact_gate, exact_up), dy.double())
    for ours, grad in zip(triton_rows.gated_backward(gate, up, dy, activation), expected, strict=True):
        torch.testing.assert_close(ours.double(), grad, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 20), (1, 1, 8), (3, 3, 64)])
@pytest.mark.parametrize("cached", [0, 2, 5])
def test_rotary_and_kv_write(cached: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """The last `cached` of five rows go to the cache; what is there already stays."""
    qkv = random(5, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cos, sin = (random(5, dim, dtype=dtype, seed=s) for s in (1, 2))
    q, k, v = (
        t.reshape(1, 5, -1, dim).transpose(1, 2) for t in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    theirs_q, theirs_k = (t[0].transpose(0, 1).clone() for t in apply_rotary_pos_emb(q, k, cos[None], sin[None]))
    theirs_v = v[0].transpose(0, 1).clone()
    caches = [torch.full((3, 4, kv_heads, dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    at = torch.tensor([9, 4, 6, 0, 11], device=DEVICE)[5 - cached :]
    written = TritonRowOps().rotary_and_write(qkv, (cos, sin), heads, kv_heads, (*caches, at) if cached else None)
    assert written == bool(cached)
    ours_q, ours_k, ours_v = (
        t.reshape(5, -1, dim) for t in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    close(ours_q, theirs_q, dtype)
    close(ours_k, theirs_k, dtype)
    assert torch.equal(ours_v, theirs_v)
    for cache, own in zip(caches, (ours_k, ours_v), strict=True):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[at], own[5 - cached :])
        others = torch.ones(12, dtype=torch.bool, device=DEVICE).index_fill(0, at, False)
        assert (flat[others] == 7).all()
