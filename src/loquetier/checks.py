"""What a setting may be: small tests of a value, and the error that names field, value and rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loquetier.errors import ConfigError

Test = Callable[[Any], bool]


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raises ConfigError where `ok` is False."""
    if not ok:
        raise ConfigError(f"{name}={value!r}: {rule}")


def check(settings: object, name: str, test: Test, rule: str) -> None:
    """Raises ConfigError where the field `name` fails the test."""
    value = getattr(settings, name)
    require(test(value), name, value, rule)


def check_bools(settings: object, *names: str) -> None:
    """The same for fields that are True or False."""
    for name in names:
        check(settings, name, is_bool, "must be True or False")


def is_bool(value: object) -> bool:
    """True or False, not a number in their place."""
    return isinstance(value, bool)


def one_of(*values: str) -> Test:
    """One of these words."""
    return lambda value: value in values


def integer(low: int, high: int | None = None) -> Test:
    """An integer, no boolean, from `low` to `high`; None = without end."""
    return lambda value: (
        isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high)
    )


def number(low: float, high: float, *, but: float | None = None) -> Test:
    """A real number in the closed range, not `but`; neither a string, nor a boolean, nor NaN."""
    return lambda value: (
        isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and value != but
    )


def or_none(test: Test) -> Test:
    """What passes the test, or None."""
    return lambda value: value is None or test(value)


def several(test: Test) -> Test:
    """A tuple or list of what passes the test."""
    return lambda value: isinstance(value, (tuple, list)) and all(map(test, value))


def is_text(value: object) -> bool:
    """A string that is not empty."""
    return isinstance(value, str) and bool(value)
