"""The lines of the benchmark's table, with the targets of the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from loquetier.bench.summary import OURS, PEFT, VLLM, VLLM_LORA, Goal, Row, Sample, Series, both, field, rate

Column = Callable[[Sequence[Sample]], Series]


def _tax(lora: float, base: float) -> float:
    return 100 * (1 - lora / base)


def _over(a: float, b: float) -> float:
    return a / b


def _sum(a: float, b: float) -> float:
    return a + b


def _rates(key: str, title: str, columns: Mapping[str, Column], *goals: Goal, best: str) -> Row:
    """Tokens per second, side by side."""
    return Row(key=key, title=title, unit="tok/s", columns=columns, goals=goals, best=best)


def _ours(
    key: str, title: str, unit: str, value: Column, *, least: float | None = None, most: float | None = None,
    best: str | None = None,
) -> Row:  # fmt: skip
    """A value of ours that has a goal of its own: `least` of it, or `most`, where less is better."""
    goal = Goal(against=None, at_least=least, at_most=most)
    return Row(
        key=key, title=title, unit=unit, columns={OURS: value}, goals=(goal,), higher_is_better=most is None, best=best
    )


ROWS: tuple[Row, ...] = (
    _rates(
        "http_decode", "HTTP: 16 streams on 4 adapters",
        {OURS: rate("ours-http", "decode"), VLLM_LORA: rate("vllm-lora", "decode"), VLLM: rate("vllm", "base")},
        Goal(against=VLLM_LORA, at_least=5), Goal(against=VLLM, at_least=1.2), best="decode",
    ),
    _rates(
        "http_base", "HTTP: 16 streams on the base",
        {OURS: rate("ours-http", "base"), VLLM: rate("vllm", "base")}, best="decode",
    ),
    _rates(
        "decode", "in process: 16 streams on 4 adapters",
        {OURS: rate("ours", "decode"), PEFT: rate("peft", "decode")}, Goal(against=PEFT, at_least=6), best="decode",
    ),
    _ours(
        "mixed", "in process: 16 adapters of ranks 4 to 64, over the rate on 4", "x",
        both(_over, rate("ours", "mixed"), rate("ours", "decode")), least=0.8,
    ),
    _ours(
        "http_mixed", "HTTP: 16 adapters of ranks 4 to 64, over the rate on 4", "x",
        both(_over, rate("ours-http", "mixed"), rate("ours-http", "decode")), least=0.8,
    ),
    Row(
        key="http_lora_tax",
        title="HTTP: LoRA tax",
        unit="%",
        higher_is_better=False,
        columns={
            OURS: both(_tax, rate("ours-http", "decode"), rate("ours-http", "base")),
            VLLM_LORA: both(_tax, rate("vllm-lora", "decode"), rate("vllm", "base")),
        },
        goals=(Goal(against=None, at_most=15),),
    ),
    _ours("lora_tax", "in process: LoRA tax", "%", both(_tax, rate("ours", "decode"), rate("ours", "base")), most=15),
    _ours(
        "single", "in process: one stream, per token", "ms", field("ours", "single", "token_s", 1e3), most=16,
        best="single",
    ),
    _ours(
        "single_reads", "one stream, over reading the weights once", "x",
        both(_over, field("ours", "single", "token_s"), field("ours", "roofline", "weights_s")), most=1.5,
    ),
    Row(
        key="http_single",
        title="HTTP: one stream, per token",
        unit="ms",
        higher_is_better=False,
        columns={OURS: field("ours-http", "single", "token_s", 1e3), VLLM: field("vllm", "single", "token_s", 1e3)},
        best="single",
    ),
    _rates(
        "prefill", "in process: prefill of one prompt of 1,000 tokens",
        {OURS: rate("ours", "prefill"), PEFT: rate("peft", "prefill")}, Goal(against=None, at_least=1000),
        best="prefill",
    ),
    _rates(
        "http_prefill", "HTTP: prefill of one prompt of 1,000 tokens",
        {OURS: rate("ours-http", "prefill"), VLLM: rate("vllm", "prefill")}, best="prefill",
    ),
    _ours(
        "overhead", "engine overhead in a step of 16 decode rows", "%",
        field("ours-steps", "overhead", "overhead", 100), most=10,
    ),
    _rates(
        "train", "fine-tuning, batch 8 (PEFT: with Trainer)",
        {OURS: field("ours-train", "train", "tokens_per_s"), PEFT: field("peft-train", "train", "tokens_per_s")},
        Goal(against=PEFT, at_least=3), best="train",
    ),
    Row(
        key="train_memory",
        title="peak memory of that process",
        unit="MiB",
        higher_is_better=False,
        columns={
            OURS: field("ours-train", "train", "peak_bytes", 1 / 2**20),
            PEFT: field("peft-train", "train", "peak_bytes", 1 / 2**20),
        },
        goals=(Goal(against=PEFT, at_least=3),),
    ),
    _ours(
        "pair", "two jobs of batch 1 at once, over one after the other", "x", field("ours-train", "pair", "gain"),
        least=1.15,
    ),
    _ours(
        "pair_of_4", "two jobs of batch 4 at once, over one after the other", "x",
        field("ours-train", "pair_of_4", "gain"), least=1,
    ),
    Row(
        key="serve_and_train",
        title="serve and fine-tune (PEFT: one after the other)",
        unit="s",
        higher_is_better=False,
        columns={
            OURS: field("ours", "both", "seconds"),
            PEFT: both(_sum, field("peft", "decode", "seconds"), field("peft", "train", "seconds")),
        },
    ),
    Row(
        key="at_once",
        title="serve and fine-tune at once, over one after the other",
        unit="x",
        columns={
            OURS: both(
                _over,
                both(_sum, field("ours", "decode", "seconds"), field("ours", "train", "seconds")),
                field("ours", "both", "seconds"),
            )
        },
    ),
)  # fmt: skip
