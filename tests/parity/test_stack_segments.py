"""The C stack on layouts of segments that end at, before and behind the borders of tiles, pieces and chunks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.parity.helpers import EngineFactory, new_engine, prompt_of
from tests.tiny import tiny_model
from torch import Tensor

from loquetier.base.context import PrefillSpan, StepContext
from loquetier.base.model import Base
from loquetier.base.stack_deltas import _SLOTS_KEPT, StackDeltas
from loquetier.engine.engine import Engine
from loquetier.kernels.gemm import AMX, NO_KERNEL, GemmKernel
from loquetier.kernels.reference import Factors, FactorTable, Segment
from loquetier.kernels.select import process_kernels
from loquetier.kernels.smlm import SmlmPlans

__all__ = ["new_engine"]

_library = process_kernels().native("base_gemm")
LEVEL = NO_KERNEL if _library is None else GemmKernel(_library).level
pytestmark = pytest.mark.skipif(LEVEL == NO_KERNEL, reason="this machine has no AVX512_BF16")

PAGE = 16
RANKS = {0: 16, 1: 17, 2: 512, 3: 5, 4: 513}
PARTIAL = {1: ("v_proj", "o_proj", "up_proj"), 3: ("q_proj", "k_proj", "down_proj")}
"""What the adapters sit on that do not sit on everything."""
SHAPES: dict[str, dict[str, Any]] = {
    "whole lines, three chunks": {"hidden": 96, "head_dim": 16, "intermediate_size": 352},
    "tiles and pieces in one GEMM": {"hidden": 96, "head_dim": 16, "kv_heads": 1},
    "odd widths": {"hidden": 40, "head_dim": 8, "intermediate_size": 72},
}
LAYOUTS: dict[str, tuple[Segment, ...]] = {
    "whole lines, three chunks": (
        Segment(0, 0, 31), Segment(1, 31, 63), Segment(2, 64, 97), Segment(3, 97, 97), Segment(3, 97, 98),
        Segment(0, 98, 162),
    ),
    "tiles and pieces in one GEMM": (Segment(0, 0, 40), Segment(1, 41, 74), Segment(4, 74, 79), Segment(3, 79, 111)),
    "odd widths": (Segment(1, 0, 33), Segment(0, 34, 66), Segment(3, 66, 67), Segment(4, 68, 73)),
}  # fmt: skip
BASE_ROWS = 3
"""Behind the last segment."""
TIMES_THE_PYTHON_STACK = 2.0
"""The same arithmetic kernel by kernel rounds as often, elsewhere: its error says what bfloat16 costs, 1 to 4 % of a
row's length; the two differ by 21 % at most. A wrong block of 16 columns, rank or scale costs 10 % and more."""


def factors_of(base: Base, dtype: torch.dtype) -> dict[int, dict[int, Factors]]:
    """Adapters whose deltas are as large as what they are added to."""
    generator = torch.Generator().manual_seed(1)
    return {
        slot: {
            t.index: Factors(
                torch.randn(rank, t.in_features, generator=generator).mul_(0.1).to(dtype),
                torch.randn(rank, t.out_features, generator=generator).mul_(0.3).to(dtype),
                6 / rank**0.5,
            )
            for t in base.targets
            if t.layer is not None and t.path.endswith(PARTIAL.get(slot, ""))
        }
        for slot, rank in RANKS.items()
    }


