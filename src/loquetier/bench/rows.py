"""The lines of the benchmark's table, with the targets of the project."""

from __future__ import annotations

from loquetier.bench.summary import OURS, PEFT, VLLM, VLLM_LORA, Goal, Row, both, field, rate


def _tax(lora: float, base: float) -> float:
    return 100 * (1 - lora / base)


def _over(a: float, b: float) -> float:
    return a / b


ROWS: tuple[Row, ...] = (
    Row(
        key="http_decode",
        title="HTTP: 16 streams on 4 adapters",
        unit="tok/s",
        columns={
            OURS: rate("ours-http", "decode"),
            VLLM_LORA: rate("vllm-lora", "decode"),
            VLLM: rate("vllm", "base"),
        },
        goals=(Goal(against=VLLM_LORA, at_least=5), Goal(against=VLLM, at_least=1.2)),
        best="decode",
    ),
    Row(
        key="http_base",
        title="HTTP: 16 streams on the base",
        unit="tok/s",
        columns={OURS: rate("ours-http", "base"), VLLM: rate("vllm", "base")},
        best="decode",
    ),
    Row(
        key="decode",
        title="in process: 16 streams on 4 adapters",
        unit="tok/s",
        columns={OURS: rate("ours", "decode"), PEFT: rate("peft", "decode")},
        goals=(Goal(against=PEFT, at_least=6),),
        best="decode",
    ),
    Row(
        key="mixed",
        title="in process: 16 adapters of ranks 4 to 64, over the rate on 4",
        unit="x",
        columns={OURS: both(_over, rate("ours", "mixed"), rate("ours", "decode"))},
        goals=(Goal(against=None, at_least=0.8),),
    ),
    Row(
        key="http_mixed",
        title="HTTP: 16 adapters of ranks 4 to 64, over the rate on 4",
        unit="x",
        columns={OURS: both(_over, rate("ours-http", "mixed"), rate("ours-http", "decode"))},
        goals=(Goal(against=None, at_least=0.8),),
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
    Row(
        key="lora_tax",
        title="in process: LoRA tax",
        unit="%",
        higher_is_better=False,
        columns={OURS: both(_tax, rate("ours", "decode"), rate("ours", "base"))},
        goals=(Goal(against=None, at_most=15),),
    ),
    Row(
        key="single",
        title="in process: one stream, per token",
        unit="ms",
        higher_is_better=False,
        columns={OURS: field("ours", "single", "token_s", 1e3)},
        goals=(Goal(against=None, at_most=16),),
        best="single",
    ),
    Row(
        key="single_reads",
        title="one stream, over reading the weights once",
        unit="x",
        higher_is_better=False,
        columns={OURS: both(_over, field("ours", "single", "token_s"), field("ours", "roofline", "weights_s"))},
        goals=(Goal(against=None, at_most=1.5),),
    ),
    Row(
        key="http_single",
        title="HTTP: one stream, per token",
        unit="ms",
        higher_is_better=False,
        columns={OURS: field("ours-http", "single", "token_s", 1e3), VLLM: field("vllm", "single", "token_s", 1e3)},
        best="single",
    ),
    Row(
        key="prefill",
        title="in process: prefill of one prompt of 1,000 tokens",
        unit="tok/s",
        columns={OURS: rate("ours", "prefill"), PEFT: rate("peft", "prefill")},
        goals=(Goal(against=None, at_least=1000),),
        best="prefill",
    ),
    Row(
        key="http_prefill",
        title="HTTP: prefill of one prompt of 1,000 tokens",
        unit="tok/s",
        columns={OURS: rate("ours-http", "prefill"), VLLM: rate("vllm", "prefill")},
        best="prefill",
    ),
    Row(
        key="overhead",
        title="engine overhead in a step of 16 decode rows",
        unit="%",
        higher_is_better=False,
        columns={OURS: field("ours-steps", "overhead", "overhead", 100)},
        goals=(Goal(against=None, at_most=10),),
    ),
    Row(
        key="train",
        title="fine-tuning, batch 8 (PEFT: with Trainer)",
        unit="tok/s",
        columns={
            OURS: field("ours-train", "train", "tokens_per_s"),
            PEFT: field("peft-train", "train", "tokens_per_s"),
        },
        goals=(Goal(against=PEFT, at_least=3),),
        best="train",
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
    Row(
        key="pair",
        title="two jobs of batch 1 at once, over one after the other",
        unit="x",
        columns={OURS: field("ours-train", "pair", "gain")},
        goals=(Goal(against=None, at_least=1.15),),
    ),
    Row(
        key="pair_of_4",
        title="two jobs of batch 4 at once, over one after the other",
        unit="x",
        columns={OURS: field("ours-train", "pair_of_4", "gain")},
        goals=(Goal(against=None, at_least=1),),
    ),
    Row(
        key="serve_and_train",
        title="serve and fine-tune (PEFT: one after the other)",
        unit="s",
        higher_is_better=False,
        columns={
            OURS: field("ours", "both", "seconds"),
            PEFT: both(lambda a, b: a + b, field("peft", "decode", "seconds"), field("peft", "train", "seconds")),
        },
    ),
    Row(
        key="at_once",
        title="serve and fine-tune at once, over one after the other",
        unit="x",
        columns={
            OURS: both(
                lambda apart, at_once: apart / at_once,
                both(lambda a, b: a + b, field("ours", "decode", "seconds"), field("ours", "train", "seconds")),
                field("ours", "both", "seconds"),
            )
        },
    ),
)
