"""What a LoRA adapter is, before any weights: the spec, the base's target linears, and how they match. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from loquetier.adapters import patterns
from loquetier.errors import AdapterMismatchError, ConfigError

ALL_LINEAR: Final = "all-linear"
MAX_RANK: Final = 1 << 16
"""Sanity bound only: what really limits a rank is the arena's byte budget."""
MAX_ALPHA: Final = 1e6
_EMBEDDINGS: Final = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings"})
_OUTPUTS: Final = frozenset({"lm_head", "embed_out", "output_layer"})
_Value = TypeVar("_Value", int, float)


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
    """The LoRA settings that PEFT's ``LoraConfig`` and we both honour.

    Scaling is alpha/r, or alpha/sqrt(r) with rsLoRA.

    Raises:
        ConfigError: a value is outside its range, two of them contradict each other, or a pattern does not compile.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    """Probability of LoRA-input dropout in training; 0 when serving."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """"all-linear" (every linear of the decoder layers), a regular expression on the full path, or name suffixes."""
    exclude_modules: str | tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Rank by path pattern (PEFT's suffix-or-regex rule), over `r`; the first key that matches decides."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        object.__setattr__(self, "alpha", _checked_alpha("alpha", self.alpha))
        _check(
            _is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", self.dropout, "must be a number in [0, 1)"
        )
        object.__setattr__(self, "dropout", float(self.dropout))
        _check(isinstance(self.use_rslora, bool), "use_rslora", self.use_rslora, "must be true or false")
        _check_names("target_modules", self.target_modules)
        _check(bool(self.target_modules), "target_modules", self.target_modules, "must name at least one module")
        _check_names("exclude_modules", self.exclude_modules)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):  # as people write it for PEFT
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            _check(isinstance(value, Mapping), name, value, "must map module patterns to numbers")
            _check(all(isinstance(key, str) and key for key in value), name, value, "keys must be non-empty strings")
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        alphas = {key: _checked_alpha(f"alpha_pattern[{key!r}]", value) for key, value in self.alpha_pattern.items()}
        # Own copies: a caller that edits its dict afterwards must not edit a frozen spec.
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", alphas)
        _check_layers(self)
        _compile_all(self)

    def scale(self, rank: int, alpha: float) -> float:
        """alpha/rank, or alpha/sqrt(rank) with rsLoRA, computed in the same way as PEFT does."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @property
    def is_all_linear(self) -> bool:
        """True when `target_modules` is the "all-linear" shorthand, in any case, as in PEFT."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR


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


def resolve_modules(spec: LoraSpec, targets: Sequence[LinearTarget]) -> tuple[ModulePlan, ...]:
    """Which linears `spec` adapts, each with its rank and scale, by PEFT 0.21's matching rules. Pure.

    Args:
        spec: the adapter's settings.
        targets: every linear of the base that may be adapted.

    Returns:
        One plan per adapted linear, ordered by `LinearTarget.index`.

    Raises:
        AdapterMismatchError: a target name, a layer number or a pattern key matches nothing, or nothing matches at all.
        ConfigError: a pattern backtracks without bound.
    """
    ordered = sorted(targets, key=lambda target: target.index)
    _refuse_unknown(spec, ordered)
    selection = _Selection.of(spec)
    adapted = [target for target in ordered if selection.adapts(target)]
    if not adapted:
        raise AdapterMismatchError(
            f"target_modules={_short(spec.target_modules)} with exclude_modules={_short(spec.exclude_modules)} and "
            f"layers_to_transform={spec.layers_to_transform} adapts no linear of this base; {_available(ordered)}"
        )
    ranks = _by_pattern("rank_pattern", spec.rank_pattern, spec.r, adapted)
    alphas = _by_pattern("alpha_pattern", spec.alpha_pattern, spec.alpha, adapted)
    return tuple(
        ModulePlan(target, rank, spec.scale(rank, alpha))
        for target, rank, alpha in zip(adapted, ranks, alphas, strict=True)
    )


