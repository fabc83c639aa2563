"""Texts that end an answer, found as it comes, wherever tokens cut them."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Holds back what may be the beginning of a stop text; with `shown` it is a part of the answer.

    Of several in one place, the longest that is there already counts. Without stop texts nothing
    is held back.
    """

    def __init__(self, texts: Sequence[str], *, shown: bool = False) -> None:
        self._texts, self._shown, self._held = tuple(texts), shown, ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(what the answer goes on with, whether it ends there)."""
        self._held += text
        found = ((self._held.find(stop), -len(stop), stop) for stop in self._texts)
        at, _, stop = min((f for f in found if f[0] >= 0), default=(-1, 0, ""))
        if at >= 0:
            end = at + len(stop) if self._shown else at
            given, self._held = self._held[:end], ""
            return given, True
        n = max((self._begun(stop) for stop in self._texts), default=0)
        given, self._held = self._held[: len(self._held) - n], self._held[len(self._held) - n :]
        return given, False

    def flush(self) -> str:
        """What was held back for nothing."""
        given, self._held = self._held, ""
        return given

    def _begun(self, stop: str) -> int:
        """The longest beginning of a stop text that what is held ends with."""
        n = min(len(stop) - 1, len(self._held))
        return next((i for i in range(n, 0, -1) if self._held.endswith(stop[:i])), 0)
