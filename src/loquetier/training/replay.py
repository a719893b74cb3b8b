"""The replay tape: a training forward of which only layer inputs, K and V are kept; backward runs layers again.

The forward records no graph and may be spread over steps, a window of rows each: a window's rows see the K and V of
their example's earlier windows. Then one unit = one layer on one window of rows, from the last rows to the first:

    run the layer again on the window, with the K and V of the example's earlier rows as leaves;
    add to its own K's and V's gradients what later windows gave them; go backward;
    keep the leaves' gradients for the windows that come.

So memory is bounded by the layer inputs, one layer's K and V gradients and the graph of one layer over one window,
whatever the length, and a unit is as short as its window. The arithmetic is that of the graph tape on fewer rows at
a time: gradients differ by rounding only. Windows are cut over all train rows, across examples and jobs; the forward's
windows and the units' need not be the same. (The idea is SeCO's, arXiv 2505.16710, with layers in the outer loop.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from loquetier.base.context import LayerCall, ReplaySpan, StepContext
from loquetier.engine.rows import REPLAY_COST, TrainItem, cut_rows
from loquetier.errors import UnsupportedModelError
from loquetier.kernels.reference import Segment
from loquetier.training.layer_call import KeptCall, RowTensors, put_rows
from loquetier.training.tape_rows import TapeRows

RunLayer = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any], StepContext], Tensor]
"""`Base.run_layer`."""
KV = tuple[Tensor, Tensor]


@dataclass(slots=True)
class _Layer:
    """What one layer's units need. Freed after its last unit."""

    number: int
    input_1TD: Tensor
    call: KeptCall


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows ``[start, stop)`` of the window, of the example that begins at train row `first`."""

    first: int
    start: int
    stop: int


class ReplayTape:
    """Bounded memory and short units, for a second forward.

    Use: per step of the forward (as long as there are `forward_left` rows) pass it as `StepContext.cuts`, `close` it
    with the final hidden states and `start` it with their gradient; then `run_unit` until `units_left` is 0.

    Args:
        items: what is being trained; their rows, one after the other, are the tape's T rows.
        run_layer: runs one layer of the base alone.
        num_layers: of the base.
        window: most rows of a unit.
        first_layer: layers below hold no trained weights.
    """

    def __init__(
        self, items: tuple[TrainItem, ...], run_layer: RunLayer, num_layers: int, window: int, first_layer: int = 0
    ) -> None:
        self.items = items
        self._rows = TapeRows(items)
        self.num_train = self._rows.total
        self._run_layer, self._num_layers, self._window, self._first_layer = run_layer, num_layers, window, first_layer
        self._layers: list[_Layer] = []
        self._kv: dict[int, KV] = {}
        """By layer, ``[K, T, D]`` each. While the forward is not complete those of the layers below, too."""
        self._arguments = RowTensors(self.num_train)
        self._running = 0
        """The layer whose forward runs."""
        self._step = StepContext(num_rows=0)
        """A step of all T rows and no others, once the forward is complete; a unit's step is cut from it."""
        self._last_output: Tensor | None = None
        self._final_leaf: Tensor | None = None
        self._final_edge: GradientEdge | None = None
        self._grad_1TD: Tensor | None = None
        """Gradient of the output of the layer whose units run; rows whose unit is done hold that of its input."""
        self._at = self.num_train
        """Rows from here on are done in the topmost layer left."""
        self._past_grads: dict[int, KV] = {}
        """Per example (by its first row): gradients of the K and V of its rows that are not done, in that layer."""

    @property
    def forward_left(self) -> tuple[TrainItem, ...]:
        """Rows whose forward is still to come, in row order."""
        return cut_rows(self.items, self._rows.done, self.num_train)

    @property
    def units_left(self) -> int:
        """Units until every gradient of this tape is complete; none can run before the forward is."""
        layers = len(self._layers) if self._rows.done else self._num_layers - self._first_layer
        if not layers:
            return 0
        return (layers - 1) * -(-self.num_train // self._window) + -(-self._at // self._window)

    @property
    def unit_rows(self) -> int:
        """What a unit costs, in rows going backward through one layer of a graph tape."""
        return REPLAY_COST * min(self._window, self.num_train)

    def cut(self, layer: int, hidden_1MD: Tensor, call: LayerCall) -> Tensor:
        """Called by the base with each layer's input: keeps its train rows. No graph begins here."""
        hidden_1MD = hidden_1MD.detach()
        if layer == 0:
            self._rows.begin(call.step)
        self._running = layer
        if layer < self._first_layer:
            return hidden_1MD
        if self._last_output is not None and self._last_output.data_ptr() != hidden_1MD.data_ptr():
            raise UnsupportedModelError(
                f"the model changes the hidden states between layers {layer - 1} and {layer}; "
                "the replay tape runs layers alone: train this base with tape='graph'"
            )
        rows_1nD = hidden_1MD[:, : self._rows.count]
        if self._rows.done == 0:
            kept_1TD = put_rows(None, rows_1nD, 0, self.num_train)
            self._layers.append(_Layer(layer, kept_1TD, self._arguments.keep(call)))
        else:
            kept = self._layers[layer - self._first_layer]
            put_rows(kept.input_1TD, rows_1nD, self._rows.done, self.num_train)
            self._arguments.add(kept.call, call)
        return hidden_1MD

    def keep_kv(self, k_KMD: Tensor, v_KMD: Tensor) -> None:
        """Called by the attention of the layer that is running: keeps the train rows' K and V."""
        done, count, total = self._rows.done, self._rows.count, self.num_train
        if self._running < self._first_layer and count == total:
            return  # neither a unit nor another window will read it
        k_KTD, v_KTD = self._kv.get(self._running, (None, None))
        assert (k_KTD is None) == (done == 0), "one attention per layer"
        self._kv[self._running] = (
            put_rows(k_KTD, k_KMD[:, :count], done, total),
            put_rows(v_KTD, v_KMD[:, :count], done, total),
        )

    def seen_kv(self, start: int, stop: int) -> KV | None:
        """Called by the attention after `keep_kv`: see `LayerCuts`."""
        first = self._rows.first_of(start)
        if first == self._rows.done + start:
            return None
        k_KTD, v_KTD = self._kv[self._running]
        return k_KTD[:, first : self._rows.done + stop], v_KTD[:, first : self._rows.done + stop]

    def leave(self, layer: int, hidden_1MD: Tensor) -> Tensor:
        """Called by the base with each layer's output. What follows the last layer (a norm) is recorded as a graph."""
        if layer < self._first_layer:
            return hidden_1MD
        self._last_output = hidden_1MD
        if layer + 1 < self._num_layers:
            return hidden_1MD
        count = self._rows.count
        leaf = put_rows(None, hidden_1MD[:, :count], 0, count).requires_grad_()
        self._final_leaf = leaf
        others = hidden_1MD[:, count:]
        return torch.cat([leaf, others], dim=1) if others.shape[1] else leaf

    def close(self, hidden_MD: Tensor) -> Tensor:
        """End a step's forward; returns its train rows' final hidden states ``[n, D]``, detached, for the loss."""
        count = self._rows.count
        if self._final_leaf is not None:
            self._final_edge = get_gradient_edge(hidden_MD[:count])
        self._last_output = None
        self._arguments.end_window(count)
        return hidden_MD.detach()[:count]

    def start(self, grad_nD: Tensor) -> None:
        """Give the loss's gradient with respect to what `close` returned; after the last rows' units may run."""
        if self._final_leaf is not None:
            assert self._final_edge is not None
            (grad_1nD,) = torch.autograd.grad([self._final_edge], [self._final_leaf], [grad_nD])
            if self._grad_1TD is None:  # units write into it: it must be nobody else's
                self._grad_1TD = grad_1nD.new_empty((1, self.num_train, grad_1nD.shape[2]))
            self._grad_1TD[:, self._rows.done : self._rows.done + self._rows.count] = grad_1nD
            self._final_leaf = self._final_edge = None
        self._rows.end()
        if self._rows.done == self.num_train:
            self._step = self._rows.whole_step()
            self._kv = {layer: kv for layer, kv in self._kv.items() if layer >= self._first_layer}

    def run_unit(self) -> None:
        """Backward through the topmost layer left on its next window; adds its adapters' gradients to their buffers."""
        assert self._grad_1TD is not None and not self.forward_left, "the forward comes first"
        layer = self._layers[-1]
        stop = self._at
        start = (stop - 1) // self._window * self._window
        pieces = self._pieces(start, stop)
        spans = [self._span(layer, piece, start) for piece in pieces]
        step = self._window_step(start, stop, tuple(spans))
        leaf = layer.input_1TD[:, start:stop].detach().requires_grad_()
        args, kwargs = layer.call.rows(start, stop)
        out = self._run_layer(layer.number, leaf, args, kwargs, step)
        past = [t for span in spans if span.past_kv is not None for t in span.past_kv]
        grad, *past_grads = torch.autograd.grad([out], [leaf, *past], [self._grad_1TD[:, start:stop]])
        self._grad_1TD[:, start:stop] = grad
        self._add_past_grads(pieces, spans, past_grads)
        self._at = start
        if start == 0:
            self._layers.pop()
            del self._kv[layer.number]
            self._at = self.num_train

    def _pieces(self, start: int, stop: int) -> list[_Piece]:
        """The examples' parts of a window; row numbers inside the window."""
        return [
            _Piece(a, max(a, start) - start, min(b, stop) - start)
            for a, b in self._step.spans
            if a < stop and b > start
        ]

    def _span(self, layer: _Layer, piece: _Piece, start: int) -> ReplaySpan:
        num_past, stop = start + piece.start - piece.first, start + piece.stop - piece.first
        past: KV | None = None
        if num_past:
            k, v = (
                t[:, piece.first : piece.first + num_past].detach().requires_grad_() for t in self._kv[layer.number]
            )
            past = (k, v)
        later = self._past_grads.get(piece.first)
        grads: KV | None = None
        if later is not None:
            grads = (later[0][:, num_past:stop], later[1][:, num_past:stop])
        return ReplaySpan(piece.start, piece.stop, past, grads)

    def _add_past_grads(self, pieces: list[_Piece], spans: list[ReplaySpan], past_grads: list[Tensor]) -> None:
        """The leaves' gradients, plus what later windows gave to the same rows, wait for these rows' windows."""
        grads = iter(past_grads)
        for piece, span in zip(pieces, spans, strict=True):
            later = self._past_grads.pop(piece.first, None)
            if span.past_kv is None:
                continue
            # Summed over all later windows: in bfloat16 each addition would round.
            k, v = (t.float() if t.itemsize < 4 else t for t in (next(grads), next(grads)))
            if later is not None:
                num_past = k.shape[1]
                k, v = k + later[0][:, :num_past], v + later[1][:, :num_past]
            self._past_grads[piece.first] = (k, v)

    def _window_step(self, start: int, stop: int, spans: tuple[ReplaySpan, ...]) -> StepContext:
        segments = tuple(
            Segment(s.slot, max(s.start, start) - start, min(s.stop, stop) - start)
            for s in self._step.segments
            if s.start < stop and s.stop > start
        )
        dropout = self._step.dropout.at(np.arange(start, stop)) if self._step.dropout else None
        return replace(
            self._step,
            num_rows=stop - start,
            num_train=stop - start,
            segments=segments,
            spans=(),
            replay=spans,
            dropout=dropout,
        )
