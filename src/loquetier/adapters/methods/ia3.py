"""IA3 (arXiv 2205.05638): a learned factor for each output of some linears, and for each input of others.

    output form   y = l * (x W^T + bias)        attention's keys and values
    input form    y = (l * x) W^T + bias        the second linear of a feed-forward block

The input form computes its rows again with the scaled input, because the base's GEMM is shared with rows of other
adapters (and perhaps with siblings that read the same input): exact everywhere, at one more GEMM for those rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from loquetier.adapters import patterns
from loquetier.adapters.methods.method import BaseWeight, ConfigRules, Part, Site, WeightTable, with_weights
from loquetier.adapters.peft_fields import names_in, names_out
from loquetier.adapters.spec import LinearTarget, ModulePlan, check_selection, checked_names
from loquetier.errors import AdapterMismatchError, ConfigError
from loquetier.kernels.dropout import DropoutRows
from loquetier.kernels.reference import Segment
from loquetier.kernels.smlm import SmlmPlan

NAME: Final = "ia3"
INPUT: Final = "input"
OUTPUT: Final = "output"


@dataclass(frozen=True, kw_only=True, slots=True)
class IA3Spec:
    """The settings of PEFT's ``IA3Config`` that we honour. The defaults are PEFT's for Llama and its relatives.

    Raises:
        ConfigError: a value is outside its range, or feedforward_modules names what target_modules does not.
    """

    target_modules: str | tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """"all-linear" (every linear of the decoder layers), a regular expression on the full path, or name suffixes."""
    feedforward_modules: str | tuple[str, ...] = ("down_proj",)
    """Which of them scale their input: a regular expression on the full path, or what paths end with; may be empty."""
    exclude_modules: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("target_modules", "feedforward_modules", "exclude_modules"):
            object.__setattr__(self, name, checked_names(name, getattr(self, name)))
        if not self.target_modules:
            raise ConfigError(f"target_modules={self.target_modules!r}: must name at least one module")
        both_names = isinstance(self.target_modules, tuple) and isinstance(self.feedforward_modules, tuple)
        if both_names and (odd := sorted(set(self.feedforward_modules) - set(self.target_modules))):
            raise ConfigError(f"feedforward_modules: {odd[:5]} are not in target_modules, which PEFT asks for")
        check_selection(self)
        if isinstance(self.feedforward_modules, str):
            patterns.compile_full("feedforward_modules", self.feedforward_modules)

    @property
    def method(self) -> str:
        """This one."""
        return NAME

    @property
    def layers_to_transform(self) -> tuple[int, ...] | None:
        """PEFT's IA3 has no such filter."""
        return None

    @property
    def layers_pattern(self) -> tuple[str, ...]:
        """PEFT's IA3 has no such filter."""
        return ()

    @property
    def dropout(self) -> float:
        """IA3 has none."""
        return 0.0

    def plans(self, adapted: Sequence[LinearTarget]) -> tuple[ModulePlan, ...]:
        """A vector on each linear. Raises AdapterMismatchError when a feed-forward name matches none of them."""
        names, paths = self.feedforward_modules, [target.path for target in adapted]
        if isinstance(names, str):
            matcher = patterns.compile_full("feedforward_modules", names)
            scaled = {path for path in paths if patterns.matches(matcher, path) is not None}
            unused = [] if scaled else [names]
        else:  # PEFT's rule is str.endswith, which knows nothing of dots
            scaled = {path for path in paths if path.endswith(names)}
            unused = [name for name in names if not any(path.endswith(name) for path in paths)]
        if unused:
            raise AdapterMismatchError(f"feedforward_modules: {unused[:5]} match no adapted linear")
        return tuple(ModulePlan(t, 1, 1.0, NAME, INPUT if t.path in scaled else OUTPUT) for t in adapted)

    def narrowed(
        self, target_modules: str | tuple[str, ...], layers: tuple[int, ...] | None, targets: Sequence[LinearTarget]
    ) -> IA3Spec:
        """Other names, and only the feed-forward names among them."""
        feedforward = self.feedforward_modules
        if isinstance(target_modules, tuple) and isinstance(feedforward, tuple):
            feedforward = tuple(name for name in feedforward if name in target_modules)
        return replace(self, target_modules=target_modules, feedforward_modules=feedforward)


class Ia3Weights(NamedTuple):
    """One adapter's vector (or its gradient) on one linear."""

    l_D: Tensor
    scales_input: bool


