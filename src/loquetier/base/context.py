"""What the swapped modules know of the running step.

Row layout of a step: ``[TRAIN | EVAL | PREFILL | DECODE]``. TRAIN rows are exactly ``[0, num_train)``: everything
that must be kept for a backward is cut to them. TRAIN and EVAL rows attend inside their own span and never touch
the KV cache; PREFILL and DECODE rows are written to it first and read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from loquetier.adapters.methods import LORA_METHOD
from loquetier.adapters.methods.method import Method, WeightTable
from loquetier.base.kv_cache import KVCache
from loquetier.kernels.dropout import DropoutRows
from loquetier.kernels.reference import Segment
from loquetier.kernels.smlm import SmlmPlan, SmlmPlans


class MethodRows(NamedTuple):
    """The segments of a step whose adapters are of one method, in row order."""

    method: Method
    segments: tuple[Segment, ...]
    plan: SmlmPlan | None
    """Pointers of these very segments: a copy of the step with other segments has its own."""


class FixedLora(NamedTuple):
    """Adapters of a step that is captured once and replayed for others."""

    plan: SmlmPlan | None
    """Reads its segments from the device; None where Python code runs at each replay."""
    modules: frozenset[int]
    """Modules that the adapters may sit on."""


class PrefillSpan(NamedTuple):
    """Rows ``[start, stop)`` are tokens ``[past, past + stop - start)`` of one sequence."""

    start: int
    stop: int
    past: int
    pages_B: Tensor
    """Pages that hold the sequence's first ``past + stop - start`` tokens."""


@dataclass(frozen=True)
class DecodeRows:
    """The last N rows of the step: one token each of N sequences."""

    start: int
    positions_N: Tensor
    pages_NB: Tensor
    """Page tables padded with the trash page."""
    page_size: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False)

    def visible_NP(self, window: int | None) -> Tensor:
        """Boolean mask over the gathered pages; made once per step and window, shared by the layers."""
        if window not in self._masks:
            k_pos = torch.arange(self.pages_NB.shape[1] * self.page_size, device=self.positions_N.device)[None, :]
            q_pos = self.positions_N[:, None]
            visible = k_pos <= q_pos
            self._masks[window] = visible if window is None else visible & (q_pos - k_pos < window)
        return self._masks[window]


class LayerCall(NamedTuple):
    """How the model called a decoder layer, beside its hidden states."""

    step: StepContext
    args: tuple[Any, ...]
    """Positional arguments after the hidden states."""
    kwargs: dict[str, Any]


class Turn(NamedTuple):
    """A layer's q and k ``[1, heads, M, D]`` that its attention is to turn, and cos and sin ``[M, turned]``."""

    q: Tensor
    k: Tensor
    angles: tuple[Tensor, Tensor]


