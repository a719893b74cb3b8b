"""Dropout on the replay tape: a replayed window drops what its forward dropped."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.tiny import save_tiny

from loquetier import EngineConfig, LoraSpec, Runtime, TrainingConfig

DATA = [{"prompt": f"{a} then ", "completion": f"{b} and so on!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]


def _trained(base: Path, tape: str) -> tuple[list[float], torch.Tensor]:
    config = EngineConfig(
        dtype="float32",
        kv_memory=4 << 20,
        adapter_memory=4 << 20,
        tape=tape,  # type: ignore[arg-type]
        train_window=5,
    )
    training = TrainingConfig(batch_size=4, max_steps=6, learning_rate=1e-2, seed=1)
    with Runtime(str(base), config=config) as runtime:
        history = runtime.finetune("fox", DATA, lora=LoraSpec(r=4, dropout=0.3), training=training).wait(60)
        factors = runtime._loop.call(lambda: runtime._engine.adapters.factors("fox"))[2]
    flat = torch.cat([t.flatten() for pair in factors.values() for t in pair])
    return [r.loss for r in history], flat


def test_both_tapes_drop_the_same(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama")
    losses, weights = _trained(tmp_path / "base", "graph")
    replayed_losses, replayed = _trained(tmp_path / "base", "replay")
    # Windows of 5 rows change the shapes of GEMMs, so rounding differs; another mask would change losses by percents.
    torch.testing.assert_close(torch.tensor(replayed_losses), torch.tensor(losses), rtol=1e-4, atol=0)
    torch.testing.assert_close(replayed, weights, rtol=0, atol=1e-3)
