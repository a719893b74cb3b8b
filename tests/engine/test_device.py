"""Every tensor of a step lies on the engine's device, and a step does not wait for it: on a device made of Python.

Nothing of this ran on a GPU. What it can show is what a GPU would refuse (two devices in one operation) or be slowed
down by (the host waiting for a value, a copy that is not queued).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

WAITS_ALLOWED = ("optimizer.py", "lora.py", "orientation.py", "shelf.py")
"""The norm that an optimizer step reports, once per optimizer step; weights that come from the host before any step has
them: a job's first, and a loaded adapter's (`shelf.py`: residency copies an incoming one from host memory)."""


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    """By tape. In a process of its own: a make-believe device cannot be taken out of torch again."""
    pytest.importorskip("torch.utils.backend_registration")
    environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.on_make_believe", "graph", "replay"],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(params=["graph", "replay"])
def report(request: pytest.FixtureRequest, reports: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = reports[request.param]
    return found


def test_the_device_computes_what_the_cpu_does(report: dict[str, Any]) -> None:
    assert report["kv_device"] == "fakegpu"
    assert report["found"]["tokens"] == report["expected"]["tokens"]
    # The CPU engine may use its C kernels: other orders of the same float32 sums.
    assert report["found"]["losses"] == pytest.approx(report["expected"]["losses"], abs=1e-4)
    assert len(report["found"]["losses"]) >= 3


def test_served_rows_run_fused_and_as_the_models_own_code(reports: dict[str, Any]) -> None:
    assert {tape: found["fused"] for tape, found in reports.items()} == {"graph": True, "replay": False}


def test_no_operation_mixes_devices(report: dict[str, Any]) -> None:
    assert report["mixed"] == report["noticed"], "only the one that the program makes on purpose"
    assert len(report["noticed"]) == 1


def test_steps_do_not_wait_for_the_device(report: dict[str, Any]) -> None:
    unexpected = [w for w in report["waits"] if not any(f"at {file}" in w for file in WAITS_ALLOWED)]
    assert not unexpected
    assert any("at optimizer.py" in w for w in report["waits"]), "a wait is noticed where there is one"


def test_a_decode_step_sends_its_tables_in_one_copy(report: dict[str, Any]) -> None:
    assert report["copies_per_decode_step"]
    assert set(report["copies_per_decode_step"]) == {1, 0}, "none in the last call, which only delivers"
