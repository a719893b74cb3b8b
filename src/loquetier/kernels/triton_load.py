"""Whether Triton can run here, and its self-checks. Importing this imports no Triton: a CPU installation has none."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Final

import torch

Check = Callable[[torch.device], str | None]
"""What is wrong with a Triton kernel on a device, in words; None when it does what the reference does."""
INTERPRET: Final = "TRITON_INTERPRET"
"""Triton's own variable. At "1" its kernels run on the CPU, one program after the other: for tests only."""


def why_not(environ: Mapping[str, str], device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of this kind of device; None when they can."""
    if device_type == "cpu" and environ.get(INTERPRET) != "1":
        return f"Triton kernels need a GPU; on a CPU they run only in Triton's interpreter ({INTERPRET}=1), for tests"
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton; torch's CUDA builds bring it along)"
    try:
        importlib.import_module("triton")
    except Exception as error:  # whatever a foreign binary package fails with: the caller names it
        return f"import triton fails: {error!r}"
    return None


TYPES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Types that the kernels take, by their name in `triton.language`."""


def interpreted() -> bool:
    """Whether this process's Triton kernels run in the interpreter."""
    return os.environ.get(INTERPRET) == "1"


def describe(device: torch.device) -> str:
    """Triton's version and what it runs on."""
    where = "its interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"triton {version('triton')}, {where}"


def fault_of(check: Check, device: torch.device) -> str | None:
    """What a check finds; a kernel that this GPU's compiler or driver refuses is a fault like any other."""
    try:
        return check(device)
    except Exception as error:  # Triton's and the driver's errors share no type
        return f"it fails with {type(error).__name__}: {str(error)[:500]}"


def checks() -> Mapping[str, Check]:
    """The self-check of each kernel that has a Triton version, by its name in `select.KERNELS`."""
    from loquetier.kernels.triton_check import CHECKS  # imports triton

    return CHECKS
