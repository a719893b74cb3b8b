"""LoRA (arXiv 2106.09685), with rsLoRA's scale (arXiv 2312.03732): ``y += scale * (x @ A^T) @ B^T``.

Its slot is ``[A of every module | B transposed of every module]``, both ``[rank, dim]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from loquetier.adapters.methods import lora_config
from loquetier.adapters.methods.method import BaseWeight, ConfigRules, Part, Site, WeightTable
from loquetier.adapters.spec import LORA, LoraSpec, ModulePlan
from loquetier.kernels.dropout import DropoutRows, dropout_backward, dropout_forward
from loquetier.kernels.reference import Factors, Segment
from loquetier.kernels.smlm import SmlmPlan, smlm_backward, smlm_forward


def lora_parts(plan: ModulePlan) -> tuple[Part, Part]:
    """A ``[rank, in]`` and B transposed ``[rank, out]``."""
    rank, width_in, width_out = plan.rank, plan.target.in_features, plan.target.out_features
    return (
        Part((rank, width_in), "lora_A.weight", (rank, width_in)),
        Part((rank, width_out), "lora_B.weight", (width_out, rank), transposed=True, fast=True),
    )


def draw_a(factors: Mapping[int, Factors], modules: Sequence[ModulePlan], seed: int) -> None:
    """A from Kaiming's uniform distribution, B left zero, whatever the dtype and device.

    ``kaiming_uniform_(a=sqrt(5))`` on A ``[r, in]`` is uniform in +-1/sqrt(in) (PEFT ``reset_lora_parameters``).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        bound = 1 / math.sqrt(module.target.in_features)
        a_RK = factors[module.target.index].a_RK
        a_RK.copy_(torch.rand(a_RK.shape, generator=generator) * (2 * bound) - bound)


class Lora:
    """The method; see `Method` for what each member means."""

    name: Final = LORA
    spec_type: Final = LoraSpec
    changes_base_output: Final = False
    rules: Final[ConfigRules] = lora_config.RULES

    def parts(self, plan: ModulePlan) -> tuple[Part, ...]:
        """A, B transposed."""
        return lora_parts(plan)

    def num_derived(self, plan: ModulePlan) -> int:
        """Nothing."""
        return 0

    def kept_per_row(self, plan: ModulePlan) -> int:
        """Nothing: the rank-sized intermediate is recomputed."""
        return 0

    def weights(self, plan: ModulePlan, parts: Sequence[Tensor], derived: Tensor | None) -> Factors:
        """The factors and their scale."""
        a_RK, b_RN = parts
        return Factors(a_RK, b_RN, plan.scale)

    def initialize(
        self, weights: Mapping[int, Factors], modules: Sequence[ModulePlan], seed: int, base: BaseWeight
    ) -> None:
        """See `draw_a`."""
        draw_a(weights, modules, seed)

    def derive(self, weights: Factors, plan: ModulePlan, base: BaseWeight) -> None:
        """Nothing is derived."""

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
    ) -> SmlmPlan | None:
        """SMLM over all segments at once. The backward gets the plan, whose tables it can use."""
        if dropout is None:
            smlm_forward(x_MK, y_MN, site.module, segments, table, plan)
        else:
            dropout_forward(x_MK, y_MN, site.module, segments, table, dropout, plan)
        return plan

    def base_gradient(
        self, site: Site, dy_TN: Tensor, segments: Sequence[Segment], table: WeightTable, dropout: DropoutRows | None
    ) -> None:
        """The base's part of the output is as it was."""

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
        kept: SmlmPlan | None,
    ) -> None:
        """SMLM's backward over all train segments at once."""
        if dropout is None:
            smlm_backward(x_TK, dy_TN, dx_TK, site.module, segments, table, grads, kept)
        else:
            dropout_backward(x_TK, dy_TN, dx_TK, site.module, segments, table, grads, dropout, kept)

    def reads(self, fields: Mapping[str, Any]) -> bool:
        """LoRA without `use_dora`; a value of it that is no boolean is refused by the rules."""
        return fields.get("peft_type") == "LORA" and fields.get("use_dora") is not True

    def spec_of(self, fields: Mapping[str, Any]) -> LoraSpec:
        """See `lora_config`."""
        return lora_config.spec_of(fields)

    def settings(self, spec: LoraSpec, modules: Sequence[ModulePlan] | None = None) -> dict[str, Any]:
        """See `lora_config`."""
        return lora_config.settings(spec, modules)
