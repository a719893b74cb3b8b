"""Regular expressions from outside (adapter configs, job requests), matched with PEFT's rules but never for long.

PEFT matches with `re`, which cannot be interrupted: ``(a+)+$`` in an untrusted config would stop the process. We
compile with `re` (so that what PEFT refuses is refused here) and match with `regex`, which has a timeout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Protocol

import regex  # type: ignore[import-untyped, unused-ignore]

from loquetier.errors import ConfigError

MATCH_SECONDS: Final = 0.5
"""Far above any honest match of a module name (microseconds)."""
MAX_PATTERN_LENGTH: Final = 8192

_FUZZY = re.compile(r"\{(?!\d|,\d)")
"""``{e<=1}`` means fuzzy matching to `regex` and plain text to `re`; no module name has a brace, so refuse it."""
_LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
"""PEFT's rule for the layer number when no `layers_pattern` is given: the first numbered part."""


class _Compiled(Protocol):
    """The part of `regex.Pattern` that we use."""

    def match(self, string: str, *, timeout: float) -> re.Match[str] | None: ...

    def fullmatch(self, string: str, *, timeout: float) -> re.Match[str] | None: ...


@dataclass(frozen=True, slots=True)
class Matcher:
    """A compiled pattern and how it is applied."""

    compiled: _Compiled
    full: bool
    """Must match the whole path; otherwise from its start."""


def compile_full(field: str, pattern: str) -> Matcher:
    """Compile `pattern` so that it must match a whole module path, as PEFT's `target_modules` string does."""
    return _compile(field, pattern, pattern, full=True)


def compile_suffix(field: str, pattern: str) -> Matcher:
    """Compile `pattern` so that it must match dotted parts at a path's end, as PEFT's `rank_pattern` keys do."""
    return _compile(field, pattern, rf"(.*\.)?({pattern})$")


def compile_layers(field: str, pattern: str) -> Matcher:
    """Compile `pattern` so that it names the part before a layer number, as PEFT's `layers_pattern` does."""
    return _compile(field, pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")


def matches(matcher: Matcher, path: str) -> re.Match[str] | None:
    """The match of `matcher` on `path`, or None.

    Raises:
        ConfigError: the pattern backtracks for longer than `MATCH_SECONDS`.
    """
    apply = matcher.compiled.fullmatch if matcher.full else matcher.compiled.match
    try:
        return apply(path, timeout=MATCH_SECONDS)
    except TimeoutError as error:
        raise ConfigError(
            f"a pattern took more than {MATCH_SECONDS} s to match {path!r}: it backtracks without bound; "
            "write it without nested repetition, or list the module names"
        ) from error


def layer_number(path: str, layers: tuple[Matcher, ...]) -> int | None:
    """Layer number that PEFT reads off `path`: by the first of `layers` that matches, or by the first numbered part."""
    if not layers:
        found = _LAYER_NUMBER.match(path)
        return int(found["idx"]) if found else None
    for matcher in layers:
        found = matches(matcher, path)
        if found is not None:
            return int(found["idx"])
    return None


def _compile(field: str, pattern: str, wrapped: str, full: bool = False) -> Matcher:
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ConfigError(f"{field}: a pattern has {len(pattern)} characters; the limit is {MAX_PATTERN_LENGTH}")
    if _FUZZY.search(pattern):
        raise ConfigError(f"{field}={pattern!r}: a brace must be a repeat count such as {{2}}; module names have none")
    try:
        # The bare pattern too: "a)(b" is wrong although some wrapping may make it compile.
        re.compile(pattern)
        re.compile(wrapped)
        compiled: _Compiled = regex.compile(wrapped)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{field}={pattern!r}: not a valid regular expression ({error})") from error
    return Matcher(compiled, full)
