"""Answers from tokens: what is shown, what is said, and what nothing may overtake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mlacli.reply import Reply
from mlacli.text.reasoning import Spoken
from mlacli.text.stops import Stops

CONTROL = "<|x|>"


class Drawn:
    """A generator that draws these tokens, which are texts here."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.ended = tokens, "length"

    def stream(self, logits: Any, limit: int) -> Iterator[str]:
        yield from self.tokens[:limit]


class Words:
    """A tokenizer whose tokens are their own texts."""

    def piece(self, token: str) -> bytes:
        return token.encode()

    def is_control(self, token: str) -> bool:
        return token.startswith("<|") or token in ("<think>", "</think>")

    def is_end_of_generation(self, token: str) -> bool:
        return token == "<|end|>"


def answered(*tokens: str, **options: Any) -> tuple[str, Reply]:
    reply = Reply(Drawn(tokens), Words(), **options)  # type: ignore[arg-type]
    return "".join(text for _, text in reply.pieces(None)), reply  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Decoder:
        def __init__(self, words: Words) -> None:
            self._words = words

        def feed(self, token: str) -> str:
            return "" if self._words.is_control(token) else token

        def flush(self) -> str:
            return ""

    monkeypatch.setattr("mlacli.reply.StreamDecoder", Decoder)


def test_the_end() -> None:
    shown, reply = answered("a", "b", "<|end|>", "c")
    assert (
        shown == reply.text == "ab"
        and reply.finish == "end"
        and list(map(str, reply.tokens)) == ["a", "b"]
    )
    shown, reply = answered("a", "<|end|>", "c", ignores_end=True)
    assert shown == "ac" and reply.finish == "length"


def test_a_control_token_does_not_overtake_what_is_held_back() -> None:
    options: dict[str, Any] = {"special": True, "stops": Stops(["bc"], shown=True)}
    shown, reply = answered("ab", "<|end|>", **options)
    assert shown == reply.text == "ab<|end|>" and reply.finish == "end"
    options["stops"] = Stops(["END"], shown=True)
    shown, reply = answered("abc EN", CONTROL, "x", **options)
    assert shown == reply.text == f"abc EN{CONTROL}x" and reply.finish == "length"


def test_a_control_token_can_be_a_stop_text() -> None:
    stops = Stops([CONTROL], shown=True)
    shown, reply = answered("a", CONTROL, "b", special=True, stops=stops)
    assert shown == f"a{CONTROL}" and reply.finish == "stop"


def test_in_a_conversation_control_tokens_are_shown_but_not_said() -> None:
    shown, reply = answered("a", CONTROL, "b", "<|end|>", special=True, says_special=False)
    assert shown == f"a{CONTROL}b<|end|>" and reply.text == "ab"


def test_thoughts_are_left_out() -> None:
    spoken = Spoken(inside=True)
    shown, reply = answered("hm", CONTROL, "</th", "ink>", "yes", special=True, spoken=spoken)
    assert shown == reply.text == "yes"


def test_marks_of_thoughts_may_be_control_tokens() -> None:
    shown, reply = answered("<think>", "hm", "</think>", "yes", CONTROL)
    assert shown == reply.text == "<think>hm</think>yes"
    shown, reply = answered("hm", "</think>", "yes", spoken=Spoken(inside=True))
    assert shown == reply.text == "yes"
