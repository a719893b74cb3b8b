"""Every Triton kernel compiled to machine code for GPUs that are not here. Run as a program, without the interpreter.

The interpreter hides what a compiler refuses: types that do not meet, shapes that are no powers of two, tiles too
large for a multiprocessor. So the launches of the real host code, on the sizes of an 8B model, are compiled instead of
run. ptxas tells registers, spilled bytes and shared memory; one JSON line per kernel and GPU goes to stdout.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = (90, 80)
"""Compute capabilities: H100 and H200; A100."""


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Inside, a launch compiles for `capability` and runs nothing; the kernels are collected."""
    found: list[Any] = []
    launch = JITFunction.__getitem__

    def compile_only(self: Any, grid: Any) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            if all(kernel is not k for k in found):
                found.append(kernel)

        return call

    target = GPUTarget("cuda", capability, 32)
    driver.set_active(  # type: ignore[arg-type]
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: capability, get_current_stream=lambda _: 0
        )
    )
    JITFunction.__getitem__ = compile_only
    try:
        yield found
    finally:
        JITFunction.__getitem__ = launch


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack (where spilled registers go) per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found, out
    return {"registers": int(found[1]), "stack": int(found[2])}


def report(launches: Callable[[], None], capability: int) -> Iterator[dict[str, Any]]:
    """What the compiler says of each kernel that `launches` launches."""
    with compiling(capability) as kernels, torch.no_grad():
        launches()
    for kernel in kernels:
        ptx = kernel.asm["ptx"]
        yield {
            "kernel": kernel.metadata.name,
            "capability": capability,
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            **resources(kernel.asm["cubin"]),
            "tensor_cores": bool(re.search(r"\b(mma|wgmma)\.", ptx)),
            "wide_loads": bool(re.search(r"ld\.global\S*\.v4|cp\.async\S* \[[^]]*\], \[[^]]*\], 0x10", ptx)),
        }


def main() -> None:
    """Compile everything and print it."""
    from tests.triton.launches import LAUNCHES

    for name, launches in LAUNCHES.items():
        for capability in TARGETS:
            for line in report(launches, capability):
                print(json.dumps({"launch": name, **line}))


if __name__ == "__main__":
    sys.exit(main())
