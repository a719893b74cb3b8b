"""What an adapter is, before any weights: its spec, the base's target linears, and how they match. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from typing import Any, ClassVar, Final, Protocol, TypeVar, runtime_checkable

from loquetier.adapters import patterns
from loquetier.errors import AdapterMismatchError, ConfigError

ALL_LINEAR: Final = "all-linear"
MAX_RANK: Final = 1 << 16
"""Sanity bound only: what really limits a rank is the arena's byte budget."""
MAX_ALPHA: Final = 1e6
_EMBEDDINGS: Final = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings"})
_OUTPUTS: Final = frozenset({"lm_head", "embed_out", "output_layer"})
_Value = TypeVar("_Value", int, float)
LORA: Final = "lora"
DORA: Final = "dora"


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


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One adapted linear: which one, by which method, at what rank and scale."""

    target: LinearTarget
    rank: int
    """Rows of its factors; 1 where the method has a vector."""
    scale: float
    """alpha/r or alpha/sqrt(r); applied once, in the kernel, never baked into the weights. 1.0 without one."""
    method: str = LORA
    """`Method.name`; the same for all modules of an adapter."""
    form: str = ""
    """Which of the method's forms sits here, if it has several (IA3: "input" or "output")."""


@runtime_checkable
class AdapterSpec(Protocol):
    """What the settings of every method have in common. A frozen dataclass, whose fields are JSON values or tuples."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def method(self) -> str:
        """`Method.name` of the method that these settings are for."""
        ...

    @property
    def target_modules(self) -> str | tuple[str, ...]:
        """ "all-linear", a regular expression on the full path, or name suffixes."""
        ...

    @property
    def exclude_modules(self) -> str | tuple[str, ...]:
        """A regular expression or name suffixes; empty for nothing."""
        ...

    @property
    def layers_to_transform(self) -> tuple[int, ...] | None:
        """Only these layers; None for all."""
        ...

    @property
    def layers_pattern(self) -> tuple[str, ...]:
        """What stands before the layer number in a path; empty for anything."""
        ...

    @property
    def dropout(self) -> float:
        """Probability of dropping an element of the method's input in training."""
        ...

    def plans(self, adapted: Sequence[LinearTarget]) -> tuple[ModulePlan, ...]:
        """One plan for each linear that the names select. Errors as `resolve_modules`."""
        ...

    def narrowed(
        self, target_modules: str | tuple[str, ...], layers: tuple[int, ...] | None, targets: Sequence[LinearTarget]
    ) -> AdapterSpec:
        """These settings with other target names and layers, without what then matches nothing among `targets`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """The LoRA settings that PEFT's ``LoraConfig`` and we both honour; with `use_dora`, DoRA (arXiv 2402.09353).

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
    use_dora: bool = False

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        object.__setattr__(self, "alpha", _checked_alpha("alpha", self.alpha))
        _check(
            _is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", self.dropout, "must be a number in [0, 1)"
        )
        object.__setattr__(self, "dropout", float(self.dropout))
        for name in ("use_rslora", "use_dora"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "must be true or false")
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, checked_names(name, getattr(self, name)))
        _check(bool(self.target_modules), "target_modules", self.target_modules, "must name at least one module")
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
    def method(self) -> str:
        """DoRA is a method of its own with LoRA's settings."""
        return DORA if self.use_dora else LORA

    def plans(self, adapted: Sequence[LinearTarget]) -> tuple[ModulePlan, ...]:
        """Rank and scale of each linear."""
        ranks = _by_pattern("rank_pattern", self.rank_pattern, self.r, adapted)
        alphas = _by_pattern("alpha_pattern", self.alpha_pattern, self.alpha, adapted)
        return tuple(
            ModulePlan(target, rank, self.scale(rank, alpha), self.method)
            for target, rank, alpha in zip(adapted, ranks, alphas, strict=True)
        )

    def narrowed(
        self, target_modules: str | tuple[str, ...], layers: tuple[int, ...] | None, targets: Sequence[LinearTarget]
    ) -> LoraSpec:
        """Other names and layers, and only the patterns that then match."""
        spec = replace(self, target_modules=target_modules, layers_to_transform=layers)
        selection = _Selection.of(spec)
        adapted = [target for target in targets if selection.adapts(target)]
        return replace(
            spec,
            rank_pattern=_used("rank_pattern", self.rank_pattern, adapted),
            alpha_pattern=_used("alpha_pattern", self.alpha_pattern, adapted),
        )


def is_all_linear(spec: AdapterSpec) -> bool:
    """True when `target_modules` is the "all-linear" shorthand, in any case, as in PEFT."""
    return isinstance(spec.target_modules, str) and spec.target_modules.lower() == ALL_LINEAR


def resolve_modules(spec: AdapterSpec, targets: Sequence[LinearTarget]) -> tuple[ModulePlan, ...]:
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
    return spec.plans(adapted)


def matching_part(spec: AdapterSpec, targets: Sequence[LinearTarget]) -> AdapterSpec:
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
    return spec.narrowed(names, layers, targets)


def check_selection(spec: AdapterSpec) -> None:
    """Raise ConfigError for a target, exclude or layer pattern that does not compile."""
    _Selection.of(spec)


@dataclass(frozen=True, slots=True)
class _Selection:
    """`target_modules`, `exclude_modules` and the layer filter of one spec, compiled once."""

    spec: AdapterSpec
    targets: patterns.Matcher | frozenset[str]
    exclude: patterns.Matcher | frozenset[str]
    layers: tuple[patterns.Matcher, ...]

    @classmethod
    def of(cls, spec: AdapterSpec) -> _Selection:
        return cls(
            spec,
            _compile_names("target_modules", spec.target_modules),
            _compile_names("exclude_modules", spec.exclude_modules),
            tuple(patterns.compile_layers("layers_pattern", pattern) for pattern in spec.layers_pattern),
        )

    def adapts(self, target: LinearTarget) -> bool:
        if self.spec.exclude_modules and _matches_names(self.exclude, target.path):
            return False
        if is_all_linear(self.spec):
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


def _refuse_unknown(spec: AdapterSpec, targets: Sequence[LinearTarget]) -> None:
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


def checked_names(field_name: str, value: Any) -> str | tuple[str, ...]:
    """`value` if it is a pattern or module names, a list (as people write it for PEFT) as a tuple; else ConfigError."""
    ok = isinstance(value, str) or (
        isinstance(value, (tuple, list)) and all(isinstance(name, str) and name for name in value)
    )
    _check(ok, field_name, value, "must be a string, or a list of non-empty strings")
    return value if isinstance(value, str) else tuple(value)


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
    check_selection(spec)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(spec, name):
            patterns.compile_suffix(name, key)
