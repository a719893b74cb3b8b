"""The graph tape: a training forward kept as one autograd graph per decoder layer, so that backward runs unit by unit.

Each layer's input is cut: the layer runs on a fresh leaf that holds the train rows, and the incoming tensor's graph
edge is kept. One unit = one layer: differentiate its output edge with respect to its leaf, hand the result to the
layer below. Between two units anything else may run; the weights of the jobs involved stay as they are until the
tape is finished.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from loquetier.base.context import LayerCall
from loquetier.engine.rows import TrainItem


@dataclass(slots=True)
class _Unit:
    """One layer: from its leaf ``[1, T, D]`` to the edge of its output ``[1, T, D]``."""

    leaf: Tensor
    output: GradientEdge | None = None


class GraphTape:
    """Fastest tape: keeps every layer's graph until its unit has run.

    Use: pass it as `StepContext.cuts` to one forward, `close` it with the final hidden states, `start` it with their
    gradient, then `run_unit` until `units_left` is 0.
    """

    def __init__(self, items: tuple[TrainItem, ...], num_train: int, first_layer: int = 0) -> None:
        self.items = items
        """What is being trained: the jobs look their examples up by these."""
        self.num_train = num_train
        self._first_layer = first_layer
        """Layers below hold no trained weights: they run without a graph."""
        self._units: list[_Unit] = []
        self._grad_1TD: Tensor | None = None

    @property
    def units_left(self) -> int:
        """Units until every gradient of this tape is complete."""
        return len(self._units)

    @property
    def forward_left(self) -> tuple[TrainItem, ...]:
        """Nothing: the forward is one step's."""
        return ()

    @property
    def unit_rows(self) -> int:
        """What a unit costs, in rows going backward through one layer."""
        return self.num_train

    def cut(self, layer: int, hidden_1MD: Tensor, call: LayerCall | None = None) -> Tensor:
        """Called by the base with each layer's input; returns what the layer shall run on (same values)."""
        if layer < self._first_layer:
            return hidden_1MD.detach()
        self._end_layer(hidden_1MD)
        partial = self.num_train < hidden_1MD.shape[1]
        train_1TD = hidden_1MD.detach()[:, : self.num_train]
        # Cloned when other rows share the storage: the tape must not keep those alive.
        leaf = (train_1TD.clone() if partial else train_1TD).requires_grad_()
        self._units.append(_Unit(leaf))
        return torch.cat([leaf, hidden_1MD.detach()[:, self.num_train :]], dim=1) if partial else leaf

    def keep_kv(self, k_KMD: Tensor, v_KMD: Tensor) -> None:
        """Nothing to do: the layer's graph keeps what it needs."""

    def seen_kv(self, start: int, stop: int) -> None:
        """No earlier rows: an example's forward is one step's."""

    def leave(self, layer: int, hidden_1MD: Tensor) -> Tensor:
        """Nothing to do: the next cut, or `close`, takes the edge."""
        return hidden_1MD

    def _end_layer(self, hidden_1MD: Tensor) -> None:
        if self._units:
            # An edge, not the tensor: the graph needs no output values.
            self._units[-1].output = get_gradient_edge(hidden_1MD[:, : self.num_train])

    def close(self, hidden_MD: Tensor) -> Tensor:
        """End the forward; returns the train rows' final hidden states ``[T, D]``, detached, for the loss."""
        self._end_layer(hidden_MD[None])
        return hidden_MD.detach()[: self.num_train]

    def start(self, grad_TD: Tensor) -> None:
        """Give the loss's gradient with respect to what `close` returned; units may run from now on."""
        self._grad_1TD = grad_TD[None]

    def run_unit(self) -> None:
        """Backward through the topmost layer left; adds its adapters' gradients to their buffers."""
        assert self._grad_1TD is not None, "start() before run_unit()"
        unit = self._units.pop()
        assert unit.output is not None
        (self._grad_1TD,) = torch.autograd.grad([unit.output], [unit.leaf], [self._grad_1TD])
