"""A whole engine (serve, train, evaluate, publish) on the make-believe device of `tests.make_believe`, by itself.

``python -m tests.engine.on_make_believe TAPE...`` prints one JSON object, by tape; `test_device.py` runs it and judges.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from tests.make_believe import DEVICE, Accelerator
from tests.parity.helpers import Answer, ask, make_engine
from tests.parity.training_helpers import random_examples
from tests.tiny import tiny_model
from torch import Tensor

from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.base.fuse import fused_stack
from loquetier.config import TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.kernels import transfer
from loquetier.kernels.rowops import SILU, Norm


class PlainRows:
    """`rowops.RowKernels` in plain torch: Triton's cannot run here, but all that is around them can."""

    def rms_norm(
        self, x_MD: Tensor, norm: Norm, y_MD: Tensor, delta_MD: Tensor | None, post: Norm | None = None
    ) -> None:
        assert post is None and not norm.one_plus, "a llama's norms"
        if delta_MD is not None:
            x_MD.add_(delta_MD)
        y_MD.copy_(norm.weight_D * (x_MD * (x_MD.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt()))

    def head_norm(self, x_MN: Tensor, first: int, heads: int, norm: Norm) -> None:
        raise AssertionError("a llama has none")

    def rotary_and_write(
        self,
        x_MN: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        heads: int,
        kv_heads: int,
        to: tuple[Tensor, ...] | None,
    ) -> bool:
        assert angles is not None, "every layer of a llama turns"
        cos_MD, sin_MD = angles
        dim = cos_MD.shape[1]
        x_MHD = x_MN[:, : (heads + kv_heads) * dim].view(len(x_MN), heads + kv_heads, dim)
        turned_MHD = torch.cat([-x_MHD[..., dim // 2 :], x_MHD[..., : dim // 2]], dim=-1)
        x_MHD.copy_(x_MHD * cos_MD[:, None] + turned_MHD * sin_MD[:, None])
        return False

    def gated(self, gate_up_MN: Tensor, y_MK: Tensor, activation: int) -> None:
        assert activation == SILU
        gate_MK, up_MK = gate_up_MN.chunk(2, dim=-1)
        y_MK.copy_(torch.nn.functional.silu(gate_MK) * up_MK)


def serve_and_train(engine: Engine, after_step: Any) -> dict[str, Any]:
    """Three kinds of requests beside a job that publishes and evaluates; then decode rows alone."""
    lora = LoraSpec(r=4)
    modules = resolve_modules(lora, engine.base.targets)
    g = torch.Generator().manual_seed(1)
    factors = {
        m.target.path: (
            0.1 * torch.randn(m.rank, m.target.in_features, generator=g),
            0.1 * torch.randn(m.target.out_features, m.rank, generator=g),
        )
        for m in modules
    }
    engine.adapters.load("a", lora, modules, factors)
    rows = random_examples(6, 9, 17, seed=3)
    losses: list[float] = []
    config = TrainingConfig(batch_size=3, max_steps=3, learning_rate=1e-2, eval_every=2)
    engine.jobs.start(
        "job", LoraSpec(r=4, dropout=0.1), config, rows, rows[:2],
        lambda job, record: losses.append(record.loss) if record is not None else None,
    )  # fmt: skip
    base = engine.base.name
    answers: list[Answer] = [
        ask(engine, list(range(10, 30)), base, max_tokens=12, logprobs=2),
        ask(engine, list(range(40, 47)), "a", max_tokens=10, temperature=0.8, seed=1, top_p=0.9, top_k=20),
        ask(engine, list(range(50, 59)), "a", max_tokens=10, repetition_penalty=1.3, logit_bias={7: 2.0}, min_tokens=3,
            stop_token_ids=(9,)),
    ]  # fmt: skip
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        after_step(None)
    answers += [ask(engine, [5 + i, 6, 7], "job" if i % 2 else base, max_tokens=6) for i in range(4)]
    engine.step()
    while engine.scheduler.has_work:
        after_step(engine)
    engine.step()
    return {"losses": losses, "tokens": [a.tokens() for a in answers]}


def report_of(tape: str) -> dict[str, Any]:
    """The CPU's outcome, the device's, and what was done badly on the device."""
    model = tiny_model("llama")
    settings: dict[str, Any] = {"tape": tape, "train_window": 8, "max_prefill_rows": 8, "page_size": 4}

    def step(engine: Engine | None) -> None:
        if engine is not None:
            engine.step()

    expected = serve_and_train(make_engine(model, **settings), step)
    with Accelerator() as accelerator:
        engine = make_engine(model.to(DEVICE), async_scheduling=True, **settings)
        base = engine.base
        if tape == "graph":  # the other tape's engine serves with the model's own code
            base.fused = fused_stack(base.loaded.model, base._stack, base._layers, PlainRows(), base._during)
        accelerator.waits.clear()
        copies: list[int] = []

        def watched(running: Engine | None) -> None:
            before = accelerator.copies_to_device
            step(running)
            if running is not None:
                copies.append(accelerator.copies_to_device - before)

        found = serve_and_train(engine, watched)
        report = {"expected": expected, "found": found, "waits": accelerator.waits, "mixed": accelerator.mixed}
        report["copies_per_decode_step"] = copies
        report["fused"] = base.fused is not None
        report["kv_device"] = engine.cache.keys[0].device.type
        engine.arena.flat(next(iter(engine.arena.slots))) + torch.zeros(2)[:1]  # must be noticed
        report["noticed"] = accelerator.mixed[-1:]
    return report


if __name__ == "__main__":
    transfer._page_locked = lambda host: host  # type: ignore[assignment]
    transfer._page_locked_like = lambda source: torch.empty(source.shape, dtype=source.dtype)  # type: ignore[assignment]
    print(json.dumps({tape: report_of(tape) for tape in sys.argv[1:]}))
