"""DoRA (arXiv 2402.09353): LoRA on the direction of a weight, and a learned magnitude for each of its rows.

    V = W + scale * B A        y = (m / |V|_row) * (x V^T) + bias

|V| is a constant in the backward (section 4.3 of the paper, and PEFT's ``DoraLinearLayer``). It depends on
weights only, so it is computed when they change (`Dora.derive`), never in a forward, and lies beside the slot.

With dropout PEFT drops the input of the whole correction, the base's part of it included:

    y = x W^T + bias + (c * (d V^T) - d W^T),    d = dropout(x), c = m / |V|

which costs those rows a second GEMM with W, forward and backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from loquetier.adapters.methods import lora_config
from loquetier.adapters.methods.lora import draw_a, lora_parts
from loquetier.adapters.methods.method import BaseWeight, ConfigRules, Part, Site, WeightTable, with_weights
from loquetier.adapters.spec import DORA, LoraSpec, ModulePlan
from loquetier.kernels.dropout import DropoutRows, dropped_TK
from loquetier.kernels.reference import Factors, Segment
from loquetier.kernels.smlm import SmlmPlan, smlm_backward, smlm_forward

_BLOCK_ELEMENTS: Final = 1 << 18
"""Of the weight, when its norm is taken: 1 MiB in float32, so that ``W + scale * B A`` never leaves the cache."""


class DoraWeights(NamedTuple):
    """One adapter's weights (or gradients) on one linear."""

    lora: Factors
    m_1N: Tensor
    norm_N: Tensor | None
    """Norms of the rows of ``W + scale * B A``; None among gradients."""

    def gain_N(self) -> Tensor:
        """``m / |V|``, as PEFT divides."""
        assert self.norm_N is not None
        return self.m_1N[0] / self.norm_N


