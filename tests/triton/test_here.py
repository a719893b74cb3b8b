"""Whether the tests of the Triton kernels run here at all."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from loquetier.kernels.select import choose_kernels


def test_triton_is_here() -> None:
    """Skipped, with the reason, where the other tests of this directory are not collected."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the Triton kernels are tested by `make test-triton`, which brings triton along")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreted or torch.cuda.is_available()):
        pytest.skip("the Triton kernels need a GPU, or the interpreter: TRITON_INTERPRET=1 (make test-triton)")
    kernels = choose_kernels({**os.environ, "LOQUETIER_KERNELS": "triton"}, "cpu" if interpreted else "cuda")
    for kernel in ("smlm_forward", "smlm_backward", "decode_attention", "row_ops"):
        assert kernels.in_triton(kernel), kernels.choices[kernel]
