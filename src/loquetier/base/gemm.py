"""A frozen linear of the base: torch's GEMM on the original weight, or the C kernel on a packed copy of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loquetier.base.hardware import detect_hardware
from loquetier.kernels.gemm import AMX, ANY_ROWS, NO_KERNEL, GemmKernel, PackedWeight, pack_weights, packed_bytes
from loquetier.kernels.select import Kernels

log = logging.getLogger("loquetier.base")

MEMORY_SHARE = 0.4
"""Packed copies may take this part of the memory that is free once the weights are loaded; the rest is for KV, jobs."""


class BaseGemm:
    """``x [..., K] -> x W^T + b [..., N]`` with a frozen weight.

    Args:
        weight_NK: the original, which stays: the backward is ``dy @ W``, and embeddings may share it.
    """

    __slots__ = ("bias_N", "packed", "packed_back", "weight_NK")

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        self.weight_NK, self.bias_N = weight_NK, bias_N
        self.packed: PackedWeight | None = None
        self.packed_back: PackedWeight | None = None
        """Of the transposed weight, for `input_gradient`; made when training begins, see `pack_for_backward`."""

    def input_gradient(self, dy_TN: Tensor, dx_TK: Tensor) -> None:
        """``dx = dy W``, over what `dx_TK` (contiguous) holds."""
        packed = self.packed_back
        if packed is None or dy_TN.dtype != torch.bfloat16 or len(dy_TN) > packed.max_rows:
            torch.mm(dy_TN, self.weight_NK, out=dx_TK)
        else:
            packed.into(dy_TN.contiguous(), dx_TK)

    def drop_original(self) -> int:
        """Keep the packed copy alone, for any number of rows; returns the bytes given up. No backward from here on.

        What is left of the weight has its shape and no numbers: whoever still computes with it fails.
        """
        if self.packed is None or self.weight_NK.is_meta:
            return 0
        self.packed.max_rows = ANY_ROWS
        num_bytes = self.weight_NK.nbytes
        self.weight_NK = self.weight_NK.detach().to("meta")
        return num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """The base's output. Differentiable in x (torch's own way) where gradients are on and x asks for them."""
        packed = self.packed
        if (
            packed is None
            or x.numel() > packed.max_rows * packed.k
            or x.dtype != torch.bfloat16
            or (torch.is_grad_enabled() and x.requires_grad)
        ):
            return F.linear(x, self.weight_NK, self.bias_N)
        return packed(x)


class FrozenLinear(nn.Module):
    """Stands for an ``nn.Linear`` without adapters: the same numbers from a `BaseGemm`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.gemm = BaseGemm(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        return self.gemm(x)


def pack_base(gemms: Sequence[BaseGemm], kernels: Kernels) -> int:
    """Give each bfloat16 GEMM on a CPU its packed copy; returns the bytes taken, 0 when nothing is packed.

    All or nothing: a base of which half is fast is no easier to predict than one that is not.
    """
    library = kernels.native("base_gemm")
    if library is None or not gemms or any(not _fits(g) for g in gemms):
        return 0
    kernel = GemmKernel(library)
    if kernel.level == NO_KERNEL:
        return 0
    weights = [g.weight_NK.detach() for g in gemms]
    needed, free = packed_bytes(kernel, weights), detect_hardware("cpu").free_memory
    if needed > MEMORY_SHARE * free:
        log.warning("base weights are not packed: %d MiB of %d MiB free memory is too much; steps with few rows "
                    "will be slower", needed >> 20, free >> 20)  # fmt: skip
        return 0
    packed = pack_weights(kernel, weights, [g.bias_N for g in gemms])
    for gemm, copy in zip(gemms, packed, strict=True):
        gemm.packed = copy
    log.info("base weights packed for the CPU kernel: %d MiB beside the originals", needed >> 20)
    return needed


def pack_for_backward(gemms: Sequence[BaseGemm], kernels: Kernels) -> int:
    """Give each packed GEMM a copy of its transposed weight too; returns the bytes taken, 0 when nothing is packed.

    Only with AMX, where the kernel takes any number of rows, and like `pack_base` only where memory allows.
    """
    library = kernels.native("base_gemm")
    if library is None or any(g.packed is None for g in gemms):
        return 0
    kernel = GemmKernel(library)
    weights = [g.weight_NK.detach().T for g in gemms]
    needed, free = packed_bytes(kernel, weights), detect_hardware("cpu").free_memory
    if kernel.level < AMX or needed > MEMORY_SHARE * free:
        log.info("the backward multiplies by the original weights: no AMX, or no memory for a copy")
        return 0
    for gemm, copy in zip(gemms, pack_weights(kernel, weights, [None] * len(gemms)), strict=True):
        gemm.packed_back = copy
    log.info("base weights packed for the backward: %d MiB", needed >> 20)
    return needed


def _fits(gemm: BaseGemm) -> bool:
    w = gemm.weight_NK
    return w.dtype == torch.bfloat16 and w.is_cpu and w.dim() == 2 and w.is_contiguous()
