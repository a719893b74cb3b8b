"""An engine on the Triton kernels, interpreted: what it serves and trains is what it does on plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.training_helpers import ask, load_random_adapter, make_engine, run
from torch import nn
from transformers.activations import ACT2FN

from loquetier.adapters.spec import LoraSpec
from loquetier.base.context import Binding, StepContext
from loquetier.base.fuse import fused_stack
from loquetier.base.kernel_rows import TritonRows, gate_kernel, make_kernel_rows, norm_kernel
from loquetier.kernels.rowops import RowKernels
from loquetier.kernels.triton_rows import TritonRowOps

ROOT = Path(__file__).parents[2]
LOSS_RTOL, GRADIENT_RTOL = 1e-5, 1e-4
"""float32 rounds at 6e-8, and twice the depth of a model magnifies it; a wrong row or mask shows at 1e-2 and above."""


def outcome(kernels: str, argument: str, program: str = "engine_run") -> dict[str, Any]:
    environ = os.environ | {"LOQUETIER_KERNELS": kernels}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"tests.triton.{program}", argument]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_serving_and_training_equal_the_reference(family: str) -> None:
    """Three names served, one trained with dropout; prompts in chunks; gemma2 adds window, softcap, GeGLU, (1 + w)."""
    ours, theirs = outcome("triton", family), outcome("reference", family)
    in_triton = {name for name, backend in ours["backends"].items() if backend == "triton"}
    assert in_triton == {"smlm_forward", "smlm_backward", "decode_attention", "row_ops"}
    assert set(theirs["backends"].values()) == {"reference"}
    assert ours["tokens"] == theirs["tokens"]
    assert len(ours["losses"]) == 2
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=LOSS_RTOL, atol=0)
    for own, other in zip(ours["gradients"], theirs["gradients"], strict=True):
        own, other = torch.tensor(own), torch.tensor(other)
        assert other.any()
        assert (own - other).abs().max() <= GRADIENT_RTOL * other.abs().max()


def test_decode_steps_from_fixed_tables_equal_the_reference() -> None:
    """What a CUDA graph would replay: tables in place, SMLM's segments from the device, padding rows beside them."""
    ours, theirs = outcome("triton", "graphs", "graph_run"), outcome("reference", "plain", "graph_run")
    assert ours["tokens"] == theirs["tokens"]
    assert ours["replays"] > ours["captures"] > 3 and theirs["replays"] == 0


class Counted:
    """Hands its calls on and counts the layers' rotary."""

    def __init__(self, ops: RowKernels) -> None:
        self._ops, self.written = ops, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def rotary_and_write(self, *args: Any) -> bool:
        written = self._ops.rotary_and_write(*args)
        self.written += written
        return written


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_fused_stack_on_triton(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where every layer must give the model's own output within 1e-4. Kept from float32 bases otherwise.

    The interpreter's bfloat16 cuts off instead of rounding, so the fused stack cannot be held against the model there.
    """
    answers = []
    for fused in (False, True):
        engine = make_engine(family, model={"layers": 2, "hidden": 16}, max_prefill_rows=6)
        base = engine.base
        assert base.fused is None
        ops = Counted(TritonRowOps())
        if fused:
            base.fused = fused_stack(base.loaded.model, base._stack, base._layers, ops, base._during)
            assert base.fused is not None
            monkeypatch.setattr("loquetier.kernels.decode._triton", triton_attention)
        load_random_adapter(engine, "one", LoraSpec(r=4), 1)
        asked = [ask(engine, name, range(10, 10 + n), 3) for name, n in (("one", 9), ("tiny", 2))]
        run(engine)
        engine.check_integrity()
        answers.append([a.tokens for a in asked])
        assert (ops.written > 0) == fused
    assert answers[0] == answers[1]


def triton_attention(_device_type: str) -> Any:
    from loquetier.kernels.triton_attention import TritonAttention

    return TritonAttention()


class Scaled(nn.Module):
    """Looks like an RMSNorm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_only_modules_that_agree_are_swapped() -> None:
    like = torch.empty(0)
    assert norm_kernel(Scaled(), TritonRows()) is None
    assert norm_kernel(nn.LayerNorm(8), TritonRows()) is None
    assert gate_kernel(ACT2FN["relu"], 8, like, TritonRows()) is None
    assert gate_kernel(ACT2FN["gelu"], 8, like, TritonRows()) is None, "the exact one, not tanh's"
    assert gate_kernel(ACT2FN["silu"], 8, like, TritonRows()) is not None
    assert gate_kernel(ACT2FN["gelu_pytorch_tanh"], 8, like, TritonRows()) is not None
    assert gate_kernel(ACT2FN["silu"], 8, like.double(), TritonRows()) is None


def test_a_swapped_module_differentiates_train_rows_only() -> None:
    """Rows behind the train rows get no gradient; other types run the module's own code."""
    binding = Binding()
    binding.step = StepContext(num_rows=5, num_train=3)
    kernel = gate_kernel(ACT2FN["silu"], 6, torch.empty(0), TritonRows())
    assert kernel is not None
    own = make_kernel_rows(kernel, lambda gate, up: nn.functional.silu(gate) * up, binding, torch.float32)
    gate, up = (torch.randn(1, 5, 6).requires_grad_() for _ in range(2))
    own(gate, up).sum().backward()
    exact = [x.detach().clone().requires_grad_() for x in (gate, up)]
    (nn.functional.silu(exact[0]) * exact[1])[:, :3].sum().backward()
    for ours, theirs in zip((gate, up), exact, strict=True):
        assert ours.grad is not None and not ours.grad[:, 3:].any()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
    double = [x.detach().double() for x in (gate, up)]
    assert torch.equal(own(*double), nn.functional.silu(double[0]) * double[1])
