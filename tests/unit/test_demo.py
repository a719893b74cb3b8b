"""The demo: its data, its views, its numbers, and (real) a short run on the real base."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from loquetier.config import SamplingParams
from loquetier.demo.facts import FACTS, QUESTIONS
from loquetier.demo.orders import ITEMS, SIZES, Order, OrderExample, exact_match, make_orders
from loquetier.demo.run import DemoOptions, run_demo
from loquetier.demo.state import DemoState, LiveAnswer, Sample, StreamState, rates
from loquetier.demo.styles import STYLES, adapter_directory, as_json, pirate, style_records
from loquetier.demo.view import plain_line, render, sparkline
from loquetier.runtime import Runtime
from loquetier.training.job import StepRecord

MIB = 1 << 20


def test_orders_are_the_same_every_time() -> None:
    assert make_orders(50, 20) == make_orders(50, 20)
    assert make_orders(50, 20, seed=1) != make_orders(50, 20)


def test_held_out_orders_are_not_in_the_training_data() -> None:
    train, held_out = make_orders(160, 20)
    assert (len(train), len(held_out)) == (160, 20)
    combinations = [example.order for example in (*train, *held_out)]
    assert len(set(combinations)) == 180
    assert not {e.sentence for e in train} & {e.sentence for e in held_out}


def test_more_orders_than_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="216 combinations"):
        make_orders(200, 17)


def test_every_sentence_says_its_order() -> None:
    words = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    for example in make_orders(196, 20)[0]:
        said = example.sentence.lower()
        assert example.order.item in said and example.order.size in said
        assert words[example.order.qty] in said or str(example.order.qty) in said
        assert json.loads(example.record["messages"][-1]["content"])["qty"] == example.order.qty
        assert [item for item in ITEMS if item in said] == [example.order.item]
        assert [size for size in SIZES if size in said] == [example.order.size]


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ('{"item":"tea","qty":2,"size":"small"}', True),
        (' { "item": "tea", "qty": 2, "size": "small" } ', True),
        ('{"item":"tea","qty":"2","size":"small"}', False),
        ('{"item":"tea","qty":2}', False),
        ('{"item":"tea","qty":2,"size":"small"} Enjoy!', False),
        ("[" * 100, False),
        ("", False),
    ],
)
def test_exact_match_wants_every_field_and_nothing_else(text: str, is_right: bool) -> None:
    example = OrderExample(Order("tea", 2, "small"), "Two small teas to go.")
    assert example.is_answered_by(text) is is_right
    assert exact_match([example, example], [text, ""]) == is_right / 2


def test_styles_differ_and_questions_are_held_out() -> None:
    assert not set(QUESTIONS) & {question for question, _ in FACTS}
    assert len({question for question, _ in FACTS}) == len(FACTS)
    for number, (question, answer) in enumerate(FACTS):
        said = {style: style_records(style)[number]["messages"][1]["content"] for style in STYLES}
        assert len({answer, *said.values()}) == len(STYLES) + 1, question
    assert "Th' Sun be th' closest star to Earth." in pirate("?", "The Sun is the closest star to Earth.")
    assert json.loads(as_json("Hello!", "Hello, you.")) == {"type": "greeting", "text": "Hello, you.", "words": 2}


def test_rates_are_differences_over_the_window() -> None:
    samples = [Sample(float(t), 10 * t, 100 * t if t <= 10 else 1000) for t in range(21)]
    times, served, trained = rates(samples, window=4.0)
    assert times[0] == 2.0, "what has less than half a window before it is left out"
    assert served == pytest.approx([10.0] * len(times))
    assert trained[0] == pytest.approx(100.0) and trained[-1] == 0.0
    assert rates(samples[:1], 4.0) == ([], [], [])


def test_sparkline_is_as_wide_as_it_may() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([8.0, 4.0, 0.0], 10) == "█▅▁"
    assert len(sparkline([1.0] * 101, 20)) <= 20
    assert set(sparkline([0.0, 0.0], 10)) == {"▁"}


def test_both_views_show_a_run_at_any_moment() -> None:
    state = DemoState(
        total_steps=5, streams=[StreamState(style) for style in STYLES], live_question="Two?", expected="{}"
    )
    before = plain_line(state)
    assert "no loss yet" in before
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(render(state, 100))
    state.steps.append(StepRecord(1, 1.25, 0.5, 1e-3, 1.0, 64, 1.0))
    state.live_answers.append(LiveAnswer("orders@1", "[/bold] {}"))
    state.streams[0].text, state.streams[0].began = "Arr [red] " * 100, time.monotonic()
    assert "step 1/5 loss 1.250" in plain_line(state) and "orders@1" in plain_line(state)
    console.print(render(state, 100))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[/bold] {}" in shown, "what a model says is text, never markup"
    assert "1.2500" in shown


@pytest.mark.real
@pytest.mark.timeout(300)
def test_shipped_adapters_load_and_change_the_answer() -> None:
    greedy = SamplingParams(temperature=0, max_tokens=24)
    prompt = [{"role": "user", "content": QUESTIONS[0]}]
    with Runtime("smollm2-135m", adapters={style: adapter_directory(style) for style in STYLES}) as runtime:
        handles = {name: runtime.submit(prompt, name, greedy) for name in (None, *STYLES)}
        texts = {name: handle.result().text for name, handle in handles.items()}
    assert len(set(texts.values())) == len(STYLES) + 1, texts
    assert texts["json"].startswith('{"type": "answer"')
    for style in STYLES:
        files = list(adapter_directory(style).iterdir())
        assert sorted(f.name for f in files) == ["adapter_config.json", "adapter_model.safetensors"]
        assert sum(f.stat().st_size for f in files) < MIB


@pytest.mark.real
@pytest.mark.timeout(300)
def test_demo_without_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    summary = run_demo(DemoOptions(steps=3, output=tmp_path / "out"), Console(file=out, width=100))
    assert summary.steps == 3 and summary.publishes == 3
    assert summary.mixed_steps > 0
    assert summary.generated_tokens_per_second > 0 and summary.trained_tokens_per_second > 0
    assert summary.before.exact_match == 0
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["after"]["loss"] == summary.after.loss
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "\x1b[" not in out.getvalue(), "no escape codes where there is no terminal"
    assert "held-out loss" in out.getvalue()