def matching_part(spec: LoraSpec, targets: Sequence[LinearTarget]) -> LoraSpec:
    """`spec` without the target names, layers and pattern keys that match nothing among `targets`. Pure.

    This is what `allow_partial` asks for: the result resolves without error if anything matches.

    Raises:
        AdapterMismatchError: no target name matches, so nothing is left.
    """
    names = spec.target_modules
    if not isinstance(names, str):
        unknown = set(_unknown_names(names, targets))
        names = tuple(name for name in names if name not in unknown)
    layers = spec.layers_to_transform
    if layers is not None:
        layers = tuple(layer for layer in layers if layer in {target.layer for target in targets})
    if not names or layers == ():
        _refuse_unknown(spec, targets)
    narrowed = replace(spec, target_modules=names, layers_to_transform=layers)
    selection = _Selection.of(narrowed)
    adapted = [target for target in targets if selection.adapts(target)]
    return replace(
        narrowed,
        rank_pattern=_used("rank_pattern", spec.rank_pattern, adapted),
        alpha_pattern=_used("alpha_pattern", spec.alpha_pattern, adapted),
    )


@dataclass(frozen=True, slots=True)
class _Selection:
    """`target_modules`, `exclude_modules` and the layer filter of one spec, compiled once."""

    spec: LoraSpec
    targets: patterns.Matcher | frozenset[str]
    exclude: patterns.Matcher | frozenset[str]
    layers: tuple[patterns.Matcher, ...]

    @classmethod
    def of(cls, spec: LoraSpec) -> _Selection:
        return cls(
            spec,
            _compile_names("target_modules", spec.target_modules),
            _compile_names("exclude_modules", spec.exclude_modules),
            tuple(patterns.compile_layers("layers_pattern", pattern) for pattern in spec.layers_pattern),
        )

    def adapts(self, target: LinearTarget) -> bool:
        if self.spec.exclude_modules and _matches_names(self.exclude, target.path):
            return False
        if self.spec.is_all_linear:
            return target.layer is not None
        if not _matches_names(self.targets, target.path):
            return False
        # PEFT's rule: a full path in the list is taken as it is, the layer filter applies to suffixes only.
        wanted = self.spec.layers_to_transform
        if wanted is None or (isinstance(self.targets, frozenset) and target.path in self.targets):
            return True
        return patterns.layer_number(target.path, self.layers) in wanted


def _compile_names(field_name: str, names: str | tuple[str, ...]) -> patterns.Matcher | frozenset[str]:
    return patterns.compile_full(field_name, names) if isinstance(names, str) else frozenset(names)


def _matches_names(names: patterns.Matcher | frozenset[str], path: str) -> bool:
    if isinstance(names, frozenset):
        return not names.isdisjoint(_suffixes(path))
    return patterns.matches(names, path) is not None


