"""The replay tape: a training forward of which only layer inputs, K and V are kept; backward runs layers again.

The forward records no graph. One unit = one layer on one window of rows, from the last rows to the first:

    run the layer again on the window, with the K and V of the example's earlier rows as leaves;
    add to its own K's and V's gradients what later windows gave them; go backward;
    keep the leaves' gradients for the windows that come.

So memory is bounded by the layer inputs, one layer's K and V gradients and the graph of one layer over one window,
whatever the length, and a unit is as short as its window. The arithmetic is that of the graph tape on fewer rows at
a time: gradients differ by rounding only. Windows are cut over all train rows, across examples and jobs. (The idea is
SeCO's, arXiv 2505.16710, with layers in the outer loop.)
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
from loquetier.engine.rows import REPLAY_COST, TrainItem
from loquetier.errors import UnsupportedModelError
from loquetier.kernels.reference import Segment
from loquetier.training.layer_call import KeptCall, RowTensors, own

RunLayer = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any], StepContext], Tensor]
"""`Base.run_layer`."""
KV = tuple[Tensor, Tensor]


@dataclass(slots=True)
class _Layer:
    """What one layer's units need. Freed after its last unit."""

    number: int
    input_1TD: Tensor
    call: KeptCall
    kv_KTD: KV | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows ``[start, stop)`` of the window, of the example that begins at train row `first`."""

    first: int
    start: int
    stop: int


class ReplayTape:
    """Bounded memory and short units, for a second forward. Use as `GraphTape`.

    Args:
        items: what is being trained.
        num_train: TRAIN rows, T.
        run_layer: runs one layer of the base alone.
        num_layers: of the base.
        window: most rows of a unit.
        first_layer: layers below hold no trained weights.
    """

    def __init__(
        self,
        items: tuple[TrainItem, ...],
        num_train: int,
        run_layer: RunLayer,
        num_layers: int,
        window: int,
        first_layer: int = 0,
    ) -> None:
        self.items, self.num_train = items, num_train
        self._run_layer, self._num_layers, self._window, self._first_layer = run_layer, num_layers, window, first_layer
        self._layers: list[_Layer] = []
        self._rows = RowTensors(num_train)
        self._step = StepContext(num_rows=0)
        """The forward's step without its inference rows; a window's step is cut from it."""
        self._last_output: Tensor | None = None
        self._final_leaf: Tensor | None = None
        self._final_edge: GradientEdge | None = None
        self._grad_1TD: Tensor | None = None
        """Gradient of the output of the layer whose units run; rows whose unit is done hold that of its input."""
        self._at = num_train
        """Rows from here on are done in the topmost layer left."""
        self._past_grads: dict[int, KV] = {}
        """Per example (by its first row): gradients of the K and V of its rows that are not done, in that layer."""

    @property
    def units_left(self) -> int:
        """Units until every gradient of this tape is complete."""
        if not self._layers:
            return 0
        return (len(self._layers) - 1) * -(-self.num_train // self._window) + -(-self._at // self._window)

    @property
    def unit_rows(self) -> int:
        """What a unit costs, in rows going backward through one layer of a graph tape."""
        return REPLAY_COST * min(self._window, self.num_train)

    def cut(self, layer: int, hidden_1MD: Tensor, call: LayerCall) -> Tensor:
        """Called by the base with each layer's input: keeps its train rows. No graph begins here."""
        hidden_1MD = hidden_1MD.detach()
        if layer < self._first_layer:
            return hidden_1MD
        if self._last_output is not None and self._last_output.data_ptr() != hidden_1MD.data_ptr():
            raise UnsupportedModelError(
                f"the model changes the hidden states between layers {layer - 1} and {layer}; "
                "the replay tape runs layers alone: train this base with tape='graph'"
            )
        if not self._layers:
            self._step = _without_inference(call.step)
        self._layers.append(_Layer(layer, own(hidden_1MD[:, : self.num_train]), self._rows.keep(call)))
        return hidden_1MD

    def keep_kv(self, k_KMD: Tensor, v_KMD: Tensor) -> None:
        """Called by the attention of the layer that is running: keeps the train rows' K and V."""
        if not self._layers:
            return
        assert self._layers[-1].kv_KTD is None, "one attention per layer"
        self._layers[-1].kv_KTD = (own(k_KMD[:, : self.num_train]), own(v_KMD[:, : self.num_train]))

    def leave(self, layer: int, hidden_1MD: Tensor) -> Tensor:
        """Called by the base with each layer's output. What follows the last layer (a norm) is recorded as a graph."""
        if not self._layers:
            return hidden_1MD
        self._last_output = hidden_1MD
        if layer + 1 < self._num_layers:
            return hidden_1MD
        leaf = own(hidden_1MD[:, : self.num_train]).requires_grad_()
        self._final_leaf = leaf
        others = hidden_1MD[:, self.num_train :]
        return torch.cat([leaf, others], dim=1) if others.shape[1] else leaf

    def close(self, hidden_MD: Tensor) -> Tensor:
        """End the forward; returns the train rows' final hidden states ``[T, D]``, detached, for the loss."""
        if self._layers:
            self._final_edge = get_gradient_edge(hidden_MD[: self.num_train])
        self._last_output = None
        self._rows.end_forward()
        return hidden_MD.detach()[: self.num_train]

    def start(self, grad_TD: Tensor) -> None:
        """Give the loss's gradient with respect to what `close` returned; units may run from now on."""
        if self._final_leaf is None:
            return
        assert self._final_edge is not None
        (grad_1TD,) = torch.autograd.grad([self._final_edge], [self._final_leaf], [grad_TD])
        # Units write into it.
        self._grad_1TD = grad_1TD.clone()
        self._final_leaf = self._final_edge = None

    def run_unit(self) -> None:
        """Backward through the topmost layer left on its next window; adds its adapters' gradients to their buffers."""
        assert self._grad_1TD is not None, "start() before run_unit()"
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
            self._at = self.num_train

    def _pieces(self, start: int, stop: int) -> list[_Piece]:
        """The examples' parts of a window; row numbers inside the window."""
        return [
            _Piece(a, max(a, start) - start, min(b, stop) - start)
            for a, b in self._step.spans
            if a < stop and b > start
        ]

    def _span(self, layer: _Layer, piece: _Piece, start: int) -> ReplaySpan:
        assert layer.kv_KTD is not None
        num_past, stop = start + piece.start - piece.first, start + piece.stop - piece.first
        past: KV | None = None
        if num_past:
            k, v = (t[:, piece.first : piece.first + num_past].detach().requires_grad_() for t in layer.kv_KTD)
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


def _without_inference(step: StepContext) -> StepContext:
    """Only what belongs to the train rows; nothing of the tape itself, of the cache or of other rows stays alive."""
    return replace(
        step,
        num_rows=step.num_train,
        segments=step.train_segments,
        spans=tuple((a, b) for a, b in step.spans if b <= step.num_train),
        prefill=(),
        decode=None,
        cache=None,
        cache_rows=None,
        fresh_pages=None,
        cuts=None,
    )
