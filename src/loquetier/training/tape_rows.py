"""Which rows a replay tape has, how far its forward is, and what of its steps belongs to them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loquetier.base.context import StepContext
from loquetier.engine.rows import TrainItem
from loquetier.kernels.dropout import DropoutRows
from loquetier.kernels.reference import Segment


class TapeRows:
    """The rows of some items, one after the other, whose forward comes in windows: `begin`, `end`, `begin`, ..."""

    def __init__(self, items: Sequence[TrainItem]) -> None:
        stops: list[int] = []
        for item in items:
            stops.append(item.num_rows + (stops[-1] if stops else 0))
        self.total = stops[-1] if stops else 0
        """Rows of the tape, T."""
        self.done = 0
        """Rows whose forward is complete: the running window's first row."""
        self.count = 0
        """Rows of the window that is running, or ran last."""
        self._firsts = [0, *stops[:-1]]
        self._spans = tuple(zip(self._firsts, stops, strict=True))
        self._segments: list[Segment] = []
        self._keys: list[Tensor] = []
        self._rates: Mapping[int, float] = {}
        self._step = StepContext(num_rows=0)

    def begin(self, step: StepContext) -> None:
        """A window's forward begins: the step's train rows."""
        self.count = step.num_train
        assert 0 < self.count <= self.total - self.done, "more rows than the tape has left"
        for slot, start, stop in step.train_segments:
            self._add(Segment(slot, self.done + start, self.done + stop))
        if step.dropout is not None:
            self._keys.append(step.dropout.keys_T.clone())
            self._rates = step.dropout.rates
        self._step = _without_rows(step)

    def end(self) -> None:
        """The window's forward is complete, its loss included."""
        self.done += self.count

    def first_of(self, row: int) -> int:
        """The tape's row at which the example of the window's row `row` begins."""
        return self._firsts[bisect_right(self._firsts, self.done + row) - 1]

    def whole_step(self) -> StepContext:
        """A step of all T rows and no others."""
        assert self.done == self.total
        dropout = DropoutRows(self._rates, torch.cat(self._keys)) if self._keys else None
        return replace(
            self._step,
            num_rows=self.total,
            num_train=self.total,
            segments=tuple(self._segments),
            spans=self._spans,
            dropout=dropout,
        )

    def _add(self, segment: Segment) -> None:
        """A segment that a window cut in two is one again."""
        if self._segments and segment.slot == self._segments[-1].slot and segment.start == self._segments[-1].stop:
            segment = segment._replace(start=self._segments.pop().start)
        self._segments.append(segment)


def _without_rows(step: StepContext) -> StepContext:
    """Weights and gradients; nothing of the tape itself, of the cache or of any rows stays alive."""
    return replace(
        step,
        num_rows=0,
        num_train=0,
        segments=(),
        spans=(),
        prefill=(),
        decode=None,
        cache=None,
        cache_rows=None,
        fresh_pages=None,
        cuts=None,
        dropout=None,
    )