def hidden_of(engine: Engine, segments: Sequence[Segment], factors: FactorTable) -> Tensor:
    """The rows of one prompt that several adapters share, which no scheduler would do."""
    num_rows = segments[-1].stop + BASE_ROWS
    pages_B, rows_M = torch.arange(1, num_rows // PAGE + 2), torch.arange(num_rows)
    step = StepContext(
        num_rows=num_rows,
        segments=tuple(segments),
        factors=factors,
        smlm_plans=SmlmPlans(),
        prefill=(PrefillSpan(0, num_rows, 0, pages_B),),
        cache=engine.cache,
        cache_rows=PAGE + rows_M,
        fresh_pages=pages_B,
    )
    stack = engine.base.decode_stack
    assert stack is None or stack.takes(step)
    return engine.base.hidden(torch.tensor(prompt_of(num_rows, 3)), rows_M, step)


def errors(ours_MD: Tensor, right_MD: Tensor, segments: Sequence[Segment]) -> list[float]:
    """Of each segment, and of the rows on the base: the mean over its rows of error by length."""
    error_M = (ours_MD.float() - right_MD).norm(dim=1) / right_MD.norm(dim=1)
    is_base_M = torch.ones(len(error_M), dtype=torch.bool)
    for s in segments:
        is_base_M[s.start : s.stop] = False
    return [float(error_M[s.start : s.stop].mean()) for s in segments if s.stop > s.start] + [
        float(error_M[is_base_M].mean())
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_segments_at_every_border(shape: str, dtype: torch.dtype, new_engine: EngineFactory) -> None:
    """31, 32 and 33 rows, ranks at the tiles' limits, a slot twice, an empty segment, rows of no adapter between."""
    model = tiny_model("llama", layers=1, **SHAPES[shape]).bfloat16()
    settings = {"page_size": PAGE, "adapter_dtype": "float32"}
    fast, slow = (new_engine(model, **settings) for _ in range(2))
    exact = new_engine(copy.deepcopy(model).float(), **settings)
    assert fast.base.decode_stack is not None and exact.base.decode_stack is None
    slow.base.decode_stack = None
    factors = factors_of(fast.base, dtype)
    wide = {
        slot: {m: Factors(f.a_RK.float(), f.b_RN.float(), f.scale) for m, f in of.items()}
        for slot, of in factors.items()
    }
    segments = LAYOUTS[shape]
    right_MD, theirs_MD = hidden_of(exact, segments, wide), hidden_of(slow, segments, factors)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(hidden_of(fast, segments, factors))
    finally:
        torch.set_num_threads(before)
    pairs = zip(errors(found[0], right_MD, segments), errors(theirs_MD, right_MD, segments), strict=True)
    for number, (ours, theirs) in enumerate(pairs):
        assert ours < TIMES_THE_PYTHON_STACK * theirs, number
    assert all(torch.equal(found[0], of_team) for of_team in found[1:])


def new_deltas(new_engine: EngineFactory, shape: str) -> tuple[StackDeltas, Base]:
    base = new_engine(tiny_model("llama", layers=1, **SHAPES[shape]).bfloat16(), page_size=PAGE).base
    assert base.fused is not None and base.decode_stack is not None
    return StackDeltas(base.fused, base.decode_stack._native, LEVEL), base


def assert_reads_only(deltas: StackDeltas, slot: int, factors: FactorTable) -> None:
    """One row of this slot: as many pieces as there are halves of its weights, each on its own tensor."""
    pieces = deltas.cut((Segment(slot, 0, 1),), factors).pieces
    assert pieces is not None
    tensors = sorted(f.data_ptr() for factor in factors[slot].values() for f in factor[:2])
    assert sorted(p.w for p in pieces.pieces) == tensors


def narrow(base: Base, slots: Sequence[int]) -> dict[int, Mapping[int, Factors]]:
    """Adapters of rank 1 on one module, each with memory of its own."""
    target = base.targets[0]
    return {n: {target.index: Factors(torch.ones(1, target.in_features), torch.ones(1, target.out_features), 1.0)}
            for n in slots}  # fmt: skip


def test_a_slot_of_another_arena_is_another_slot(new_engine: EngineFactory) -> None:
    deltas, base = new_deltas(new_engine, "odd widths")
    one, other = narrow(base, [0]), narrow(base, [0])
    for factors in (one, other, one):
        assert_reads_only(deltas, 0, factors)


def test_slots_come_and_go(new_engine: EngineFactory) -> None:
    """More of them than are kept, some again; what was read and is no longer used goes."""
    deltas, base = new_deltas(new_engine, "odd widths")
    factors = narrow(base, range(_SLOTS_KEPT + 3))
    for slot in (*factors, 0, 2, _SLOTS_KEPT):
        assert_reads_only(deltas, slot, factors)
    assert len(deltas._slots) == _SLOTS_KEPT


def taken(deltas: StackDeltas, base: Base, *cases: tuple[int, int]) -> list[bool]:
    """Whether C takes one segment of so many rows and ranks."""
    target, found = base.targets[0], []
    for num_rows, rank in cases:
        factor = Factors(torch.ones(rank, target.in_features), torch.ones(rank, target.out_features), 1.0)
        found.append(deltas.cut((Segment(0, 0, num_rows),), {0: {target.index: factor}}).pieces is not None)
    return found


def test_what_torch_is_faster_on_is_left_to_it(new_engine: EngineFactory) -> None:
    """3,072 rows x ranks; on tiles any number of rows, up to rank 512 and in whole lines."""
    odd, base = new_deltas(new_engine, "odd widths")
    assert taken(odd, base, (32, 96), (32, 97), (1, 513)) == [True, False, True]
    whole, base = new_deltas(new_engine, "whole lines, three chunks")
    assert taken(whole, base, (32, 97), (300, 512), (33, 513), (5, 513)) == [LEVEL >= AMX, LEVEL >= AMX, False, True]


def test_weights_that_c_cannot_read(new_engine: EngineFactory) -> None:
    """Two dtypes in a step; columns that do not lie side by side; an adapter of nothing in the stack is none."""
    deltas, base = new_deltas(new_engine, "odd widths")
    factors = narrow(base, range(4))
    (module, (a_RK, b_RN, scale)), = factors[1].items()  # fmt: skip
    factors[1] = {module: Factors(a_RK.bfloat16(), b_RN.bfloat16(), scale)}
    factors[2] = {module: Factors(torch.ones(a_RK.shape[1], 2).T[:1], b_RN, scale)}
    factors[3] = {}
    factors[4] = {module: Factors(a_RK, torch.ones(b_RN.shape[1], 2).T[:1], scale)}
    assert not (factors[2][module].a_RK.is_contiguous() or factors[4][module].b_RN.is_contiguous())
    rows = [Segment(slot, slot, slot + 1) for slot in range(5)]
    assert deltas.cut((rows[0], rows[1]), factors).pieces is None
    assert deltas.cut((rows[0], rows[2]), factors).pieces is None
    assert deltas.cut((rows[4],), factors).pieces is None
    for slots in ((0,), (1,), (0, 3), (1, 3)):
        assert deltas.cut([rows[i] for i in slots], factors).pieces is not None
    nothing = deltas.cut((rows[3],), factors).pieces
    assert nothing is not None and not len(nothing.pieces) and not len(nothing.longs)


def test_segments_without_rows_are_no_adapters(new_engine: EngineFactory) -> None:
    deltas, base = new_deltas(new_engine, "odd widths")
    pieces = deltas.cut((Segment(0, 4, 4),), narrow(base, [0])).pieces
    assert pieces is not None and not len(pieces.pieces) and pieces.num_s == 0
