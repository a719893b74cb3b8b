"""What a LoRA adapter is, before any weights: the spec, the base's target linears, and how they match. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LinearTarget:
    """One linear of the base that an adapter may sit on."""

    path: str
    """Dotted name in the Hugging Face model, e.g. ``model.layers.0.self_attn.q_proj``."""
    index: int
    """Position in the base's canonical module order; column of the arena's offset table."""
    in_features: int
    out_features: int
    layer: int | None
    """Decoder layer number, or None for lm_head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """The LoRA settings that PEFT's ``LoraConfig`` and we both honour. Scale: alpha/r, or alpha/sqrt(r) with rsLoRA."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    """Probability of LoRA-input dropout in training; 0 when serving."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """"all-linear" (every linear of the decoder layers), a regular expression on the full path, or name suffixes."""
    exclude_modules: str | tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Rank by path pattern (PEFT's suffix-or-regex rule), over `r`."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One adapted linear: which one, at what rank and scale."""

    target: LinearTarget
    rank: int
    scale: float
    """alpha/r or alpha/sqrt(r); applied once, in the kernel, never baked into the weights."""

    @property
    def num_elements(self) -> int:
        """Weights of both factors: A ``[rank, in]`` and B transposed ``[rank, out]``."""
        return self.rank * (self.target.in_features + self.target.out_features)
