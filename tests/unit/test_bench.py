"""The benchmark: its arithmetic, its table, page and picture, and one tiny run of it without peers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny

from loquetier.bench.peers.envs import PeerEnvironments, needs_cuda, without
from loquetier.bench.peers.measure import finished, measure
from loquetier.bench.peers.plan import Plan, left
from loquetier.bench.plot import plot
from loquetier.bench.report import headlines, insert, whole
from loquetier.bench.roofline import ModelSize, bounds
from loquetier.bench.rows import ROWS
from loquetier.bench.summary import OURS, PEFT, VLLM, VLLM_LORA, Goal, Row, paired, rate, summarize
from loquetier.bench.traffic import Traffic
from loquetier.bench.view import table, targets
from loquetier.bench.workload import Workload
from loquetier.errors import ConfigError


def sample(number: int, side: str, task: str, **values: float) -> dict[str, Any]:
    return {"round": number, "side": side, "task": task, **values}


SERVING = (
    Row(
        key="serve",
        title="serve",
        unit="tok/s",
        columns={OURS: rate("ours", "decode"), PEFT: rate("peft", "decode")},
        goals=(Goal(against=PEFT, at_least=3), Goal(against=VLLM, at_least=1), Goal(against=None, at_most=40)),
    ),
)


def test_a_ratio_is_taken_within_each_round() -> None:
    # Round 2 ran on a machine half as fast: both medians are of round 2 or 3, but every round's ratio is 4 or 2.
    ours = [sample(i, "ours", "decode", tokens=100, seconds=s) for i, s in ((1, 1.0), (2, 2.0), (3, 4.0))]
    peft = [sample(i, "peft", "decode", tokens=100, seconds=s) for i, s in ((1, 4.0), (2, 8.0), (3, 8.0))]
    (row,) = summarize(SERVING, [*ours, *peft])
    assert row["columns"][OURS] == {"median": 50, "low": 25, "high": 100, "rounds": 3}
    assert row["ratios"][PEFT] == {"median": 4, "low": 2, "high": 4, "rounds": 3}


def test_goals_say_what_was_missed_and_leave_out_what_was_not_measured() -> None:
    samples = [
        sample(1, "ours", "decode", tokens=100, seconds=2.0),
        sample(1, "peft", "decode", tokens=100, seconds=4.0),
    ]
    (row,) = summarize(SERVING, samples)
    assert [(g["against"], g["value"], g["met"]) for g in row["goals"]] == [(PEFT, 2, False), (None, 50, False)]
    assert targets(row) == ">= 3x PEFT MISSED, <= 40 tok/s MISSED"


def test_where_less_is_better_the_ratio_still_says_how_many_times_better_we_are() -> None:
    row = replace(SERVING[0], higher_is_better=False, goals=())
    samples = [
        sample(1, "ours", "decode", tokens=10, seconds=1.0),
        sample(1, "peft", "decode", tokens=30, seconds=1.0),
    ]
    (line,) = summarize([replace(row, best="decode")], samples, {"decode": 5.0})
    assert line["ratios"][PEFT]["median"] == 3
    assert line["share_of_roofline"] == 0.5


def test_without_a_peer_no_ratio_is_invented_and_without_us_there_is_no_row() -> None:
    (row,) = summarize(SERVING, [sample(1, "ours", "decode", tokens=1, seconds=1.0)])
    assert row["ratios"] == {} and list(row["columns"]) == [OURS]
    assert summarize(SERVING, [sample(1, "peft", "decode", tokens=1, seconds=1.0)]) == []
    assert paired(lambda a, b: a / b, {1: 4.0, 2: 6.0}, {2: 3.0, 3: 1.0}) == {2: 2.0}


def test_what_adapters_cost_is_a_share_of_the_same_rounds_base() -> None:
    samples = [
        sample(1, "ours", "decode", tokens=100, seconds=2.0),
        sample(1, "ours", "base", tokens=100, seconds=1.5),
        sample(1, "vllm-lora", "decode", tokens=100, seconds=4.0),
        sample(1, "vllm", "base", tokens=100, seconds=1.0),
        sample(1, "ours-http", "decode", tokens=100, seconds=2.0),
        sample(1, "ours-http", "base", tokens=100, seconds=2.0),
    ]
    lines = {row["key"]: row for row in summarize(ROWS, samples)}
    assert lines["lora_tax"]["columns"][OURS]["median"] == pytest.approx(25)
    tax = lines["http_lora_tax"]["columns"]
    assert tax[OURS]["median"] == 0 and tax[VLLM_LORA]["median"] == pytest.approx(75)
    assert lines["http_decode"]["ratios"][VLLM]["median"] == pytest.approx(0.5)  # slower than a peer shows as below 1


def test_the_roofline_follows_from_the_rates() -> None:
    size = ModelSize(body=900, head=100, bytes_per_weight=2)
    traffic = Traffic(streams=2, new_tokens=5, shortest_prompt=10, longest_prompt=10, long_prompt=20)
    slow_memory = bounds(size, traffic, {"bytes_per_s": 2000.0, "flops_per_s": 2e9}, labelled=1)
    assert slow_memory["single"] == pytest.approx(1000)  # 2000 bytes per token
    assert slow_memory["decode"] == pytest.approx(10 / (5 * 1 + 20 * 900 * 1e-9))
    slow_math = bounds(size, traffic, {"bytes_per_s": 2e12, "flops_per_s": 2000.0}, labelled=0.5)
    assert slow_math["decode"] == pytest.approx(10 / (20 * 0.9 + 5 * 2 * 1.0))
    assert slow_math["prefill"] == pytest.approx(20 / (20 * 0.9 + 0.1))
    assert slow_math["train"] == pytest.approx(1 / (2 * 0.95))


def test_the_work_is_the_same_for_everybody_and_new_in_every_round() -> None:
    allowed = range(5, 300)
    asks = Traffic().asks("decode", 1, allowed)
    assert asks == Traffic().asks("decode", 1, allowed)
    other = Traffic().asks("decode", 2, allowed)
    assert [len(a.prompt) for a in other] == [len(a.prompt) for a in asks]
    assert not {a.prompt for a in asks} & {a.prompt for a in other}
    assert {len(a.prompt) for a in asks} <= set(range(32, 201)) and len({a.model for a in asks}) == 4
    assert [a.model for a in Traffic().asks("mixed", 1, allowed)] == [f"m{i}" for i in range(16)]
    assert len(Traffic().asks("prefill", 1, allowed)[0].prompt) == 1000


def test_a_broken_run_goes_on_where_it_stopped() -> None:
    steps = [("ours", "decode"), ("peft", "decode"), ("ours", "decode")]
    one = [sample(1, *step) for step in steps]
    assert left(steps, [*one, sample(2, "ours", "decode")], 1) == []
    assert left(steps, [*one, sample(2, "ours", "decode")], 2) == [(20, "peft", "decode"), (21, "ours", "decode")]
    assert left(steps, one, 3) == [(30, "ours", "decode"), (30, "peft", "decode"), (31, "ours", "decode")]


def test_sides_that_do_not_take_part_have_no_steps() -> None:
    sides = {side for side, _ in Plan(peers=("peft",), servers=False).steps}
    assert "peft" in sides and not {s for s in sides if "http" in s or "vllm" in s}
    assert {"vllm", "vllm-lora", "ours-http", "peft"} <= {side for side, _ in Plan().steps}
    assert all(side.startswith("ours") for side, _ in Plan(peers=()).steps)


def test_cuda_is_seen_before_it_is_installed() -> None:
    found = {"numpy": "2.3", "torch": "2.13.0", "nvidia-cublas-cu12": "12.9", "triton": "3.9"}
    assert "nvidia-cublas-cu12 12.9" in needs_cuda(found)
    assert needs_cuda({"torch": "2.13.0+cpu", "triton": "3.9"}) == []


def test_requirements_of_a_wheel_without_what_is_left_out() -> None:
    metadata = (
        "Name: x\nRequires-Dist: torch==2.13.0+cpu; platform_machine == 'x86_64'\n"
        'Requires-Dist: torchvision\nRequires-Dist: pandas; extra == "bench"\nRequires-Dist: torchcodec>=0.14\n'
    )
    assert without(metadata, ("torchvision", "torchcodec")) == ["torch==2.13.0+cpu; platform_machine == 'x86_64'"]


def test_a_missing_environment_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--make-envs"):
        PeerEnvironments(tmp_path).python("vllm")


@pytest.fixture
def tiny_plan(tmp_path: Path) -> Plan:
    save_tiny(tmp_path / "base", "llama", context=2048)
    return Plan(
        base=str(tmp_path / "base"),
        dtype="float32",
        threads=1,
        peers=(),
        servers=False,
        training=False,
        traffic=Traffic(
            streams=3, adapters=2, rank=2, mixed_ranks=(1, 2, 4), new_tokens=3, longest_prompt=40, long_prompt=50
        ),
        workload=Workload(num_examples=2, batch_size=2, rank=2),
    )


def test_a_tiny_run(tmp_path: Path, tiny_plan: Plan) -> None:
    output = tmp_path / "out" / "core.json"
    seen: list[tuple[int, int]] = []

    def run(rounds: int, resume: bool) -> dict[str, Any]:
        return measure(
            tiny_plan,
            rounds=rounds,
            output=output,
            envs=None,
            resume=resume,
            tell=lambda what, done, total: seen.append((done, total)),
        )

    result = run(1, resume=False)
    assert {(s["side"], s["task"]) for s in result["samples"]} == set(tiny_plan.steps)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    keys = {row["key"] for row in result["rows"]}
    assert {"decode", "mixed", "lora_tax", "single", "prefill", "at_once"} <= keys and "http_decode" not in keys
    assert seen[0] == (0, len(tiny_plan.steps)) and seen[-1] == (len(tiny_plan.steps),) * 2
    assert run(1, resume=True)["samples"] == json.loads(json.dumps(result["samples"]))  # nothing was left to measure
    tiny_plan = replace(tiny_plan, threads=2)
    with pytest.raises(ConfigError, match="another plan"):
        measure(tiny_plan, rounds=1, output=output, envs=None, resume=True, tell=lambda *about: None)
    assert table(result).row_count == len(result["rows"])
    page = insert("a\n<!-- bench table: begin -->\n<!-- bench table: end -->\nb", whole(result))
    assert page.count("| in process: 16 streams") == 1 and page.endswith("b")
    assert "LoRA tax" not in headlines(result) and "LoRA tax" in page  # measured in process only here
    plot(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_figures_follow_from_the_committed_samples() -> None:
    for path in (Path(__file__).parents[2] / "docs" / "benchmarks").glob("peers-*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        again = finished(result, Plan(traffic=Traffic(**result["plan"]["traffic"])))
        assert json.loads(json.dumps(again["rows"])) == result["rows"], path.name


def test_the_pages_show_the_committed_result() -> None:
    root = Path(__file__).parents[2]
    committed = root / "docs" / "benchmarks" / "peers-cpu.json"
    if not committed.is_file():
        pytest.skip("no result is committed")
    result = json.loads(committed.read_text(encoding="utf-8"))
    for name, make in (("README.md", headlines), ("docs/benchmarking.md", whole)):
        page = (root / name).read_text(encoding="utf-8")
        assert insert(page, make(result)) == page, "run python -m loquetier.bench.report"
    assert committed.with_suffix(".png").is_file()
