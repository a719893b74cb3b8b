"""The benchmark's arithmetic, and one tiny round of it against PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import save_tiny

from loquetier.bench.report import insert, markdown
from loquetier.bench.run import run, save, summarize
from loquetier.bench.view import table
from loquetier.bench.workload import Workload


def test_rates_come_from_medians_and_ratios_are_peer_over_ours() -> None:
    seconds = {
        "serve_base": [1.0, 1.0, 9.0],
        "serve": [2.0, 2.0, 50.0],
        "train": [4.0],
        "both": [5.0],
        "peft_serve": [8.0],
        "peft_train": [2.0],
    }
    s = summarize(seconds, output_tokens=100, train_tokens=400)
    assert s["serve_tokens_per_s"] == 50 and s["train_tokens_per_s"] == 100
    assert s["lora_tax"] == 0.5
    assert s["serve_ratio"] == 4 and s["train_ratio"] == 0.5  # slower than the peer must show as below 1
    assert s["both_ratio"] == 2


def test_without_a_peer_no_ratio_is_invented() -> None:
    s = summarize({"serve_base": [1.0], "serve": [1.0], "train": [1.0], "both": [2.0]}, 1, 1)
    assert not [key for key in s if "ratio" in key or "peft" in key]


def test_the_work_is_the_same_for_everybody() -> None:
    workload = Workload()
    assert workload.prompts(300) == Workload().prompts(300)
    assert [e.tokens for e in workload.examples(300)] == [e.tokens for e in Workload().examples(300)]
    assert {len(p) for p in workload.prompts(300)} <= set(range(32, 129))


@pytest.mark.parametrize("with_peer", [True, False])
def test_a_tiny_round(tmp_path: Path, with_peer: bool) -> None:
    save_tiny(tmp_path / "base", "llama", context=512)
    small = Workload(num_requests=4, num_adapters=2, new_tokens=3, num_examples=4, batch_size=2, rank=2)
    lines: list[str] = []
    result = run(
        str(tmp_path / "base"), dtype="float32", rounds=1, with_peer=with_peer, tell=lines.append, workload=small
    )
    tasks = 6 if with_peer else 4
    assert len(result["seconds"]) == tasks and len(lines) == 2 * tasks
    assert all(value > 0 for value in result["summary"].values() if value is not result["summary"]["lora_tax"])
    assert table(result).row_count == 5
    save(result, tmp_path / "out" / "core.json")
    assert json.loads((tmp_path / "out" / "core.json").read_text())["workload"]["rank"] == 2


def test_the_readme_shows_the_committed_result() -> None:
    root = Path(__file__).parents[2]
    page = (root / "README.md").read_text(encoding="utf-8")
    result = json.loads((root / "docs" / "benchmarks" / "core-cpu.json").read_text(encoding="utf-8"))
    assert insert(page, markdown(result)) == page, "run python -m loquetier.bench.report"
