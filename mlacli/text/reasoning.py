"""What a model thinks before it answers: the text between <think> and </think>."""

from __future__ import annotations

from collections.abc import Iterator

START, END = "<think>", "</think>"


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
