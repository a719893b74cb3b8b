"""Steps of decode rows alone, captured once per size and replayed: one call instead of a thousand launches.

A graph has fixed addresses and shapes, so a step's tables are copied into tables of the next larger size: a bucket of
rows and a width of page tables. Rows beyond the step's own are padding: token 0 at position 0, K and V into the trash
page, no adapter. All of that is the number 0, so padding is what a table holds before a step is copied in.

There are graphs without adapters, for steps of base rows, and graphs whose SMLM reads its segments from a table that
is filled for each step (`kernels.smlm.SmlmPlans.fixed`). A graph is captured when its size is first needed. What is no
pure decode step, or has an adapter that is no LoRA, runs as it always did.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loquetier.adapters.methods import LORA_METHOD
from loquetier.base.context import DecodeRows, FixedLora, StepContext
from loquetier.base.kv_cache import TRASH_PAGE, KVCache
from loquetier.base.model import Base
from loquetier.engine.batch import Batch
from loquetier.kernels.reference import Segment
from loquetier.kernels.smlm import SmlmPlans

log = logging.getLogger("loquetier.engine")

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Larger steps are no longer bound by launches."""
FIRST_WIDTH = 32
"""Pages of the narrowest table; each wider one has four times as many."""
assert TRASH_PAGE == 0, "padding is zero"


class Captured(NamedTuple):
    """Work that can be repeated."""

    replay: Callable[[], None]
    out_ND: Tensor
    """Written by each replay."""


class Capture(Protocol):
    """Makes `Captured` of a call whose tensors keep their addresses."""

    reruns: bool
    """Whether a replay calls the Python code again, as the tests' stand-in does."""

    def __call__(self, run: Callable[[], Tensor]) -> Captured: ...


class CudaCapture:
    """A CUDA graph. All graphs share one pool of memory: they run one after the other."""

    reruns = False

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        """Runs it twice before it records it: kernels compile and libraries take their workspace there."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may take page-locked memory meanwhile; that must not break the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()
        return Captured(graph.replay, out)


class Size(NamedTuple):
    """What a graph is captured for."""

    rows: int
    width: int
    """Pages per row."""
    has_lora: bool


def size_for(rows: int, pages: int, has_lora: bool) -> Size | None:
    """The smallest size that holds so many rows and pages per row; None when there are more rows than in any."""
    at = bisect_left(ROW_BUCKETS, rows)
    if at == len(ROW_BUCKETS):
        return None
    width = FIRST_WIDTH
    while width < pages:
        width *= 4
    return Size(ROW_BUCKETS[at], width, has_lora)


class Tables:
    """The inputs of one graph: one int64 tensor, and its parts."""

    def __init__(self, size: Size, device: torch.device) -> None:
        n, width = size.rows, size.width
        self._all = torch.zeros(4 * n + n * width, dtype=torch.int64, device=device)
        parts = torch.split(self._all, [n, n, n, n, n * width])
        self.ids_N, self.positions_N, self.cache_rows_N, self.fresh_pages_N = parts[:4]
        self.pages_NB = parts[4].view(n, width)

    def fill(self, batch: Batch) -> None:
        """Take a step's tables; what they do not fill becomes padding. Queued on the device, in order."""
        step = batch.step
        assert step.decode is not None and step.cache_rows is not None and step.fresh_pages is not None
        self._all.zero_()
        n, fresh, width = len(batch.ids_M), len(step.fresh_pages), step.decode.pages_NB.shape[1]
        self.ids_N[:n].copy_(batch.ids_M)
        self.positions_N[:n].copy_(batch.positions_M)
        self.cache_rows_N[:n].copy_(step.cache_rows)
        self.fresh_pages_N[:fresh].copy_(step.fresh_pages)
        self.pages_NB[:n, :width].copy_(step.decode.pages_NB)


@dataclass(slots=True)
class _Graph:
    tables: Tables
    captured: Captured
    lora: FixedLora | None
    slot_table: Tensor | None
    """Where the graph reads which adapter lies where; one that has grown lies elsewhere."""
    segments: tuple[Segment, ...] = ()
    """Of the running step: what a capture that reruns reads."""


