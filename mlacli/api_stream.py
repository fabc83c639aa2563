"""An answer of the API while it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlacli.api_call import Answer, Asked
from mlacli.errors import UsageError
from mlacli.generation import common_length

if TYPE_CHECKING:
    from mlacli.api import Model


class Stream(Iterator[str]):
    """An answer, piece by piece; made by `Model.stream`. `answer` is what has come so far."""

    def __init__(self, model: Model, call: Asked) -> None:
        self._model, self.call, self._ended = model, call, False

    @property
    def answer(self) -> Answer:
        return self.call.answer

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        text = None if self._ended else self._next()
        if text is None:
            raise StopIteration
        return text

    def rest(self) -> Answer:
        """The whole answer, once it has ended."""
        if not self._ended:
            with self._begun():
                while self._piece() is not None:
                    pass
        return self.answer

    def close(self) -> None:
        """Ask for no more of it."""
        self.call.cancelled, self._ended = True, True

    def _next(self) -> str | None:
        with self._begun():
            return self._piece()

    def _piece(self) -> str | None:
        text = None if self.call.cancelled else self.call.piece()
        self._ended = text is None
        return text

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """The model, ready for this answer's next step. Raises UsageError when it went on to
        another one: the cache is no longer this answer's."""
        model, call = self._model, self.call
        with model._used() as session:
            if not call.begun:
                model._call = call
                n = common_length(session.generator.tokens, call.tokens)
                for line in session.prepare(len(call.tokens) - n):
                    call.note(line)
            elif model._call is not call:
                raise UsageError("the model was used for something else: this answer cannot go on")
            with model._interrupts:
                yield