class Ia3:
    """The method; see `Method` for what each member means."""

    name: Final = NAME
    spec_type: Final = IA3Spec
    changes_base_output: Final = True
    rules: Final = ConfigRules(
        peft_type="IA3",
        required=("peft_type", "target_modules", "feedforward_modules"),
        honoured=frozenset({"base_model_name_or_path", "exclude_modules"}),
        # How the vectors begin says nothing about a finished adapter.
        inert=frozenset(
            {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "init_ia3_weights"}
        ),
        defaults={"fan_in_fan_out": (False,), "modules_to_save": (None, [])},
        constants={
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_ia3_weights": True,
            "modules_to_save": None,
            "revision": None,
        },
    )

    def parts(self, plan: ModulePlan) -> tuple[Part, ...]:
        """The vector; PEFT keeps it as ``[1, in]`` or ``[out, 1]``."""
        if plan.form == INPUT:
            return (Part((1, plan.target.in_features), "ia3_l", (1, plan.target.in_features)),)
        return (Part((1, plan.target.out_features), "ia3_l", (plan.target.out_features, 1), transposed=True),)

    def num_derived(self, plan: ModulePlan) -> int:
        """Nothing."""
        return 0

    def kept_per_row(self, plan: ModulePlan) -> int:
        """The base's output in the output form; the input is kept anyway."""
        return plan.target.out_features if plan.form == OUTPUT else 0

    def weights(self, plan: ModulePlan, parts: Sequence[Tensor], derived: Tensor | None) -> Ia3Weights:
        """The vector and its form."""
        return Ia3Weights(parts[0][0], plan.form == INPUT)

    def initialize(
        self, weights: Mapping[int, Ia3Weights], modules: Sequence[ModulePlan], seed: int, base: BaseWeight
    ) -> None:
        """Ones: the base as it is."""
        for own in weights.values():
            own.l_D.fill_(1.0)

    def derive(self, weights: Ia3Weights, plan: ModulePlan, base: BaseWeight) -> None:
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
    ) -> list[Tensor]:
        """Returns the base's output of each train segment in the output form, in their order."""
        kept = []
        for s, own in with_weights(segments, table, site.module):
            y_sN = y_MN[s.start : s.stop]
            if own.scales_input:
                scaled_sK = (x_MK[s.start : s.stop] * own.l_D).to(x_MK.dtype)
                y_sN.copy_(F.linear(scaled_sK, site.weight_NK, site.bias_N))
            else:
                if s.stop <= num_kept:
                    kept.append(y_sN.clone())
                y_sN.mul_(own.l_D)
        return kept

    def base_gradient(
        self, site: Site, dy_TN: Tensor, segments: Sequence[Segment], table: WeightTable, dropout: DropoutRows | None
    ) -> None:
        """Scaled by l in the output form."""
        for s, own in with_weights(segments, table, site.module):
            if not own.scales_input:
                dy_TN[s.start : s.stop].mul_(own.l_D)

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
        """``dl = sum over rows`` of ``dy * (x W^T + bias)``, or of ``(dy W) * x`` in the input form."""
        outputs = iter(kept)
        for s, own in with_weights(segments, table, site.module):
            grad_D = grads[s.slot][site.module].l_D
            x_sK, dy_sN, dx_sK = x_TK[s.start : s.stop], dy_TN[s.start : s.stop], dx_TK[s.start : s.stop]
            exact = grad_D.dtype  # rows in bfloat16 are multiplied and summed in the gradient's float32
            if own.scales_input:
                # Without siblings the base's GEMM has just computed it.
                through_sK = dx_sK if site.is_alone else dy_sN @ site.weight_NK
                grad_D.add_((through_sK.to(exact) * x_sK.to(exact)).sum(0))
                dx_sK.add_(through_sK * (own.l_D - 1.0))
            else:
                grad_D.add_((dy_sN.to(exact) * next(outputs).to(exact)).sum(0))

    def reads(self, fields: Mapping[str, Any]) -> bool:
        """By its type."""
        return fields.get("peft_type") == "IA3"

    def spec_of(self, fields: Mapping[str, Any]) -> IA3Spec:
        """Raises ConfigError for a value of the wrong type."""
        return IA3Spec(
            target_modules=names_in(fields["target_modules"]),
            feedforward_modules=names_in(fields["feedforward_modules"]),
            exclude_modules=names_in(fields.get("exclude_modules") or ()),
        )

    def settings(self, spec: IA3Spec, modules: Sequence[ModulePlan] | None = None) -> dict[str, Any]:
        """PEFT wants feed-forward names to be target names: where those were a string, both are written as paths."""
        targets, feedforward = names_out(spec.target_modules), names_out(spec.feedforward_modules)
        if modules is not None and isinstance(targets, str):
            targets = [plan.target.path for plan in modules]
            feedforward = [plan.target.path for plan in modules if plan.form == INPUT]
        return {
            "target_modules": targets,
            "exclude_modules": names_out(spec.exclude_modules) or None,
            "feedforward_modules": feedforward,
        }