class Dora:
    """The method; see `Method` for what each member means."""

    name: Final = DORA
    spec_type: Final = LoraSpec
    changes_base_output: Final = True
    rules: Final[ConfigRules] = lora_config.DORA_RULES

    def parts(self, plan: ModulePlan) -> tuple[Part, ...]:
        """A, B transposed, magnitude. PEFT's LoRA+ counts vectors to the fast parameters."""
        width = plan.target.out_features
        return *lora_parts(plan), Part((1, width), "lora_magnitude_vector", (width,), fast=True)

    def num_derived(self, plan: ModulePlan) -> int:
        """The norm of each row."""
        return plan.target.out_features

    def kept_per_row(self, plan: ModulePlan) -> int:
        """``x V^T``, for the magnitude's gradient."""
        return plan.target.out_features

    def weights(self, plan: ModulePlan, parts: Sequence[Tensor], derived: Tensor | None) -> DoraWeights:
        """Factors, magnitude, norm."""
        a_RK, b_RN, m_1N = parts
        return DoraWeights(Factors(a_RK, b_RN, plan.scale), m_1N, derived)

    def initialize(
        self, weights: Mapping[int, DoraWeights], modules: Sequence[ModulePlan], seed: int, base: BaseWeight
    ) -> None:
        """LoRA's A and B, and the magnitudes that leave the base as it is."""
        draw_a({index: w.lora for index, w in weights.items()}, modules, seed)
        for plan in modules:
            own = weights[plan.target.index]
            self.derive(own, plan, base)
            assert own.norm_N is not None
            own.m_1N[0].copy_(own.norm_N)

    def derive(self, weights: DoraWeights, plan: ModulePlan, base: BaseWeight) -> None:
        """``|W + scale * B A|`` row by row, in the dtype of the factors."""
        assert weights.norm_N is not None
        weight_NK = base(plan.target.index)
        rows = max(1, _BLOCK_ELEMENTS // weight_NK.shape[1])
        a_RK, b_RN, scale = weights.lora
        for start in range(0, weight_NK.shape[0], rows):
            at = slice(start, start + rows)
            v_nK = torch.addmm(weight_NK[at].to(a_RK.dtype), b_RN[:, at].T, a_RK, alpha=scale)
            weights.norm_N[at] = torch.linalg.vector_norm(v_nK, dim=1)

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
    ) -> list[Tensor]:
        """Returns ``x V^T`` of each train segment with weights here, in their order."""
        kept = []
        for s, own in with_weights(segments, table, site.module):
            x_sK, y_sN = x_MK[s.start : s.stop], y_MN[s.start : s.stop]
            if dropout is not None and dropout.drops(s):
                x_sK = x_sK * _kept_scaled(x_sK, s, site, dropout)
                base_sN = x_sK @ site.weight_NK.T
                z_sN = base_sN.clone()
                _add_lora(x_sK, z_sN, own)
                y_sN.add_(z_sN * own.gain_N()).sub_(base_sN)
            else:
                if site.bias_N is not None:
                    y_sN.sub_(site.bias_N)
                _add_lora(x_sK, y_sN, own)
                z_sN = y_sN.clone() if s.stop <= num_kept else y_sN
                y_sN.mul_(own.gain_N())
                if site.bias_N is not None:
                    y_sN.add_(site.bias_N)
            if s.stop <= num_kept:
                kept.append(z_sN)
        return kept

    def base_gradient(
        self, site: Site, dy_TN: Tensor, segments: Sequence[Segment], table: WeightTable, dropout: DropoutRows | None
    ) -> None:
        """Scaled by m / |V|; with dropout the base's own output is as it was, and `backward` adds the correction's."""
        for s, own in with_weights(segments, table, site.module):
            if dropout is None or not dropout.drops(s):
                dy_TN[s.start : s.stop].mul_(own.gain_N())

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
        kept: list[Tensor],
    ) -> None:
        """LoRA's with the scaled gradient, and ``dm = sum over rows of dy * (x V^T) / |V|``."""
        outputs = iter(kept)
        for s, own in with_weights(segments, table, site.module):
            grad: DoraWeights = grads[s.slot][site.module]
            x_sK, dy_sN, dx_sK = x_TK[s.start : s.stop], dy_TN[s.start : s.stop], dx_TK[s.start : s.stop]
            exact = grad.m_1N.dtype  # rows in bfloat16 are multiplied and summed in the gradient's float32
            grad.m_1N[0].add_((dy_sN.to(exact) * next(outputs).to(exact)).sum(0) / own.norm_N)
            dz_sN = dy_sN * own.gain_N().to(dy_sN.dtype)
            if dropout is not None and dropout.drops(s):
                kept_sK = _kept_scaled(x_sK, s, site, dropout)
                dropped_sK = (dz_sN - dy_sN) @ site.weight_NK
                _add_lora_gradients(x_sK * kept_sK, dz_sN, dropped_sK, own, grad)
                dx_sK.add_(dropped_sK.mul_(kept_sK))
            else:
                _add_lora_gradients(x_sK, dz_sN, dx_sK, own, grad)

    def reads(self, fields: Mapping[str, Any]) -> bool:
        """A LoRA config with `use_dora`."""
        return fields.get("peft_type") == "LORA" and fields.get("use_dora") is True

    def spec_of(self, fields: Mapping[str, Any]) -> LoraSpec:
        """See `lora_config`."""
        return lora_config.spec_of(fields)

    def settings(self, spec: LoraSpec, modules: Sequence[ModulePlan] | None = None) -> dict[str, Any]:
        """See `lora_config`."""
        return lora_config.settings(spec, modules)


def _add_lora(x_sK: Tensor, y_sN: Tensor, own: DoraWeights) -> None:
    smlm_forward(x_sK, y_sN, 0, (Segment(0, 0, len(x_sK)),), {0: {0: own.lora}})


def _add_lora_gradients(x_sK: Tensor, dz_sN: Tensor, dx_sK: Tensor, own: DoraWeights, grad: DoraWeights) -> None:
    rows = (Segment(0, 0, len(x_sK)),)
    smlm_backward(x_sK, dz_sN, dx_sK, 0, rows, {0: {0: own.lora}}, {0: {0: grad.lora}})


def _kept_scaled(x_sK: Tensor, s: Segment, site: Site, dropout: DropoutRows) -> Tensor:
    """What the input is multiplied with: 0 where it is dropped, 1 / (1 - p) elsewhere."""
    rate = dropout.rates[s.slot]
    dropped_sK = dropped_TK(dropout.keys_T[s.start : s.stop], site.module, x_sK.shape[1], rate)
    return dropped_sK.logical_not_().to(x_sK.dtype).mul_(1.0 / (1.0 - rate))
