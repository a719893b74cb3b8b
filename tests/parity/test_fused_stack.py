"""The fused stack and the C decode stack against the model's own code, and what keeps them from being used."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.helpers import (
    BASE_NAME,
    EngineFactory,
    LogitRecorder,
    ask,
    load_peft,
    max_error,
    new_engine,
    peft_model,
    prompt_of,
    run,
)
from tests.tiny import BESIDE, FAMILIES, tiny_model
from torch import Tensor, nn

from loquetier.base.context import StepContext
from loquetier.base.stack_deltas import StackCut
from loquetier.engine.engine import Engine
from loquetier.kernels.gemm import AMX, NO_KERNEL, GemmKernel
from loquetier.kernels.select import process_kernels

__all__ = ["new_engine"]

FUSED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", *BESIDE}
LENGTHS = ((9, "all"), (30, BASE_NAME), (17, "some"), (1, "all"), (45, BASE_NAME), (12, "some"))
"""Of the prompts, and whose they are."""
LONG = ((9, "all"), (33, "all"), (80, "some"), (130, "all"), (64, "some"), (47, "all"))
BF16_TOLERANCE = 0.15
"""Max abs error of a logit of these models (units to tens) after a few bfloat16 roundings that fall differently: the
GEMM's sums run in another order than torch's. A wrong row, mask or adapter shows as whole units."""

_library = process_kernels().native("base_gemm")
needs_gemm = pytest.mark.skipif(
    _library is None or GemmKernel(_library).level == NO_KERNEL, reason="this machine has no AVX512_BF16"
)


@needs_gemm
@pytest.mark.parametrize("family", [*FAMILIES, *BESIDE])
def test_only_families_whose_code_was_read_are_fused(family: str, new_engine: EngineFactory) -> None:
    base = new_engine(tiny_model(family).bfloat16()).base
    assert base.packed_bytes > 0
    assert (base.fused is not None) == (base.decode_stack is not None) == (family in FUSED)


def test_float32_runs_the_models_own_code(new_engine: EngineFactory) -> None:
    """Rows that are trained and rows that are served then agree to the bit."""
    base = new_engine(tiny_model("llama")).base
    assert base.packed_bytes == 0 and base.fused is None and base.decode_stack is None


@needs_gemm
def test_rows_that_go_to_no_cache_are_not_for_the_c_stack(new_engine: EngineFactory) -> None:
    """EVAL rows stand before those that are served."""
    engine = new_engine(tiny_model("llama").bfloat16())
    stack = engine.base.decode_stack
    assert stack is not None and stack.takes(StepContext(num_rows=3, cache=engine.cache, cache_start=0))
    assert not stack.takes(StepContext(num_rows=3, cache=engine.cache, cache_start=1))


@needs_gemm
def test_other_numbers_are_not_fused(new_engine: EngineFactory) -> None:
    """A layer of the right names that computes something else."""
    model = tiny_model("llama").bfloat16()
    model.model.layers[1].mlp.act_fn = nn.GELU()
    assert new_engine(model).base.fused is None


@needs_gemm
def test_more_parts_are_not_fused(new_engine: EngineFactory) -> None:
    model = tiny_model("llama").bfloat16()
    model.model.layers[0].mlp.add_module("extra", nn.Linear(4, 4))
    assert new_engine(model).base.fused is None


@needs_gemm
@pytest.mark.parametrize("family", sorted(FUSED - set(BESIDE)))
def test_bfloat16_serving_equals_the_models_own_code(family: str, new_engine: EngineFactory, tmp_path: Path) -> None:
    """Prompts by chunks, mixed steps, then decode-only steps in C, on adapters and on the base."""
    model = tiny_model(family, layers=3, hidden=64, head_dim=16, tie=True).bfloat16()
    values = "qkv_proj" if family == "phi3" else "v_proj"
    adapters = {
        "all": peft_model(model, 1, r=5, lora_alpha=10, target_modules="all-linear"),
        "some": peft_model(model, 2, r=16, lora_alpha=16, target_modules=[values, "down_proj"]),
    }
    fast, slow = (new_engine(copy.deepcopy(model), page_size=4, max_prefill_rows=24, max_rows=32) for _ in range(2))
    decode = fast.base.decode_stack
    assert decode is not None and fast.base.packed_bytes
    slow.base.fused = slow.base.decode_stack = None
    calls: list[int] = []

    class Counting:
        takes = staticmethod(decode.takes)

        def __call__(self, ids_M: Tensor, positions_M: Tensor, step: Any) -> Tensor:
            calls.append(len(ids_M))
            return decode(ids_M, positions_M, step)

    fast.base.decode_stack = Counting()  # type: ignore[assignment]
    results = []
    for engine in (fast, slow):
        for name, peft in adapters.items():
            load_peft(engine, name, peft, tmp_path / f"{family}-{name}")
        results.append(logits_of(engine))
    assert max(calls) >= 4, "decode-only steps ran in C, with rows of several adapters"
    for (ours_seq, ours), (_, theirs) in zip(*results, strict=True):
        assert max_error(ours, theirs) < BF16_TOLERANCE, ours_seq.seq_id


@needs_gemm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_prompts_equal_the_models_own_code(dtype: Any, new_engine: EngineFactory, tmp_path: Path) -> None:
    """Segments for tiles (blocks of rows that are whole, half and cut; ranks that need several tiles; columns that end
    in half a line) beside decode rows of the same adapters. Without AMX the same on the pieces."""
    model = tiny_model("llama", layers=2, hidden=96, head_dim=16, tie=True).bfloat16()
    adapters = {
        "all": peft_model(model, 1, r=5, lora_alpha=10, target_modules="all-linear"),
        "some": peft_model(model, 2, r=40, lora_alpha=40, target_modules=["v_proj", "down_proj", "gate_proj"]),
    }
    config = {"page_size": 16, "max_prefill_rows": 120, "max_rows": 160, "adapter_dtype": dtype}
    fast, slow = (new_engine(copy.deepcopy(model), **config) for _ in range(2))
    slow.base.fused = slow.base.decode_stack = None
    exact = new_engine(copy.deepcopy(model).float(), **config | {"adapter_dtype": "float32"})
    stack = fast.base.decode_stack
    assert stack is not None
    cuts: list[StackCut] = []
    cut = stack._deltas.cut

    def kept(*args: Any) -> StackCut:
        cuts.append(cut(*args))
        return cuts[-1]

    stack._deltas.cut = kept  # type: ignore[method-assign]
    results = []
    for engine in (fast, slow, exact):
        for name, peft in adapters.items():
            load_peft(engine, name, peft, tmp_path / f"{dtype}-{name}")
        results.append(logits_of(engine, LONG))
    longs = [len(c.pieces.longs) for c in cuts if c.pieces is not None]
    has_tiles = _library is not None and GemmKernel(_library).level >= AMX
    assert len(longs) == len(cuts) and (max(longs) > 0) == has_tiles
    # Both round to bfloat16 as often; where they differ most, one may be luckier.
    for (_, ours), (_, theirs), (_, right) in zip(*results, strict=True):
        assert max_error(ours, right) < 1.5 * max_error(theirs, right)


def logits_of(engine: Engine, lengths: Sequence[tuple[int, str]] = LENGTHS) -> Any:
    recorder = LogitRecorder(engine)
    # Answers are forced: a near tie must not send the two engines down different texts.
    for i, (length, name) in enumerate(lengths):
        ask(engine, prompt_of(length, i), name, max_tokens=12, ignore_eos=True, logit_bias={5 + i: 100.0})
    run(engine)
    return recorder.results()


@needs_gemm
def test_pages_of_a_request_that_is_gone_do_not_count(new_engine: EngineFactory) -> None:
    """Few pages, many requests one after the other: what an earlier one left in a page must not be seen."""
    model = tiny_model("llama", hidden=64, head_dim=16).bfloat16()
    engine = new_engine(model, page_size=4, prefix_cache=False)
    first = ask(engine, prompt_of(13, 1), max_tokens=15, ignore_eos=True)
    run(engine)
    for cache in (*engine.cache.keys, *engine.cache.values):
        cache[1:] = torch.nan
    second = ask(engine, prompt_of(13, 1), max_tokens=15, ignore_eos=True)
    run(engine)
    assert second.tokens() == first.tokens() and len(first.tokens()) == 15


@needs_gemm
def test_a_team_of_threads_gives_the_bits_of_one(new_engine: EngineFactory, tmp_path: Path) -> None:
    """Prefill and decode rows on adapters; more threads than this machine may have cores, so that some must sleep."""
    model = tiny_model("llama", layers=3, hidden=64, head_dim=16).bfloat16()
    adapters = {
        "all": peft_model(model, 1, r=40, lora_alpha=10, target_modules="all-linear"),
        "some": peft_model(model, 2, r=3, lora_alpha=16, target_modules=["v_proj", "down_proj"]),
    }
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            engine = new_engine(model, page_size=4, max_prefill_rows=24, max_rows=32)
            for name, peft in adapters.items():
                load_peft(engine, name, peft, tmp_path / name)
            assert engine.base.decode_stack is not None
            results.append([logits for _, logits in logits_of(engine)])
            engine = new_engine(model, page_size=16, max_prefill_rows=120, max_rows=160)
            for name, peft in adapters.items():
                load_peft(engine, name, peft, tmp_path / name)
            results[-1] += [logits for _, logits in logits_of(engine, ((100, "all"), (70, "some"), (40, "all")))]
    finally:
        torch.set_num_threads(before)
    for of_one, *of_teams in zip(*results, strict=True):
        assert all(torch.equal(of_one, logits) for logits in of_teams)
