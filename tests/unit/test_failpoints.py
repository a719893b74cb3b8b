"""Fail points: what the variable may say, and that nothing happens without it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest
from tests.unit.test_import_direction import SRC

from loquetier.errors import ConfigError
from loquetier.failpoints import POINTS, SERVER_POINTS, VARIABLE, fail_points, no_fail_point


def test_without_the_variable_nothing_happens() -> None:
    assert fail_points({}) is no_fail_point
    for point in (*POINTS, *SERVER_POINTS):
        assert fail_points({VARIABLE: ""})(point) is None


@pytest.mark.parametrize("value", ["nowhere", "job.after_step:", "job.after_step:0", "job.after_step:-1", ":2", "x:1"])
def test_a_wrong_value_is_an_error_that_lists_the_places(value: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.before_rename"):
        fail_points({VARIABLE: value})


@pytest.mark.parametrize(("value", "passes"), [("job.after_step", 1), ("job.after_step:3", 3)])
def test_the_process_dies_at_the_pass_that_was_asked_for(value: str, passes: int) -> None:
    code = (
        "from loquetier.failpoints import fail_points\n"
        f"hit = fail_points({{{VARIABLE!r}: {value!r}}})\n"
        "for i in range(5):\n"
        "    hit('job.before_end')\n"
        "    print(i, flush=True)\n"
        "    hit('job.after_step')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SRC.parent)}, check=False
    )
    assert run.returncode == -signal.SIGKILL
    assert run.stdout.split() == [str(i) for i in range(passes)]


def test_every_place_is_passed_somewhere_and_no_other_is() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in SRC.rglob("*.py") if p.name != "failpoints.py")
    assert set(re.findall(r'fail_point\("([^"]+)"\)', text)) == {*POINTS, *SERVER_POINTS}
    assert text.count("fail_point(") == text.count('fail_point("')  # none by a name made at run time
