"""A job killed anywhere and restarted ends with the bytes of the run that nobody killed, and with its history."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny

from loquetier.failpoints import POINTS

ROOT = Path(__file__).parents[2]


def report_of(directory: Path, kills: int, seed: int) -> dict[str, Any]:
    """Run the driver in a process of its own: this one may have threads, and a process with threads must not fork."""
    save_tiny(directory / "base", "llama")
    command = [sys.executable, str(ROOT / "tests" / "crash" / "driver.py"), str(directory / "base"), str(directory)]
    run = subprocess.run(
        [*command, "--kills", str(kills), "--seed", str(seed)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def check(report: dict[str, Any], kills: int) -> None:
    whole = report["unbroken"]
    assert [record["step"] for record in whole["history"]] == list(range(1, 31))
    header, *rows = whole["results"].splitlines()
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, 31))
    assert [step for kind, step, _ in whole["metrics"] if kind == "step"] == list(range(1, 31))
    assert sum(run["kills"] for run in report["runs"]) >= kills
    for run in report["runs"]:
        where = f"killed at {run['point'] or 'random instants'}"
        assert run["sha256"] == whole["sha256"], where
        assert run["moments"] == whole["moments"], where
        # Every step once, in order, with the same numbers; only wall time may differ.
        assert run["history"] == whole["history"], where
        assert run["results"] == whole["results"], where
        assert run["metrics"] == whole["metrics"], where
        assert run["files"] == ["metrics.jsonl", "results.csv"], where
        assert run["leftovers"] == [".lock"], where


def test_twenty_kills(tmp_path: Path) -> None:
    report = report_of(tmp_path, 23, seed=1)
    check(report, 23)
    died = {run["point"] for run in report["runs"] if run["point"] and run["kills"]}
    assert died == set(POINTS), "a fail point was never reached, so nothing was killed there"
    assert sum(run["kills"] for run in report["runs"] if run["point"] is None) >= 20 - len(POINTS)


@pytest.mark.crash_full
@pytest.mark.timeout(3600)
def test_two_hundred_kills(tmp_path: Path) -> None:
    check(report_of(tmp_path, 200, seed=2), 200)