def _suffixes(path: str) -> list[str]:
    """The path, and what follows each of its dots: exactly the names that PEFT's list rule accepts for it."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _unknown_names(names: tuple[str, ...], targets: Iterable[LinearTarget]) -> list[str]:
    known = {suffix for target in targets for suffix in _suffixes(target.path)}
    return [name for name in names if name not in known]


def _refuse_unknown(spec: LoraSpec, targets: Sequence[LinearTarget]) -> None:
    if not isinstance(spec.target_modules, str) and (unknown := _unknown_names(spec.target_modules, targets)):
        raise AdapterMismatchError(
            f"target_modules: {_short(unknown)} of {len(spec.target_modules)} names match no linear of this base"
            f"{_tied_hint(unknown, targets)}; {_available(targets)}"
        )
    layers = {target.layer for target in targets}
    missing = [layer for layer in spec.layers_to_transform or () if layer not in layers]
    if missing:
        highest = max((layer for layer in layers if layer is not None), default=None)
        raise AdapterMismatchError(
            f"layers_to_transform: {_short(missing)} are not layers of this base, whose last layer is {highest}"
        )


def _tied_hint(names: Iterable[str], targets: Iterable[LinearTarget]) -> str:
    last_parts = {name.rpartition(".")[2] for name in names}
    if last_parts & _EMBEDDINGS:
        return " (embeddings are not linears: adapters on them are not supported)"
    if last_parts & _OUTPUTS and all(target.layer is not None for target in targets):
        return " (the output weights are tied to the input embedding, so lm_head cannot be adapted on its own)"
    return ""


def _available(targets: Iterable[LinearTarget]) -> str:
    names = dict.fromkeys(target.path.rpartition(".")[2] for target in targets)
    return f"available names: {', '.join(names) or '(none)'}"


def _by_pattern(
    field_name: str, by_key: Mapping[str, _Value], default: _Value, adapted: Sequence[LinearTarget]
) -> list[_Value]:
    """The value of the first key that matches each target, or `default`."""
    if len(by_key) > len(adapted):
        raise AdapterMismatchError(f"{field_name}: {len(by_key)} keys for {len(adapted)} adapted linears")
    values: list[_Value | None] = [None] * len(adapted)
    unused = []
    for key, value in by_key.items():
        matcher = patterns.compile_suffix(field_name, key)
        hits = [i for i, target in enumerate(adapted) if patterns.matches(matcher, target.path)]
        if not hits:
            unused.append(key)
        for i in hits:
            if values[i] is None:
                values[i] = value
    if unused:
        raise AdapterMismatchError(f"{field_name}: {_short(unused)} match no adapted linear; {_available(adapted)}")
    return [default if value is None else value for value in values]


def _used(field_name: str, by_key: Mapping[str, _Value], adapted: Sequence[LinearTarget]) -> dict[str, _Value]:
    compiled = {key: patterns.compile_suffix(field_name, key) for key in by_key}
    return {
        key: value
        for key, value in by_key.items()
        if any(patterns.matches(compiled[key], target.path) for target in adapted)
    }


def _short(value: object, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _check(ok: bool, field_name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{field_name}={_short(value)}: {rule}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _check_rank(field_name: str, value: object) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK
    _check(ok, field_name, value, f"must be an integer in [1, {MAX_RANK}]")


def _checked_alpha(field_name: str, value: float) -> float:
    # A chained comparison is False for NaN, and exact for integers too large for a float.
    _check(_is_number(value) and 0 < value <= MAX_ALPHA, field_name, value, f"must be a number in (0, {MAX_ALPHA:g}]")
    return float(value)


def _check_names(field_name: str, value: object) -> None:
    ok = isinstance(value, str) or (
        isinstance(value, (tuple, list)) and all(isinstance(name, str) and name for name in value)
    )
    _check(ok, field_name, value, "must be a string, or a list of non-empty strings")


def _check_layers(spec: LoraSpec) -> None:
    layers, by_name = spec.layers_to_transform, spec.layers_pattern
    ok = layers is None or (
        isinstance(layers, tuple) and bool(layers) and all(_is_int(layer) and layer >= 0 for layer in layers)
    )
    _check(ok, "layers_to_transform", layers, "must be None or a non-empty tuple of layer numbers >= 0")
    ok = isinstance(by_name, tuple) and all(isinstance(name, str) and name for name in by_name)
    _check(ok, "layers_pattern", by_name, "must be a tuple of non-empty strings")
    if isinstance(spec.target_modules, str):
        rule = "cannot be combined with target_modules as a string (PEFT's rule); list the module names instead"
        _check(layers is None, "layers_to_transform", layers, rule)
        _check(not by_name, "layers_pattern", by_name, rule)
    _check(layers is not None or not by_name, "layers_pattern", by_name, "needs layers_to_transform")


def _compile_all(spec: LoraSpec) -> None:
    """Raise ConfigError for a pattern that does not compile: at the door, not at the first match."""
    _Selection.of(spec)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(spec, name):
            patterns.compile_suffix(name, key)
