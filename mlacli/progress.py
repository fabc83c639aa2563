"""How long work tells how far it is, and what whoever shows it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Progress = Callable[[int, int], None]  # (done, in all), in the work's own unit; from any thread


class Watch(Protocol):
    """Shows a piece of work while it lasts: `with watch("prompt", "tokens") as progress:`.

    `unit` is `bytes` for sizes, else the name of what is counted.
    """

    def __call__(self, what: str, unit: str) -> AbstractContextManager[Progress]: ...


@contextmanager
def unwatched(what: str, unit: str) -> Iterator[Progress]:
    """Nobody looks."""
    yield lambda done, total: None
