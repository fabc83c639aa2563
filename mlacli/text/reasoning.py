"""What a model thinks before it answers: the text between <think> and </think>."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence

START, END = "<think>", "</think>"
_TAIL = 16  # tokens that are enough to spell a mark and some space behind it


class Reasoning:
    """Divides streamed text into (is thought, text); the two marks themselves are left out.

    `inside`: the prompt has opened a thought already.
    """

    def __init__(self, inside: bool = False) -> None:
        self.inside = inside
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[bool, str]]:
        """The parts that are certain now: what may be the start of a mark is held back."""
        text = self._held + text
        while True:
            mark = END if self.inside else START
            place = text.find(mark)
            if place < 0:
                break
            if place:
                yield self.inside, text[:place]
            text, self.inside = text[place + len(mark) :], not self.inside
        keep = next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
        self._held = text[len(text) - keep :]
        if len(text) > keep:
            yield self.inside, text[: len(text) - keep]

    def flush(self) -> Iterator[tuple[bool, str]]:
        """What was held back."""
        if self._held:
            yield self.inside, self._held
        self._held = ""


def opens_a_thought(prompt: str) -> bool:
    """Whether a prompt ends within a thought."""
    return prompt.rstrip().endswith(START)


def ends_in_a_thought(tokens: Sequence[int], piece: Callable[[int], bytes]) -> bool:
    """The same of a prompt's tokens."""
    tail = b"".join(piece(token) for token in tokens[-_TAIL:])
    return opens_a_thought(tail.decode(errors="replace"))


class Spoken:
    """An answer without what is thought, piece by piece."""

    def __init__(self, *, inside: bool) -> None:
        self._reasoning = Reasoning(inside)

    def of(self, text: str) -> str:
        """What of the next text is spoken; the beginning of a mark may be held back."""
        return _spoken(self._reasoning.feed(text))

    def rest(self) -> str:
        """What was held back."""
        return _spoken(self._reasoning.flush())


def _spoken(parts: Iterator[tuple[bool, str]]) -> str:
    return "".join(text for is_thought, text in parts if not is_thought)


class Budget:
    """Ends each thought after `limit` tokens: then `closing`, the tokens of </think>, must come.

    A character is not cut in two: a thought goes on to its last byte.
    """

    def __init__(self, limit: int, closing: Sequence[int], piece: Callable[[int], bytes]) -> None:
        self._limit, self._closing, self._piece = limit, closing, piece
        self._left: list[int] = []  # what is left of `closing`
        self._tail: bytes = b""
        self._characters: codecs.IncrementalDecoder
        self._enter(False)

    def begin(self, prompt: Sequence[int]) -> None:
        """An answer to this prompt follows, which may have opened a thought."""
        self._left = []
        self._enter(ends_in_a_thought(prompt, self._piece))

    @property
    def forced(self) -> int | None:
        """The token that has to be next, if any has to."""
        return self._left[0] if self._left else None

    def accept(self, token: int) -> None:
        """Count the token that came."""
        if self._left:
            del self._left[0]
            if not self._left:
                self._enter(False)
            return
        data = self._piece(token)
        self._tail = self._tail[-len(END) :] + data
        self._characters.decode(data)
        if (END if self._inside else START).encode() in self._tail:
            self._enter(not self._inside)
        elif self._inside:
            self._n += 1
            if self._n >= self._limit and not self._characters.getstate()[0]:
                self._left = list(self._closing)

    def _enter(self, inside: bool) -> None:
        self._inside, self._n, self._tail = inside, 0, b""
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        if inside and self._limit == 0:
            self._left = list(self._closing)
