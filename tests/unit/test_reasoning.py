"""Thoughts are told from answers wherever the text is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from mlacli.text.reasoning import Budget, Reasoning, Spoken, opens_a_thought

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


def pieces(budget: Budget, words: Iterable[str]) -> list[str]:
    """What comes when a model would write these words, one token each."""
    found = []
    for word in words:
        while (forced := budget.forced) is not None:
            budget.accept(forced)
            found.append(_words[forced])
        budget.accept(_words.index(word))
        found.append(word)
    return found


_words = ["<think>", "</think>", "a", " b\n", "</", "think", ">", "!"]


def made(limit: int) -> Budget:
    closing = [_words.index("!"), _words.index("</think>")]
    return Budget(limit, closing, lambda token: _words[token].encode())


def test_a_thought_ends_when_its_budget_is_used() -> None:
    budget = made(2)
    assert pieces(budget, ["a", "<think>", "a", "a", "a", "a"]) == [
        *("a", "<think>", "a", "a", "!", "</think>", "a", "a"),
    ]
    assert pieces(budget, ["<think>", "a", "</think>", "a", "a", "a"]) == [
        *("<think>", "a", "</think>", "a", "a", "a"),
    ]
    assert pieces(made(4), ["<think>", "a", "</", "think", ">", "a", "a"])[-2:] == ["a", "a"]


def test_no_thought_at_all() -> None:
    budget = made(0)
    assert pieces(budget, ["<think>", "a"]) == ["<think>", "!", "</think>", "a"]
    budget.begin([_words.index("a"), _words.index("<think>"), _words.index(" b\n")])
    assert budget.forced is None  # not within a thought: something was thought already
    budget.begin([_words.index("a"), _words.index("<think>")])
    assert pieces(budget, ["a"]) == ["!", "</think>", "a"]


def test_a_character_is_not_cut() -> None:
    parts = [b"<think>", b"\xc3", b"\xa9", b"</think>"]
    budget = Budget(1, [3], lambda token: parts[token])
    budget.accept(0)
    budget.accept(1)
    assert budget.forced is None
    budget.accept(2)
    assert budget.forced == 3


def test_only_what_is_spoken() -> None:
    spoken = Spoken(inside=True)
    texts = ("a", "b</thi", "nk>c<th", "ink>d</think>e<")
    assert "".join(map(spoken.of, texts)) + spoken.rest() == "ce<"