class LayerCuts(Protocol):
    """A tape, as the layers see it: told of each layer's input, K and V, and output."""

    def cut(self, layer: int, hidden_1MD: Tensor, call: LayerCall) -> Tensor:
        """Detach the graph at this layer's input; returns what the layer shall run on (same values)."""
        ...

    def keep_kv(self, k_KMD: Tensor, v_KMD: Tensor) -> None:
        """K and V of all rows, as the attention of the layer that is running got them."""
        ...

    def seen_kv(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """K and V ``[K, P, D]`` that the TRAIN rows ``[start, stop)`` of one example attend to in the running layer.

        P is their position in the example: rows of earlier steps come first. None when there are no earlier ones.
        """
        ...

    def leave(self, layer: int, hidden_1MD: Tensor) -> Tensor:
        """This layer's output; returns what the model shall go on with (same values)."""
        ...


class ReplaySpan(NamedTuple):
    """Rows ``[start, stop)`` of a replayed window follow ``past`` rows of the same example."""

    start: int
    stop: int
    past_kv: tuple[Tensor, Tensor] | None
    """K and V of the example's rows before these, ``[K, past, D]`` each, leaves of this window's graph."""
    later_grads: tuple[Tensor, Tensor] | None
    """Gradients that later windows gave to these rows' K and V, ``[K, stop - start, D]`` each, float32 or wider."""


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Everything the base's swapped modules and the attention need for one forward. Built on the host."""

    num_rows: int
    num_train: int = 0
    segments: tuple[Segment, ...] = ()
    """Rows that run on an adapter; rows in no segment are base rows."""
    factors: WeightTable = field(default_factory=dict)
    smlm_plans: SmlmPlans | None = None
    """Pointers of `factors`, kept from step to step by their owner; None = looked up at each call."""
    fixed_lora: FixedLora | None = None
    """Set while a step is captured: which modules run SMLM, and by which plan, does not depend on the segments."""
    grads: WeightTable = field(default_factory=dict)
    """Float32 gradient buffers of the train segments' slots."""
    methods: Mapping[int, Method] = field(default_factory=dict)
    """By slot; a slot that is not there is LoRA's."""
    spans: tuple[tuple[int, int], ...] = ()
    """TRAIN and EVAL sequences as ``[start, stop)``, train first."""
    prefill: tuple[PrefillSpan, ...] = ()
    decode: DecodeRows | None = None
    cache: KVCache | None = None
    cache_start: int = 0
    """First PREFILL row: rows from here on go to the cache."""
    cache_rows: Tensor | None = None
    """Flat cache position of each row from `cache_start` on, int64."""
    fresh_pages: Tensor | None = None
    """Pages whose first token is among those rows: cleared before they are written."""
    cuts: LayerCuts | None = None
    replay: tuple[ReplaySpan, ...] = ()
    """Set when one layer runs again on a window of TRAIN rows, for its backward; every row is in one span."""
    dropout: DropoutRows | None = None
    """None when no train row drops anything: then nothing differs from a step without dropout."""
    turns: list[Turn] = field(default_factory=list, repr=False)
    """What the running layer's rotary left to its attention: one at most."""
    check_turn: Callable[[Tensor, Tensor], None] | None = field(default=None, repr=False)
    """Of a probe: called with q and k after the attention has turned them."""

    @cached_property
    def train_segments(self) -> tuple[Segment, ...]:
        """The segments inside the train rows. Segments never straddle the border: kinds come before adapters."""
        return tuple(s for s in self.segments if s.stop <= self.num_train)

    @cached_property
    def method_rows(self) -> tuple[MethodRows, ...]:
        """The segments by method."""
        if self.fixed_lora is not None and self.fixed_lora.plan is not None:
            return (MethodRows(LORA_METHOD, self.segments, self.fixed_lora.plan),)
        found: dict[Method, list[Segment]] = {}
        for s in self.segments:
            found.setdefault(self.methods.get(s.slot, LORA_METHOD), []).append(s)
        return tuple(MethodRows(method, tuple(own), self._plan(tuple(own))) for method, own in found.items())

    def _plan(self, segments: tuple[Segment, ...]) -> SmlmPlan | None:
        return None if self.smlm_plans is None else self.smlm_plans.of(segments)

    @property
    def smlm_plan(self) -> SmlmPlan | None:
        """The plan of all segments if every adapter is a LoRA, else None."""
        rows = self.method_rows
        return rows[0].plan if len(rows) == 1 and rows[0].method is LORA_METHOD else None

    @cached_property
    def train_segments_by_method(self) -> tuple[tuple[Segment, ...], ...]:
        """For each of `method_rows`, the part of its segments that lies inside the train rows."""
        return tuple(tuple(s for s in rows.segments if s.stop <= self.num_train) for rows in self.method_rows)

    def trains(self, modules: Mapping[int, object] | tuple[int, ...]) -> bool:
        """True when a train segment's adapter has weights on one of these modules."""
        return any(m in self.factors[s.slot] for s in self.train_segments for m in modules)


class Binding:
    """The one mutable cell that all swapped modules of a base share: the step that is running, if any."""

    __slots__ = ("own_code", "step")

    def __init__(self) -> None:
        self.step: StepContext | None = None
        self.own_code = False
        """True while something is held against the model's own code: then norms and activations run that."""
