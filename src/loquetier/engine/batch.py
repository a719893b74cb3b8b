"""From a plan to a flat batch: token ids, positions, labels and the step context, with one copy to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loquetier.adapters.methods.method import Method, WeightTable
from loquetier.base.context import DecodeRows, LayerCuts, PrefillSpan, StepContext
from loquetier.base.kv_cache import TRASH_PAGE, KVCache
from loquetier.engine.rows import BASE_SLOT, PrefillChunk, StepPlan, TrainItem
from loquetier.engine.rows import Sequence as TokenSequence
from loquetier.kernels.dropout import DropoutRows
from loquetier.kernels.reference import Segment
from loquetier.kernels.smlm import SmlmPlans
from loquetier.kernels.transfer import to_device
from loquetier.training.data import Example
from loquetier.training.loss import LabelledRows

Int64s = npt.NDArray[np.int64]
ExampleOf = Callable[[TrainItem], tuple[Example, float]]
"""The example behind an item, and the weight of each of its labelled rows."""


@dataclass(frozen=True, slots=True)
class ItemRows:
    """Where an item's labelled rows lie in a `LabelledRows`."""

    item: TrainItem
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Labels:
    """Labelled rows of a kind, and which item each belongs to."""

    rows: LabelledRows
    items: tuple[ItemRows, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input."""

    ids_M: Tensor
    positions_M: Tensor
    step: StepContext
    train_labels: Labels
    eval_labels: Labels
    """Row numbers count from the first EVAL row."""
    num_eval: int
    sampled: tuple[TokenSequence, ...]
    """Sequences that get a token from this step, in row order."""
    sample_rows: Int64s
    sample_rows_N: Tensor
    """The same on the device."""
    prompt_chunks: tuple[tuple[PrefillChunk, int], ...]
    """Chunks whose every row's logits are wanted, with their first row."""

    def sampled_of(self, hidden_MD: Tensor) -> Tensor:
        """The rows of `sampled` ``[N, D]``; no copy when those are all, as in steps that only decode."""
        is_all = len(self.sample_rows) == len(hidden_MD)  # they ascend
        return hidden_MD if is_all else hidden_MD.index_select(0, self.sample_rows_N)


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Tokens of the step before, sampled but not known to the host: where each sequence's lies in `ids_N`."""

    ids_N: Tensor
    index: Mapping[int, int]
    """By sequence id."""


@dataclass(frozen=True, slots=True)
class DropoutPlan:
    """Dropout of a plan's TRAIN rows, still on the host: rate by slot, and one key per row in row order."""

    rates: dict[int, float]
    keys: Int64s


@dataclass(slots=True)
class _Draft:
    """Rows collected so far, kind by kind."""

    ids: list[Int64s] = field(default_factory=list)
    positions: list[Int64s] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    num_rows: int = 0

    def add(self, tokens: Sequence[int], positions: Int64s, slot: int) -> int:
        """Append rows of one slot; returns the first of them. Neighbours on one slot share a segment."""
        start, stop = self.num_rows, self.num_rows + len(tokens)
        self.ids.append(np.asarray(tokens, dtype=np.int64))
        self.positions.append(positions)
        if slot != BASE_SLOT:
            if self.segments and self.segments[-1].slot == slot and self.segments[-1].stop == start:
                start_of_run = self.segments.pop().start
                self.segments.append(Segment(slot, start_of_run, stop))
            else:
                self.segments.append(Segment(slot, start, stop))
        self.num_rows = stop
        return start

    def close_kind(self) -> None:
        """No segment may cross from TRAIN rows to others: only TRAIN segments are differentiated."""
        self.segments.append(Segment(BASE_SLOT, self.num_rows, self.num_rows))


@dataclass(slots=True)
class _Layout:
    """Where a plan's rows lie, still on the host."""

    draft: _Draft
    spans: tuple[tuple[int, int], ...]
    train_labels: Labels
    eval_labels: Labels
    num_train: int
    cache_start: int
    chunk_rows: list[int]
    """First row of each prefill chunk."""
    decode_start: int
    sampled: tuple[TokenSequence, ...]
    sample_rows: Int64s


def build_batch(
    plan: StepPlan,
    example_of: ExampleOf,
    factors: WeightTable,
    grads: WeightTable,
    cache: KVCache,
    cuts: LayerCuts | None,
    dropout: DropoutPlan | None = None,
    methods: Mapping[int, Method] | None = None,
    smlm_plans: SmlmPlans | None = None,
    pending: PendingTokens | None = None,
) -> Batch:
    """Lay a plan's rows out as ``[TRAIN | EVAL | PREFILL | DECODE]``.

    Args:
        example_of: looks a TRAIN or EVAL item up.
        factors, grads: what the step's segments read and accumulate into.
        cuts: the tape that records the TRAIN rows; None when there are none.
        dropout: of the TRAIN rows; None when none of their jobs drops.
        methods: by slot; None or a slot that is not there is LoRA's.
        smlm_plans: kept by the owner of `factors` from step to step; None = nothing is kept.
        pending: where to find the last tokens that only the device knows; None when there are none.
    """
    layout = _lay_out(plan, example_of)
    sent = _send(plan, layout, cache, dropout, pending)
    step = StepContext(
        num_rows=layout.draft.num_rows,
        num_train=layout.num_train,
        segments=tuple(s for s in layout.draft.segments if s.slot != BASE_SLOT),
        factors=factors,
        smlm_plans=smlm_plans,
        grads=grads,
        methods=methods or {},
        spans=layout.spans,
        cache=cache,
        cache_start=layout.cache_start,
        cuts=cuts,
        **sent.step_fields,
    )
    return Batch(
        ids_M=sent.ids_M,
        positions_M=sent.positions_M,
        step=step,
        train_labels=layout.train_labels,
        eval_labels=_shifted(layout.eval_labels, -layout.num_train),
        num_eval=layout.cache_start - layout.num_train,
        sampled=layout.sampled,
        sample_rows=layout.sample_rows,
        sample_rows_N=sent.sample_rows_N,
        prompt_chunks=tuple(
            (c, row) for c, row in zip(plan.prefill, layout.chunk_rows, strict=True) if c.seq.needs_prompt_logits
        ),
    )


def _lay_out(plan: StepPlan, example_of: ExampleOf) -> _Layout:
    draft = _Draft()
    train_spans, train_labels = _add_items(draft, plan.train, example_of)
    num_train = draft.num_rows
    draft.close_kind()
    eval_spans, eval_labels = _add_items(draft, plan.evaluate, example_of)
    cache_start = draft.num_rows
    chunk_rows = [
        draft.add(c.seq.tokens[c.start : c.start + c.length], np.arange(c.start, c.start + c.length), c.seq.slot)
        for c in plan.prefill
    ]
    decode_start = draft.num_rows
    for slot, group in groupby(plan.decode, key=lambda seq: seq.slot):
        seqs = list(group)
        at = np.fromiter((s.num_computed for s in seqs), dtype=np.int64, count=len(seqs))
        # The last known token stands in for one that only the device knows.
        draft.add([s.tokens[-1] for s in seqs], at, slot)
    spans = (*train_spans, *eval_spans)
    done = [(c.seq, row + c.length - 1) for c, row in zip(plan.prefill, chunk_rows, strict=True) if _is_last(c)]
    done += [(seq, decode_start + i) for i, seq in enumerate(plan.decode)]
    return _Layout(
        draft, spans, train_labels, eval_labels, num_train, cache_start, chunk_rows, decode_start,
        sampled=tuple(seq for seq, _ in done), sample_rows=np.asarray([row for _, row in done], dtype=np.int64),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sent:
    """What of a step lives on the device."""

    ids_M: Tensor
    positions_M: Tensor
    sample_rows_N: Tensor
    step_fields: dict[str, Any]


def _send(
    plan: StepPlan, layout: _Layout, cache: KVCache, dropout: DropoutPlan | None, pending: PendingTokens | None
) -> _Sent:
    """Ids, positions, rows to sample, and the fields of the step that live on the device, all sent in one copy."""
    packed = _Packer(cache.keys[0].device)
    ids, positions = packed.add(_joined(layout.draft.ids)), packed.add(_joined(layout.draft.positions))
    rows = _cache_rows(plan, cache.page_size)
    cache_rows, fresh_pages = packed.add(rows), packed.add(rows[rows % cache.page_size == 0] // cache.page_size)
    tables = [packed.add(np.asarray(c.seq.pages, dtype=np.int64)) for c in plan.prefill]
    decode_pages = packed.add(_page_tables(plan.decode))
    dropout_keys = packed.add(dropout.keys if dropout else _joined([]))
    sample_rows, unknown = packed.add(layout.sample_rows), packed.add(_pending_rows(plan, layout, pending))
    packed.send()
    if pending is not None:
        rows_n, index_n = unknown()
        ids().index_copy_(0, rows_n, pending.ids_N.index_select(0, index_n))
    decode = None
    if plan.decode:
        start = layout.decode_start
        decode = DecodeRows(start, positions()[start:], decode_pages(), cache.page_size)
    prefill = tuple(
        PrefillSpan(row, row + c.length, c.start, table())
        for row, c, table in zip(layout.chunk_rows, plan.prefill, tables, strict=True)
    )
    step_fields = {
        "prefill": prefill,
        "decode": decode,
        "cache_rows": cache_rows(),
        "fresh_pages": fresh_pages(),
        "dropout": DropoutRows(dropout.rates, dropout_keys()) if dropout else None,
    }
    return _Sent(ids(), positions(), sample_rows(), step_fields)


def _pending_rows(plan: StepPlan, layout: _Layout, pending: PendingTokens | None) -> Int64s:
    """``[2, n]``: rows whose token only the device knows, and its place among the pending ones."""
    if pending is None:
        return np.zeros((2, 0), dtype=np.int64)
    found = [(layout.decode_start + i, pending.index[s.seq_id]) for i, s in enumerate(plan.decode) if s.num_pending]
    return np.array(found, dtype=np.int64).reshape(-1, 2).T


def head_step(step: StepContext, rows: Int64s, head_module: int | None, *, with_grad: bool) -> StepContext:
    """The context for lm_head on some rows (ascending). Segments matter only if an adapter sits on lm_head."""
    segments: list[Segment] = []
    if head_module is not None:
        for s in step.segments:
            lo, hi = (int(i) for i in np.searchsorted(rows, [s.start, s.stop]))
            if hi > lo and head_module in step.factors[s.slot]:
                segments.append(Segment(s.slot, lo, hi))
    return StepContext(
        num_rows=len(rows),
        num_train=len(rows) if with_grad else 0,
        segments=tuple(segments),
        factors=step.factors,
        grads=step.grads,
        methods=step.methods,
        dropout=step.dropout.at(rows) if with_grad and step.dropout else None,
    )


def _is_last(chunk: PrefillChunk) -> bool:
    return chunk.start + chunk.length == len(chunk.seq.tokens)


def _add_items(
    draft: _Draft, items: Iterable[TrainItem], example_of: ExampleOf
) -> tuple[list[tuple[int, int]], Labels]:
    spans: list[tuple[int, int]] = []
    rows: list[Int64s] = []
    targets: list[Int64s] = []
    weights: list[npt.NDArray[np.float32]] = []
    item_rows: list[ItemRows] = []
    at = 0
    for item in items:
        example, weight = example_of(item)
        stop = item.start + item.num_rows
        assert stop <= example.num_rows
        start = draft.add(example.tokens[item.start : stop], np.arange(item.start, stop), item.slot)
        spans.append((start, draft.num_rows))
        first, last = (int(i) for i in np.searchsorted(example.label_rows, [item.start, stop]))
        rows.append(example.label_rows[first:last] + (start - item.start))
        targets.append(example.label_targets[first:last])
        weights.append(np.full(last - first, weight, dtype=np.float32))
        item_rows.append(ItemRows(item, at, at + last - first))
        at += last - first
    empty = np.zeros(0, dtype=np.float32)
    labelled = LabelledRows(_joined(rows), _joined(targets), np.concatenate(weights) if weights else empty)
    return spans, Labels(labelled, tuple(item_rows))


def _shifted(labels: Labels, by: int) -> Labels:
    rows = labels.rows
    return Labels(LabelledRows(rows.rows + by, rows.targets, rows.weights), labels.items)


def _joined(parts: list[Int64s]) -> Int64s:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _cache_rows(plan: StepPlan, page_size: int) -> Int64s:
    """Flat cache position ``page * page_size + offset`` of every PREFILL and DECODE row."""
    parts = []
    for c in plan.prefill:
        positions = np.arange(c.start, c.start + c.length)
        pages = np.asarray(c.seq.pages, dtype=np.int64)[positions // page_size]
        parts.append(pages * page_size + positions % page_size)
    if plan.decode:
        at = np.asarray([s.num_computed for s in plan.decode], dtype=np.int64)
        pages = np.asarray([s.pages[s.num_computed // page_size] for s in plan.decode], dtype=np.int64)
        parts.append(pages * page_size + at % page_size)
    return _joined(parts)


def _page_tables(decode: Sequence[TokenSequence]) -> Int64s:
    """``[N, most pages]``, padded with the trash page."""
    width = max((len(s.pages) for s in decode), default=0)
    table = np.full((len(decode), width), TRASH_PAGE, dtype=np.int64)
    for row, seq in zip(table, decode, strict=True):
        row[: len(seq.pages)] = seq.pages
    return table


class _Packer:
    """Collects integer arrays and sends them to the device as one tensor; hands out views of it afterwards."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrays: list[Int64s] = []
        self._sent: Tensor | None = None
        self._size = 0

    def add(self, array: Int64s) -> Callable[[], Tensor]:
        start, self._size = self._size, self._size + array.size
        self._arrays.append(array.ravel())

        def view() -> Tensor:
            assert self._sent is not None
            return self._sent[start : start + array.size].view(array.shape)

        return view

    def send(self) -> None:
        self._sent = to_device(_joined(self._arrays), self._device)
