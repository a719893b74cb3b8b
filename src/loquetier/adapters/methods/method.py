"""What an adapter method is to the rest of the house: how its weights lie, what they compute, how PEFT names them.

A method acts on the output of one linear of the base, for the rows of its segments, in place:

    forward    y holds ``x @ W^T + bias`` and leaves as what the adapted linear gives
    backward   dy is the gradient of that; the method adds to its own gradients, and to dx what the base does not give

The base's own GEMM runs once over the rows of all methods. Where a method changes the *base's* part of the output
(DoRA and IA3 scale it), the base needs another gradient than dy: `Method.base_gradient` makes it before that GEMM.

To add a method, write one file like `lora.py` and name it in the tuple of `adapters/methods/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from loquetier.adapters.spec import AdapterSpec, ModulePlan
from loquetier.kernels.dropout import DropoutRows
from loquetier.kernels.reference import Segment
from loquetier.kernels.smlm import SmlmPlan

WeightTable = Mapping[int, Mapping[int, Any]]
"""slot -> module index -> that method's weights (or gradients), as its `Method.weights` made them."""
BaseWeight = Callable[[int], Tensor]
"""Module index -> the base's weight ``[out, in]``, in the base's dtype. Never written to."""


class Part(NamedTuple):
    """One learned tensor of a method on one linear."""

    shape: tuple[int, int]
    """In the arena: ``[rank, dim]``."""
    peft_name: str
    """What follows the module's path in a PEFT file, such as ``lora_A.weight``."""
    peft_shape: tuple[int, ...]
    """There."""
    transposed: bool = False
    """PEFT's orientation is the other one."""
    fast: bool = False
    """LoRA+ multiplies the learning rate of this part. Fast parts come after slow ones."""


class Site(NamedTuple):
    """One linear of the base that an adapter may sit on."""

    module: int
    weight_NK: Tensor
    bias_N: Tensor | None
    is_alone: bool
    """Its GEMM has no siblings: the gradient of its input comes from it alone."""


def with_weights(segments: Sequence[Segment], table: WeightTable, module: int) -> Iterator[tuple[Segment, Any]]:
    """Segments that have rows, and weights on this linear, with those weights."""
    for s in segments:
        own = table[s.slot].get(module)
        if own is not None and s.stop > s.start:
            yield s, own


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigRules:
    """Which keys of an `adapter_config.json` of a method mean what. A key in none of them must not have a value."""

    peft_type: str
    required: tuple[str, ...]
    honoured: frozenset[str]
    """Beside the required ones."""
    inert: frozenset[str]
    """Keys that do not change what a finished adapter computes, whatever their value."""
    defaults: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Features that we do not honour, with the values under which PEFT does not use them either."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """Written into every config of this method, beside its settings."""


class Method(Protocol):
    """One PEFT method. Without state: everything about an adapter is in its spec, its plans and its slot."""

    @property
    def name(self) -> str:
        """`ModulePlan.method` and `AdapterSpec.method` of its adapters."""
        ...

    @property
    def spec_type(self) -> type[Any]:
        """The frozen dataclass of its settings, an `AdapterSpec`."""
        ...

    @property
    def changes_base_output(self) -> bool:
        """Whether `base_gradient` does anything."""
        ...

    # --- layout ---

    def parts(self, plan: ModulePlan) -> tuple[Part, ...]:
        """Its learned tensors on one linear. A slot holds the first part of every module, then the second, ..."""
        ...

    def num_derived(self, plan: ModulePlan) -> int:
        """Elements kept beside the learned ones that follow from them and from the base's weight; see `derive`."""
        ...

    def kept_per_row(self, plan: ModulePlan) -> int:
        """Elements of the base's dtype that `forward` keeps per train row on one linear."""
        ...

    def weights(self, plan: ModulePlan, parts: Sequence[Tensor], derived: Tensor | None) -> Any:
        """What the kernels read, from views of a flat buffer. `derived` is None for a buffer of gradients."""
        ...

    # --- life ---

    def initialize(
        self, weights: Mapping[int, Any], modules: Sequence[ModulePlan], seed: int, base: BaseWeight
    ) -> None:
        """Fill a zeroed slot for training, deterministically from `seed`, as PEFT does."""
        ...

    def derive(self, weights: Any, plan: ModulePlan, base: BaseWeight) -> None:
        """Recompute what is derived; runs after every change of a slot's weights, and only if `num_derived`."""
        ...

    # --- what it computes ---

    def forward(
        self,
        site: Site,
        x_MK: Tensor,
        y_MN: Tensor,
        segments: Sequence[Segment],
        table: WeightTable,
        dropout: DropoutRows | None,
        num_kept: int,
        plan: SmlmPlan | None,
    ) -> Any:
        """Turn the base's output into the adapted one, in place, on the rows of `segments`.

        Args:
            y_MN: may be a column slice of a wider output.
            segments: of this method. A slot without weights on `site` leaves its rows as they are.
            num_kept: rows ``[0, num_kept)`` will go backward.
            plan: where a kernel may keep its pointers of these segments from step to step; None = nowhere.

        Returns:
            What `backward` needs beside x and dy, of those rows only.
        """
        ...

    def base_gradient(
        self, site: Site, dy_TN: Tensor, segments: Sequence[Segment], table: WeightTable, dropout: DropoutRows | None
    ) -> None:
        """Turn the gradient of the adapted output into that of the base's output, in place. No-op for most."""
        ...

    def backward(
        self,
        site: Site,
        x_TK: Tensor,
        dy_TN: Tensor,
        dx_TK: Tensor,
        segments: Sequence[Segment],
        table: WeightTable,
        grads: WeightTable,
        dropout: DropoutRows | None,
        kept: Any,
    ) -> None:
        """Add to the weights' float32 gradients, and complete `dx_TK`, which holds the base's part, in place.

        Args:
            dy_TN: gradient of the adapted output; not to be changed.
            segments: the train segments of this method.
            kept: what `forward` returned for this site.
        """
        ...

    # --- PEFT ---

    @property
    def rules(self) -> ConfigRules:
        """The keys of its `adapter_config.json`."""
        ...

    def reads(self, fields: Mapping[str, Any]) -> bool:
        """Whether an `adapter_config.json` is one of this method's."""
        ...

    def spec_of(self, fields: Mapping[str, Any]) -> AdapterSpec:
        """The settings in a config whose keys are checked already. Raises ConfigError for a bad value."""
        ...

    def settings(self, spec: Any, modules: Sequence[ModulePlan] | None = None) -> dict[str, Any]:
        """The inverse: every setting under PEFT's name. With `modules`, as it is written: names in lists."""
        ...
