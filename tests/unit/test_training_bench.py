"""The training benchmark: its arithmetic, and both sides on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import save_tiny

from loquetier.bench.training import _expect_same_work, _pair_task, summarize
from loquetier.bench.training_sides import Task, ours, pair, peer
from loquetier.errors import EngineError


def test_ratios_are_ours_over_the_peers() -> None:
    sides = {
        "ours": [{"tokens_per_s": 600.0, "peak_bytes": 2.0}, {"tokens_per_s": 500.0, "peak_bytes": 2.0}],
        "peer": [{"tokens_per_s": 200.0, "peak_bytes": 8.0}, {"tokens_per_s": 200.0, "peak_bytes": 8.0}],
    }
    s = summarize(sides)
    assert s["speed_ratio"] == 2.75 and s["memory_ratio"] == 0.25


def test_two_jobs_have_as_many_examples_whatever_the_batch() -> None:
    task = Task(data="", steps=3, batch_size=8)
    sizes = {(_pair_task(task, size).steps + 1) * size for size in (8, 1)}
    assert sizes == {32, 16}  # two steps of each job at batch 8, eight at batch 1


def test_sides_that_do_other_work_are_an_error() -> None:
    same = {"tokens": [5], "losses": [2.0]}
    _expect_same_work(same, {"tokens": [5], "losses": [2.01]})
    for other in ({"tokens": [6], "losses": [2.0]}, {"tokens": [5], "losses": [2.2]}):
        with pytest.raises(EngineError, match="the sides differ"):
            _expect_same_work(same, other)


def test_both_sides_train_the_same(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama", context=512)
    lines = [{"question": "abc " * (n % 5 + 1), "answer": "def " * (n % 3 + 1)} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    task = Task(
        data=str(tmp_path / "data.jsonl"), base=str(tmp_path / "base"), dtype="float32", steps=1, batch_size=2, rank=2,
        autocast=False,
    )  # fmt: skip
    mine, theirs = ours(task), peer(task)
    _expect_same_work(mine, theirs)
    assert len(mine["seconds"]) == len(theirs["seconds"]) == 1
    assert mine["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-4)
    assert pair(task)["tokens"] > 0
