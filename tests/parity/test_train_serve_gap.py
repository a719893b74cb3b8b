"""The train-versus-serve gap: log-probabilities of the same tokens as TRAIN, EVAL, PREFILL and DECODE rows, float32.

Serving runs the very weights that were trained (a float32 slot is copied, never cast), the same kernels and the same
formula for the log-probability, so the gap of TRAIN, EVAL and PREFILL rows is exactly 0 when a step has the same rows.
What is left elsewhere is the order of float32 sums, which the GEMM library picks by the number of rows (a DECODE row is
computed with few others, and attends through gathered pages). With torch's `log_softmax` on the serving side the gap
was 1e-6 on the tiny bases and 1.1e-5 on the real one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parity.training_helpers import MIB, Engine, ask, ignore, make_engine, random_examples, run

from loquetier.adapters.spec import LoraSpec
from loquetier.base.loading import load_base
from loquetier.base.model import Base
from loquetier.config import EngineConfig, TrainingConfig
from loquetier.engine import trainer as trainer_module
from loquetier.training.data import Example
from loquetier.training.loss import linear_cross_entropy

DECODE_ATOL = 1e-4
"""Nats, of the worst of some dozen tokens. Measured 2.6e-6 (tiny bases) and 1.2e-6 (real): a few roundings
of 6e-8 of logits of up to 30. In bfloat16,
or with another token's weights, it is 1e-2 and more."""
NUM_PROMPT, NUM_ANSWER = 40, 24


@pytest.fixture
def row_losses(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Losses of every labelled row of every TRAIN and EVAL forward."""
    found: list[torch.Tensor] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        losses, grad = linear_cross_entropy(*args, **kwargs)
        found.append(losses.nll_L.clone())
        return losses, grad

    monkeypatch.setattr(trainer_module, "linear_cross_entropy", recorded)
    return found


def published(engine: Engine, examples: tuple[Example, ...], spec: LoraSpec) -> str:
    """Train three steps and publish: the version that training goes on from, and that answers."""
    config = TrainingConfig(learning_rate=1e-2, batch_size=2, max_steps=3, publish="end")
    engine.jobs.start("job", spec, config, examples, (), ignore)
    run(engine)
    return "job@1"


def gaps(engine: Engine, model: str, prompt: list[int], row_losses: list[torch.Tensor]) -> dict[str, float]:
    """Largest absolute differences, in nats, of one sequence's log-probabilities between the kinds of rows."""
    answer = ask(engine, model, prompt, NUM_ANSWER, logprobs=0)
    run(engine)
    decoded = torch.tensor([e.logprob for e in answer.events])
    tokens = [*prompt, *answer.tokens]
    # One row less than the sequence: the prompt's last token predicts, and is not predicted by, nothing after it.
    served = ask(engine, model, tokens[:-1], 1, prompt_logprobs=0)
    run(engine)
    entries = served.events[0].prompt_logprobs
    assert entries is not None
    prefilled = torch.tensor([entry[t] for entry, t in zip(entries[1:], tokens[1:-1], strict=True)])
    example = Example(tuple(tokens), (True,) * len(tokens))
    row_losses.clear()
    engine.jobs.evaluate(model, (example,), lambda result: None)
    run(engine)
    spec = engine.registry.resolve(model).spec
    once = TrainingConfig(batch_size=1, max_steps=1, publish="end")
    engine.jobs.start("next", spec, once, (example,), (), ignore, model)
    run(engine)
    evaluated, trained = (-losses for losses in row_losses)
    engine.check_integrity()
    return {
        "train-eval": float((trained - evaluated).abs().max()),
        "train-prefill": float((trained[:-1] - prefilled).abs().max()),
        "train-decode": float((trained[NUM_PROMPT - 1 :] - decoded).abs().max()),
    }


SPEC = LoraSpec(r=8, alpha=16)


@pytest.mark.parametrize("tape", ["graph", "replay"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_the_gap_is_zero_for_the_same_rows_and_rounding_for_decode(
    family: str, tape: str, row_losses: list[torch.Tensor]
) -> None:
    engine = make_engine(family, tape=tape, train_window=16)
    examples = random_examples(4, 10, 30, 41)
    found = gaps(engine, published(engine, examples, SPEC), list(range(10, 10 + NUM_PROMPT)), row_losses)
    assert found["train-eval"] == found["train-prefill"] == 0.0
    assert found["train-decode"] < DECODE_ATOL


def test_other_weights_than_the_served_ones_show(row_losses: list[torch.Tensor]) -> None:
    """The measure can fail: one more optimizer step before the comparison moves it far above rounding."""
    engine = make_engine()
    model = published(engine, random_examples(4, 10, 30, 41), SPEC)
    slot = engine.registry.resolve(model).slot
    answer = ask(engine, model, range(10, 50), NUM_ANSWER, logprobs=0)
    run(engine)
    decoded = torch.tensor([e.logprob for e in answer.events])
    engine.arena.flat(slot).mul_(1.01)
    engine.jobs.evaluate(model, (Example((*range(10, 50), *answer.tokens), (True,) * 64),), lambda result: None)
    row_losses.clear()
    run(engine)
    assert float((-row_losses[0][39:] - decoded).abs().max()) > 10 * DECODE_ATOL


@pytest.mark.real
@pytest.mark.timeout(300)
def test_the_gap_on_the_real_model(row_losses: list[torch.Tensor]) -> None:
    base = Base(load_base("smollm2-135m", dtype=torch.float32, device="cpu"))
    engine = Engine(
        base, EngineConfig(dtype="float32", device="cpu", kv_memory=16 * MIB, adapter_memory=64 * MIB, tape="graph")
    )
    text = "The lighthouse keeper climbed the stairs every evening, counted the ships on the horizon, and wrote "
    tokens = base.tokenizer(text * 4)["input_ids"]
    example = Example(tuple(tokens[:48]), (True,) * 48)
    model = published(engine, (example, example), LoraSpec(r=8, alpha=16))
    found = gaps(engine, model, tokens[:NUM_PROMPT], row_losses)
    assert found["train-eval"] == found["train-prefill"] == 0.0
    assert found["train-decode"] < DECODE_ATOL
