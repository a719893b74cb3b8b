"""What `doctor` says of the packed weights, and buffers on huge pages."""

from __future__ import annotations

import torch

from loquetier.config import MIB, EngineConfig
from loquetier.doctor import _packed
from loquetier.kernels.gemm import NO_KERNEL, GemmKernel
from loquetier.kernels.huge_pages import HUGE_PAGE, on_huge_pages
from loquetier.kernels.select import process_kernels


def test_doctor_says_whether_weights_will_be_packed() -> None:
    library = process_kernels("cpu").native("base_gemm")
    packs = library is not None and GemmKernel(library).level != NO_KERNEL
    assert _packed(EngineConfig(dtype="float32", device="cpu"), MIB).startswith("none")
    said = _packed(EngineConfig(dtype="bfloat16", device="cpu"), MIB)
    assert said.startswith("some 1 MiB" if packs else "none")
    assert _packed(EngineConfig(dtype="bfloat16", device="cpu"), 1 << 50).startswith("none")
    assert _packed(EngineConfig(dtype="bfloat16", device="cuda"), MIB).startswith("none")


def test_huge_pages_are_advice() -> None:
    """The same tensor, whatever its size and place, and what was written stays."""
    for elements in (0, 10, HUGE_PAGE, 3 * HUGE_PAGE + 17):
        buffer = torch.arange(elements, dtype=torch.float32)
        assert on_huge_pages(buffer) is buffer and torch.equal(buffer, torch.arange(elements, dtype=torch.float32))
        part = buffer[min(3, elements) :]
        assert on_huge_pages(part) is part
