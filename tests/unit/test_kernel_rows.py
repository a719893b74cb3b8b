"""Norms and gated activations of a model on C kernels: only where they agree, and for the train rows alone."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loquetier.base.context import Binding, StepContext
from loquetier.base.kernel_rows import RowLibrary, gate_kernel, make_kernel_rows, norm_kernel, row_library
from loquetier.kernels.select import choose_kernels

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def rows() -> RowLibrary:
    found = row_library(choose_kernels({**os.environ, "LOQUETIER_KERNELS": "auto"}))
    if found is None:
        pytest.skip("no C kernels here")
    return found


class Scaled(nn.Module):
    """Looks like an RMSNorm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_only_modules_that_agree_get_a_kernel(rows: RowLibrary) -> None:
    like = torch.empty(0)
    assert norm_kernel(Scaled(), rows) is None
    assert norm_kernel(nn.LayerNorm(8), rows) is None
    assert norm_kernel(LlamaRMSNorm(8).double(), rows) is None
    assert gate_kernel(ACT2FN["relu"], 8, like, rows) is None
    assert gate_kernel(ACT2FN["gelu"], 8, like, rows) is None, "the exact one, not tanh's"
    assert gate_kernel(ACT2FN["silu"], 8, like, rows) is not None
    assert gate_kernel(ACT2FN["gelu_pytorch_tanh"], 8, like, rows) is not None


def test_reference_has_none() -> None:
    assert row_library(choose_kernels({"LOQUETIER_KERNELS": "reference"})) is None


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("norm_type", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("heads_first", [False, True])
def test_a_norm_of_heads_keeps_train_rows_only(
    rows: RowLibrary, norm_type: type[nn.Module], dtype: torch.dtype, heads_first: bool
) -> None:
    """q norms get views of a wider matrix; rows behind the train rows get no gradient."""
    norm = norm_type(6, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.add_(0.3 * torch.randn(6, generator=torch.Generator().manual_seed(0)).to(dtype))
    kernel = norm_kernel(norm, rows)
    assert kernel is not None
    binding = Binding()
    binding.step = StepContext(num_rows=5, num_train=3)
    ours = make_kernel_rows(kernel, norm.forward, binding, dtype)
    wide = torch.randn(1, 5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads, outputs = [], []
    for call, rows_kept in ((ours, 5), (norm.forward, 3)):
        leaf = wide.clone().requires_grad_()
        x = leaf[..., 4:28].view(1, 5, 4, 6)
        x = x.transpose(1, 2) if heads_first else x
        out = call(x)
        outputs.append(out.detach())
        kept = out.narrow(2 if heads_first else 1, 0, rows_kept)
        (grad,) = torch.autograd.grad(kept.square().sum(), leaf)
        grads.append(grad)
    small = {torch.float32: 1e-5, BF16: 3e-2}[dtype]  # eager code rounds after each operation, the kernel at the end
    torch.testing.assert_close(*outputs, rtol=small, atol=small)
    torch.testing.assert_close(*grads, rtol=small, atol=small)
    assert not grads[0][:, 3:].any()


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("together", [False, True])
def test_a_gate_keeps_train_rows_only(rows: RowLibrary, activation: str, together: bool) -> None:
    """Gate and up as halves of one matrix, or as matrices of their own with other distances between rows."""
    act = ACT2FN[activation]
    kernel = gate_kernel(act, 7, torch.empty(0), rows)
    assert kernel is not None
    binding = Binding()
    binding.step = StepContext(num_rows=5, num_train=3)
    ours = make_kernel_rows(kernel, lambda gate, up: act(gate) * up, binding, torch.float32)
    wide = torch.randn(1, 5, 14, generator=torch.Generator().manual_seed(2))
    results = []
    for call, rows_kept in ((ours, 5), (lambda gate, up: act(gate) * up, 3)):
        leaf = wide.clone().requires_grad_()
        gate, up = leaf[..., :7], leaf[..., 7:] if together else leaf[..., 7:] * 1
        out = call(gate, up)
        results.append((out.detach(), *torch.autograd.grad(out[:, :rows_kept].square().sum(), leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_models_own_code_runs_while_something_is_held_against_it(rows: RowLibrary) -> None:
    kernel = gate_kernel(ACT2FN["silu"], 4, torch.empty(0), rows)
    assert kernel is not None
    binding = Binding()
    called: list[int] = []

    def own(gate: Tensor, up: Tensor) -> Tensor:
        called.append(1)
        return gate * up

    both = make_kernel_rows(kernel, own, binding, torch.float32)
    x = torch.ones(1, 2, 4)
    both(x, x)
    assert not called
    binding.own_code = True
    both(x, x)
    assert called
