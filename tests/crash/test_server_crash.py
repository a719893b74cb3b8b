"""A server killed anywhere between a load and the unload of what was trained has lost nothing it acknowledged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.server.fixtures import make_adapter
from tests.tiny import save_tiny

from loquetier.config import EngineConfig
from loquetier.failpoints import SERVER_POINTS
from loquetier.runtime import Runtime

ROOT = Path(__file__).parents[2]
STORY = (
    "adapter.before_rename",
    "adapter.before_commit",
    "load.after_commit",
    "unload.before_commit",
    "unload.after_commit",
    "upload.before_rename",
    "upload.before_commit",
    "upload.after_commit",
    "create.before_commit",
    "create.after_commit",
    "job.after_step:2",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "adapter.before_rename",
    "adapter.before_commit",
    "job.before_publish:2",
    "job.before_end",
    "finish.before_commit",
    "finish.after_commit",
    "unload.before_commit",
    "unload.after_commit",
)
"""The lives of one server, each killed where the story comes to next."""


def report_of(directory: Path, *options: str) -> dict[str, Any]:
    """Run the driver in a process of its own: this one may have threads, and a process with threads must not fork."""
    save_tiny(directory / "base", "llama", vocab=260)
    config = EngineConfig(dtype="float32", device="cpu", kv_memory=1 << 20, adapter_memory=1 << 20)
    with Runtime(str(directory / "base"), config=config) as runtime:
        make_adapter(runtime, directory / "given", seed=1)
    command = [
        sys.executable,
        str(ROOT / "tests" / "crash" / "server_driver.py"),
        str(directory / "base"),
        str(directory),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *options], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def check(report: dict[str, Any]) -> None:
    whole = report["unbroken"]
    assert [step for step, _ in whole["steps"]] == list(range(1, 13)) and whole["counts"] == [2, 1]
    assert whole["checkpoints"] == [9, 6] and whole["numbers_rise"] and whole["messages"][-1].startswith("The job has")
    for story in report["stories"]:
        same = ("weights", "steps", "results", "tokens", "text", "given", "counts", "numbers_rise", "checkpoints")
        for what in same:
            assert story[what] == whole[what], f"{what} after {story['kills']}"
        assert sorted(story["messages"]) == sorted(whole["messages"]), story["kills"]
        assert story["leftovers"] == story["orphans"] == story["job_rooms"] == []
    assert not whole["leftovers"] and not whole["orphans"] and not whole["job_rooms"]


def test_row_44_a_server_killed_at_every_place_of_its_story(tmp_path: Path) -> None:
    report = report_of(tmp_path, "--ends", ",".join(STORY))
    check(report)
    assert report["stories"][0]["kills"] == list(STORY), "a place was never reached, so nothing was killed there"
    assert {point.partition(":")[0] for point in STORY} >= set(SERVER_POINTS)


@pytest.mark.crash_full
@pytest.mark.timeout(3600)
def test_row_44_a_server_killed_at_a_hundred_random_instants(tmp_path: Path) -> None:
    report = report_of(tmp_path, "--random", "100", "--seed", "3")
    check(report)
    assert sum(len(story["kills"]) for story in report["stories"]) >= 100
