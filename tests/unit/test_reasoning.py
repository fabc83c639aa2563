"""Thoughts are told from answers wherever the text is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from mlacli.text.reasoning import Reasoning, opens_a_thought

PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "thi", "nk>", "</", "a", " b\n", "<think", ">"]),
    max_size=20,
)


def merged(pieces: Iterable[tuple[bool, str]]) -> list[tuple[bool, str]]:
    """Neighbours of the same kind as one."""
    groups = itertools.groupby((p for p in pieces if p[1]), key=lambda p: p[0])
    return [(thought, "".join(text for _, text in group)) for thought, group in groups]


@given(parts=PARTS, inside=st.booleans())
def test_the_same_however_the_text_comes(parts: list[str], inside: bool) -> None:
    reasoning = Reasoning(inside)
    found = [piece for part in parts for piece in reasoning.feed(part)] + [*reasoning.flush()]
    text, expected = "".join(parts), []
    while text:
        before, mark, text = text.partition("</think>" if inside else "<think>")
        expected.append((inside, before))
        inside ^= bool(mark)
    assert merged(found) == merged(expected)


def test_a_prompt_may_open_a_thought() -> None:
    assert opens_a_thought("<｜Assistant｜><think>\n")
    assert not opens_a_thought("<think>x</think>")
