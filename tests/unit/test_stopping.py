"""Stop strings over any cutting of the text, and the token-level reasons to end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loquetier.config import SamplingParams
from loquetier.engine.stopping import StopChecker, finish_reason

# Few letters, so that stop strings overlap with the text, with each other and with themselves; plus wide characters.
TEXT = st.text(alphabet="ab😀", max_size=40)
STOPS = st.lists(st.text(alphabet="ab😀", min_size=1, max_size=5), max_size=4).map(tuple)


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The oracle: cut before the earliest occurrence, the shorter stop string on a tie."""
    hits = [(text.find(s), len(s), s) for s in stops if s in text]
    return (text[: min(hits)[0]], min(hits)[2]) if hits else (text, None)


def split(text: str, borders: list[int]) -> list[str]:
    points = [0, *sorted(b % (len(text) + 1) for b in borders), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(points)]


@settings(max_examples=500, deadline=None)  # no deadline: the machine's load is not what is tested
@example("aaab", ("aab",), [1])  # needs the overlap of the stop string with itself
@given(TEXT, STOPS, st.lists(st.integers(0, 100), max_size=12))
def test_any_split_gives_the_text_cut_at_the_earliest_occurrence(
    text: str, stops: tuple[str, ...], borders: list[int]
) -> None:
    checker = StopChecker(stops)
    emitted = [checker.push(delta) for delta in split(text, borders)]
    emitted.append(checker.flush())
    assert ("".join(emitted), checker.stopped) == cut(text, stops)


@given(TEXT, STOPS)
def test_char_by_char_holds_back_no_more_than_an_undecided_match(text: str, stops: tuple[str, ...]) -> None:
    checker = StopChecker(stops)
    out = ""
    for i, char in enumerate(text, start=1):
        out += checker.push(char)
        if checker.stopped is not None:
            break
        held = text[len(out) : i]
        # Held text is the beginning of a stop string, or of a longer one around a complete match.
        assert not held or any(s.startswith(held) or held.startswith(s) or s in held for s in stops)
        assert len(held) < max((len(s) for s in stops), default=1)


@given(TEXT, TEXT, STOPS)
def test_text_before_min_tokens_is_not_searched(free: str, checked: str, stops: tuple[str, ...]) -> None:
    checker = StopChecker(stops)
    assert checker.push(free, may_stop=False) == free
    expected, stopped = cut(checked, stops)
    assert checker.push(checked) + checker.flush() == expected
    assert checker.stopped == stopped


def test_a_stop_string_that_began_before_min_tokens_does_not_count_but_its_text_is_not_lost() -> None:
    checker = StopChecker(("abc",))
    assert checker.push("xa") == "x"
    assert checker.push("b", may_stop=False) == "ab"
    assert checker.push("c") + checker.flush() == "c"
    assert checker.stopped is None


def test_text_after_the_stop_is_dropped() -> None:
    checker = StopChecker(("\n\n",))
    assert [checker.push(d) for d in ("one\n", "\ntwo", "three")] == ["one", "", ""]
    assert checker.flush() == ""
    assert checker.stopped == "\n\n"


def test_the_stop_that_begins_first_wins_even_when_it_is_complete_later() -> None:
    checker = StopChecker(("b", "abc"))
    assert checker.push("ab") == ""
    assert checker.stopped is None
    assert checker.push("c") == ""
    assert checker.stopped == "abc"


def test_flush_decides_an_open_match() -> None:
    checker = StopChecker(("b", "abc"))
    assert checker.push("ab") == ""
    assert checker.flush() == "a"
    assert checker.stopped == "b"


def test_hostile_self_similar_stop_strings_stay_linear() -> None:
    stops = tuple("a" * 511 + c for c in "bcde")  # the largest the edge admits: 4 x 512 characters
    checker = StopChecker(stops)
    out = "".join(checker.push("a" * 7) for _ in range(2000))
    assert out + checker.flush() == "a" * 14000


EOS = frozenset({2})


@pytest.mark.parametrize(
    ("token", "generated", "options", "limit", "expected"),
    [
        (5, 1, {}, 10, None),
        (2, 1, {}, 10, "stop"),
        (5, 10, {}, 10, "length"),
        (2, 10, {}, 10, "stop"),  # the model had ended by itself
        (2, 1, {"ignore_eos": True}, 10, None),
        (2, 10, {"ignore_eos": True}, 10, "length"),
        (7, 1, {"stop_token_ids": (7,)}, 10, "stop"),
        (7, 1, {"stop_token_ids": (7,), "ignore_eos": True}, 10, "stop"),  # only the model's own ends are ignored
        (2, 1, {"stop_token_ids": (2,), "ignore_eos": True}, 10, "stop"),  # asked for by id after all
        (2, 3, {"min_tokens": 3}, 10, None),
        (2, 4, {"min_tokens": 3}, 10, "stop"),
        (7, 3, {"min_tokens": 3, "stop_token_ids": (7,)}, 3, "length"),
    ],
)
def test_finish_reason(token: int, generated: int, options: dict, limit: int, expected: str | None) -> None:
    assert finish_reason(token, generated, SamplingParams(**options), EOS, limit) == expected
