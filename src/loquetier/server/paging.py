"""Where a page of a list begins."""

from __future__ import annotations

from collections.abc import Callable

from loquetier.server.problems import bad


def place_behind(after: str | None, place_of: Callable[[str], int | None], what: str) -> int | None:
    """The place of the entry that `after` names; None without `after`: the list's beginning.

    Args:
        place_of: an entry's place by its id; None for an id that is not in the list.
        what: the entry is, for the error: "none of your files".

    Raises:
        ApiError: 400, there is no such entry.
    """
    if after is None:
        return None
    place = place_of(after)
    if place is None:
        raise bad(f"after={after[:64]!r} is {what}", "after")
    return place
