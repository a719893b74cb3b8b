"""Every kernel, as the host code launches it, becomes machine code for an A100 and an H100 without spilling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one block may have (CUDA C++ Programming Guide, compute capabilities)."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, int | str | bool]]:
    """A process of its own: this one's kernels are interpreted."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.compiled"],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled(compiled: list[dict[str, int | str | bool]]) -> None:
    sources = (ROOT / "src" / "loquetier" / "kernels").glob("triton_*_kernels.py")
    names = {
        line.split("(")[0].removeprefix("def ")
        for path in sources
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert names and {str(line["kernel"]) for line in compiled} == names


def test_nothing_spills_and_all_fits(compiled: list[dict[str, int | str | bool]]) -> None:
    for line in compiled:
        assert line["stack"] == 0, line
        assert int(line["shared"]) <= SHARED[int(line["capability"])], line


def test_products_run_on_tensor_cores_and_wide_rows_in_wide_loads(compiled: list[dict[str, int | str | bool]]) -> None:
    """Odd widths excepted: their rows do not start at multiples of 16 bytes."""
    dots = ("shrink_kernel", "expand_kernel", "wgrad_kernel", "paged_kernel")
    for line in compiled:
        if line["kernel"] in dots:
            assert line["tensor_cores"], line
            assert line["wide_loads"] or "odd" in str(line["launch"]), line
