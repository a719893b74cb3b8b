"""The learning comparison: what it refuses, two steps of it on a tiny base, and that the page shows its result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.tiny import save_tiny

from loquetier.bench.gsm8k import compare
from loquetier.bench.learning import LearningRun, read_gsm8k
from loquetier.bench.learning_page import markdown, plot
from loquetier.bench.report import insert
from loquetier.errors import DataError

SMALL = LearningRun(steps=4, batch_size=2, accumulation=2, held_out=3, eval_every=2, max_tokens=120, learning_rate=1e-2)


def write_data(path: Path, count: int) -> Path:
    rows = [{"question": f"What is {i} + {i * i}?" * (1 + i % 3), "answer": f"{i + i * i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_both_sides_learn_the_same_on_a_tiny_base(tmp_path: Path) -> None:
    """Trainer's padding, accumulation and normalisation by num_items_in_batch against our packed rows."""
    save_tiny(tmp_path / "base", "llama")
    run = replace(SMALL, base=str(tmp_path / "base"))
    lines: list[str] = []
    output = tmp_path / "out" / "result.json"
    result = compare(write_data(tmp_path / "data.jsonl", 40), run, output, lines.append)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert len(result["ours"]["train_loss"]) == len(result["peft"]["train_loss"]) == 4
    assert [step for step, _ in result["ours"]["held_out_loss"]] == [0, 2, 4]
    # float32 rounding over four steps of losses of about 6; a wrong normalisation, order or mask shows at 0.1.
    assert result["differences"]["train_loss"] < 1e-3 and result["differences"]["held_out_loss"] < 1e-3
    first, last = (result["ours"]["held_out_loss"][i][1] for i in (0, -1))
    assert last < first - 0.1, "nothing was learned, so equality would prove little"
    assert any("peft: step 4/4" in line for line in lines) and any("ours: step 4/4" in line for line in lines)
    assert "| held out, after 4 steps |" in markdown(result)
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_missing_or_wrong_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read 'absent.jsonl'.*openai/grade-school-math"):
        read_gsm8k(tmp_path / "absent.jsonl", SMALL)
    with pytest.raises(DataError, match="has 18 examples, the run needs 19: 16 to train on and 3 held out"):
        read_gsm8k(write_data(tmp_path / "short.jsonl", 18), SMALL)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"question": "a", "answer": "b"}\n{"prompt": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2 is not a JSON object with 'question' and 'answer'"):
        read_gsm8k(wrong, SMALL)


def test_train_and_held_out_do_not_overlap(tmp_path: Path) -> None:
    train, held_out, source = read_gsm8k(write_data(tmp_path / "data.jsonl", 19), SMALL)
    prompts = [record["prompt"] + record["completion"] for record in (*train, *held_out)]
    assert (len(train), len(held_out), source["examples"]) == (16, 3, 19)
    assert len(set(prompts)) == 19


def test_the_page_shows_the_committed_result() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "learning.md").read_text(encoding="utf-8")
    result = json.loads((docs / "benchmarks" / "gsm8k-cpu.json").read_text(encoding="utf-8"))
    assert insert(page, markdown(result)) == page, "run python -m loquetier.bench.learning_page"
    assert (docs / "benchmarks" / "gsm8k-cpu.png").is_file()
