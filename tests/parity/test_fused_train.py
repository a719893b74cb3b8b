"""The train stack in bfloat16 against the model's own code: gradients on both tapes, in mixed steps, by windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.test_fused_stack import FUSED, needs_gemm
from tests.parity.test_replay_tape import relative_norm, specs_of, two_jobs
from tests.parity.training_helpers import (
    BASE_NAME,
    MIB,
    Engine,
    Factors,
    ask,
    random_examples,
    run,
    slot_factors,
)
from tests.tiny import BESIDE, EOS, FAMILIES, tiny_model, tiny_tokenizer

from loquetier.base.context import StepContext
from loquetier.base.loading import LoadedBase
from loquetier.base.model import Base
from loquetier.config import EngineConfig

pytestmark = needs_gemm

WORSE = 1.25
"""Our gradients may be so many times as far from float32's (on the same weights) as those of the model's own bfloat16
code: both round, at other places. A gradient that is lost or doubled in one layer is ten times as far."""


def bf16_engine(family: str, *, fused: bool = True, exact: bool = False, **config: Any) -> Engine:
    """`fused`: False takes the model's own code. `exact`: float32 arithmetic on the bfloat16 weights."""
    model = tiny_model(family, layers=3, hidden=64, head_dim=16).bfloat16().requires_grad_(False)
    loaded = LoadedBase(
        model=model.float() if exact else model,
        tokenizer=tiny_tokenizer(), name=BASE_NAME, source=Path("."), max_context=256,
        eos_token_ids=frozenset({EOS}), num_parameters=0, weight_bytes=0,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "dtype": "float32" if exact else "bfloat16",
        "device": "cpu",
        "kv_memory": MIB,
        "adapter_memory": 16 * MIB,
    }
    engine = Engine(Base(loaded), EngineConfig(**(settings | config)))
    assert (engine.base.train_stack is None) == exact
    assert (engine.base.frozen_head is None) == (exact or family == "gemma2")  # whose head caps its logits
    if not fused:
        engine.base.train_stack = engine.base.frozen_head = None
    return engine


def gradients(family: str, *, traffic: bool = False, **how: Any) -> list[Factors]:
    """Of two jobs of other ranks and targets whose rows share a tape, on `bf16_engine(family, **how)`."""
    engine = bf16_engine(family, **how)
    jobs = two_jobs(engine, specs_of(family), random_examples(4, 9, 60, 5))
    if traffic:
        for number in range(4):
            ask(engine, "from0" if number % 2 else BASE_NAME, range(10 + number, 20 + 3 * number), 6 + 9 * number)
    while not all(seen.gradients for _, seen, _ in jobs):
        engine.step()
    found = []
    for number, (_, seen, _) in enumerate(jobs):
        found.append(slot_factors(engine, engine.registry.resolve(f"from{number}").slot, seen.gradients[0]))
    run(engine)
    engine.check_integrity()
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *BESIDE])
def test_only_families_whose_code_was_read_have_it(family: str) -> None:
    base = Base(
        LoadedBase(
            model=tiny_model(family).bfloat16(), tokenizer=tiny_tokenizer(), name=BASE_NAME, source=Path("."),
            max_context=256, eos_token_ids=frozenset({EOS}), num_parameters=0, weight_bytes=0,
        )
    )  # fmt: skip
    assert (base.train_stack is not None) == (base.fused is not None) == (family in FUSED)


@pytest.mark.parametrize("family", sorted(FUSED - set(BESIDE)))
def test_gradients_are_the_models_own(family: str) -> None:
    exact = gradients(family, exact=True)
    own = gradients(family, fused=False, tape="graph")
    for config in ({"tape": "graph"}, {"tape": "replay", "train_window": 7, "max_train_rows": 32}):
        for ours, theirs, right in zip(gradients(family, **config), own, exact, strict=True):
            assert relative_norm(ours, right) < WORSE * relative_norm(theirs, right)


def test_other_rows_change_nothing() -> None:
    """Requests decode in the steps of the forward and between units."""
    quiet = gradients("gemma3", tape="graph")
    busy = gradients("gemma3", tape="graph", backward_units_while_serving=1, traffic=True)
    for ours, theirs in zip(busy, quiet, strict=True):
        assert relative_norm(ours, theirs) < 1e-6  # a row's sums do not depend on its neighbours


def test_a_layer_that_computes_something_else_keeps_its_own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from loquetier.kernels.rowgrads import RowGrads

    def wrong(self: RowGrads, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        args[2].mul_(1.1)

    right = RowGrads.gated
    monkeypatch.setattr(RowGrads, "gated", wrong)
    base = Base(
        LoadedBase(
            model=tiny_model("llama").bfloat16(), tokenizer=tiny_tokenizer(), name=BASE_NAME, source=Path("."),
            max_context=256, eos_token_ids=frozenset({EOS}), num_parameters=0, weight_bytes=0,
        )
    )  # fmt: skip
    assert base.train_stack is None


def test_the_plain_head_is_the_models_head() -> None:
    """Losses and gradient of the fused head and loss against autograd through the model's own."""
    base = bf16_engine("llama").base
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets, weights = torch.arange(9) * 3, torch.linspace(0.1, 1, 9)
    logits = base.logits(hidden, StepContext(num_rows=9, num_train=9)).float()
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (expected,) = torch.autograd.grad((nll * weights).sum(), hidden)
    assert base.frozen_head is not None
    ours, hits, grad = base.frozen_head.losses(hidden.detach(), targets, weights)
    assert grad is not None
    # bfloat16 logits of size 1 to 4 are rounded at 2**-7; their gradient at 2**-8 of its largest value, and summed.
    torch.testing.assert_close(ours, nll.detach(), rtol=0, atol=0.02)
    assert (grad.float() - expected.float()).norm() / expected.float().norm() < 0.02
    assert torch.equal(hits, (logits.argmax(-1) == targets).float())