class DecodeGraphs:
    """Owns the graphs of an engine.

    Args:
        plans: of the arena whose adapters the steps run on.
        capture: `CudaCapture`, or a stand-in.
        lora_is_fixed: whether SMLM runs from tables on the device here; without, steps with adapters run as ever.
    """

    def __init__(self, base: Base, cache: KVCache, plans: SmlmPlans, capture: Capture, *, lora_is_fixed: bool) -> None:
        self._base, self._cache, self._plans, self._capture = base, cache, plans, capture
        self._lora_is_fixed = lora_is_fixed
        self._graphs: dict[Size, _Graph] = {}
        self.refusal: str | None = None
        """Why nothing is captured any more; None while all is well."""
        self.captures = 0
        self.capture_seconds = 0.0
        self.capture_bytes = 0

    def size_of(self, batch: Batch) -> Size | None:
        """The graph for a step, or None: it has other rows than decode rows, too many, or another method's."""
        step = batch.step
        if self.refusal is not None or step.decode is None or step.decode.start or not len(batch.ids_M):
            return None
        has_lora = any(s.slot in step.factors and step.factors[s.slot] for s in step.segments)
        if has_lora and not self._lora_is_fixed:
            return None
        if any(step.methods.get(s.slot, LORA_METHOD) is not LORA_METHOD for s in step.segments):
            return None
        return size_for(len(batch.ids_M), step.decode.pages_NB.shape[1], has_lora)

    def __call__(self, batch: Batch) -> Tensor | None:
        """Final hidden states ``[N, D]`` of a step, valid until the next call; None when it is not for a graph."""
        size = self.size_of(batch)
        if size is None:
            return None
        graph = self._graphs.get(size)
        if graph is None or not self._refilled(graph, batch):
            try:
                graph = self._made(size, batch)
            except RuntimeError as error:  # lack of memory too: the step itself may still fit
                log.exception("CUDA graphs are off, this base cannot be captured: steps run kernel by kernel")
                self.refusal = f"{type(error).__name__}: {error}"
                return None
            self._graphs[size] = graph
        graph.captured.replay()
        return graph.captured.out_ND[: len(batch.ids_M)]

    def _refilled(self, graph: _Graph, batch: Batch) -> bool:
        """Put a step into a graph's tables; False when its adapters need another graph."""
        step, lora = batch.step, graph.lora
        graph.segments = step.segments
        if lora is not None:
            slots = [s for s in step.segments if step.factors[s.slot]]
            if any(not lora.modules.issuperset(step.factors[s.slot]) for s in slots):
                return False
            if lora.plan is not None:
                device = self._base.device
                if graph.slot_table is not lora.plan.slot_table(device).tensor:
                    return False
                if not self._plans.fill(lora.plan, step.segments, step.factors, device):
                    return False
        graph.tables.fill(batch)
        return True

    def _made(self, size: Size, batch: Batch) -> _Graph:
        base, step, started = self._base, batch.step, time.perf_counter()
        before = _reserved(base.device)
        tables, lora, slot_table = Tables(size, base.device), None, None
        if size.has_lora:
            lora = self._fixed_lora(size, batch)
            slot_table = lora.plan.slot_table(base.device).tensor if lora.plan is not None else None
        graph = _Graph(tables, Captured(_nothing, tables.ids_N), lora, slot_table)
        if not self._refilled(graph, batch):
            raise AssertionError("a graph is made for the step that needs it")

        def run() -> Tensor:
            return base.hidden(tables.ids_N, tables.positions_N, self._context(size, graph, step))

        graph.captured = self._capture(run)
        seconds, taken = time.perf_counter() - started, _reserved(base.device) - before
        self.captures, self.capture_seconds = self.captures + 1, self.capture_seconds + seconds
        self.capture_bytes += taken
        log.info("captured %s in %.2f s; it took %d MiB", size, seconds, taken >> 20)
        return graph

    def _fixed_lora(self, size: Size, batch: Batch) -> FixedLora:
        """For the step's adapters, and any others whose modules and rank are among theirs."""
        step = batch.step
        known = self._graphs.get(size)
        slots = [slot for slot in dict.fromkeys(s.slot for s in step.segments) if step.factors[slot]]
        modules = frozenset(m for slot in slots for m in step.factors[slot])
        if known is not None and known.lora is not None:
            modules |= known.lora.modules  # two kinds of adapters that take turns are not captured again and again
        if self._capture.reruns:
            return FixedLora(None, modules)
        return FixedLora(self._plans.fixed(size.rows, step.factors, slots, self._base.device), modules)

    def _context(self, size: Size, graph: _Graph, step: StepContext) -> StepContext:
        """The step as the graph sees it. New for each run: a step keeps masks, which are of one run."""
        tables = graph.tables
        return StepContext(
            num_rows=size.rows,
            segments=graph.segments if size.has_lora else (),
            factors=step.factors,
            methods=step.methods,
            smlm_plans=self._plans,
            fixed_lora=graph.lora,
            decode=DecodeRows(0, tables.positions_N, tables.pages_NB, self._cache.page_size),
            cache=self._cache,
            cache_start=0,
            cache_rows=tables.cache_rows_N,
            fresh_pages=tables.fresh_pages_N,
        )


def _nothing() -> None:
    """The replay of a graph that is not captured yet."""


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
