"""Where these tests run: in the interpreter on the CPU, or, without TRITON_INTERPRET, on a GPU."""

from __future__ import annotations

import torch

from loquetier.kernels.triton_load import interpreted

DEVICE = torch.device("cpu" if interpreted() else "cuda")
FLOAT32 = 2e-6 if interpreted() else 1e-5
"""Of the largest value. On a GPU a float32 product is three TF32 ones, which lose its last bits; not measured yet."""
