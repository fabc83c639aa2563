"""Stop texts are found wherever pieces are cut, and nothing else is held back for long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlacli.text.stops import Stops


def answer(stops: Stops, pieces: list[str]) -> str:
    said = ""
    for piece in pieces:
        text, ended = stops.feed(piece)
        said += text
        if ended:
            return said
    return said + stops.flush()


def expected(text: str, stops: list[str], shown: bool) -> str:
    """What precedes the first place where a stop text is complete, as a plain search finds it."""
    for end in range(len(text) + 1):
        here = [s for s in stops if text[:end].endswith(s)]
        if here:
            return text[:end] if shown else text[: end - len(max(here, key=len))]
    return text


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.text("ab", min_size=1, max_size=4))
def test_wherever_it_is_cut(pieces: list[str], stop: str) -> None:
    for shown in (True, False):
        got = answer(Stops([stop], shown=shown), pieces)
        assert got == expected("".join(pieces), [stop], shown)


def test_what_cannot_become_a_stop_is_given_at_once() -> None:
    stops = Stops(["END"])
    assert stops.feed("an E") == ("an ", False)
    assert stops.feed("x") == ("Ex", False)
    assert stops.feed("EEN") == ("E", False)
    assert stops.flush() == "EN"


@pytest.mark.parametrize(("shown", "text"), [(False, "a"), (True, "aSTOP")])
def test_what_follows_a_stop_is_dropped(shown: bool, text: str) -> None:
    assert Stops(["TOP", "STOP"], shown=shown).feed("aSTOPb") == (text, True)
