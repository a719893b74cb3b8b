"""The overhead benchmark runs, and its figures fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import save_tiny

from loquetier.bench.overhead import clocked, measure
from loquetier.config import MIB, EngineConfig
from loquetier.kernels.native import NativeLibrary
from loquetier.kernels.select import process_kernels


def test_it_splits_a_step_into_kernels_and_the_rest(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama", context=2048)
    config = EngineConfig(dtype="bfloat16", device="cpu", kv_memory=16 * MIB, adapter_memory=8 * MIB)
    original = NativeLibrary.function
    (row,) = measure(str(tmp_path / "base"), "16 streams, 4 adapters r=8, sampled", config)["rows"]
    assert NativeLibrary.function is original
    assert row["step_ms"] > 0 and row["tokens_per_s"] == pytest.approx(16e3 / row["step_ms"])
    assert row["kernels_ms"] <= row["step_ms"] and 0 < row["overhead"] <= 1
    functions = {name for name in row if name.startswith("lq_")}
    assert bool(functions) is (process_kernels("cpu").library is not None) and row["kernels_ms"] >= 0


def test_the_clock_stops_when_it_is_over() -> None:
    original = NativeLibrary.function
    with clocked() as clock:
        assert clock.timed("name", lambda x: x + 1)(1) == 2 and clock.seconds["name"] > 0
        clock.reset()
        assert not clock.seconds and NativeLibrary.function is not original
    assert NativeLibrary.function is original
