"""One answer in the making: tokens drawn become text until something ends it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mlacli.engine import Logits
from mlacli.generation import Generator
from mlacli.sampling_settings import MAX_INT
from mlacli.text.reasoning import END, START, Spoken
from mlacli.text.stops import Stops
from mlacli.text.tokenizer import StreamDecoder, Tokenizer

# The model ended it; a stop text; what the generator ran out of.
Finish = Literal["end", "stop", "length", "context", "grammar"]
CANCELLED = "cancelled"


@dataclass
class Reply:
    """What has come so far; `finish` is None until the answer has ended by itself.

    `limit` is the most tokens, `stops` end it, `ignores_end` lets it go on after an end token.
    With `special` control tokens are shown, but only `says_special` makes them a part of `text`;
    `spoken` leaves out what is thought. `first_token` is when that was drawn
    (time.perf_counter()).
    """

    generator: Generator
    tokenizer: Tokenizer
    limit: int = MAX_INT
    stops: Stops = field(default_factory=lambda: Stops(()))
    ignores_end: bool = False
    special: bool = False
    says_special: bool = True
    spoken: Spoken | None = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # without the end token
    finish: Finish | None = None
    first_token: float | None = None

    def pieces(self, logits: Logits) -> Iterator[tuple[int | None, str]]:
        """Tokens that follow a prompt with these logits, with the text that each completes; None
        and what is left at the end. Raises Cancelled."""
        decoder = StreamDecoder(self.tokenizer)
        ended: Finish | None = None
        for token in self.generator.stream(logits, self.limit):
            self.first_token = self.first_token or time.perf_counter()
            if self.tokenizer.is_end_of_generation(token) and not self.ignores_end:
                ended = "end"
                if self.special:
                    yield None, self._fed(decoder, token)[0]
                break
            self.tokens.append(token)
            text, stopped = self._fed(decoder, token)
            if stopped:
                self.finish = "stop"
            yield token, text
            if stopped:
                return
        text, stopped = self._next(decoder.flush(), last=True)
        self.finish = ended or ("stop" if stopped else self.generator.ended)
        if text:
            yield None, text

    def _fed(self, decoder: StreamDecoder, token: int) -> tuple[str, bool]:
        """As `_next`, for a token; nothing that was held back reaches across a control token.

        The marks of a thought are text in any case: some files have them as control tokens.
        """
        if not self.tokenizer.is_control(token):
            return self._next(decoder.feed(token))
        shown = self.tokenizer.piece(token).decode(errors="replace")
        if shown in (START, END):
            return self._next(decoder.flush() + shown)
        if not self.special:
            return self._next(decoder.feed(token))
        before, stopped = self._next(decoder.flush())
        if stopped:
            return before, True
        held = self.stops.flush()
        self.text += held
        if not self.says_special:
            return before + held + shown, False
        text, stopped = self._next(shown)
        return before + held + text, stopped

    def _next(self, text: str, *, last: bool = False) -> tuple[str, bool]:
        """(what the answer goes on with, whether a stop text ends it there)."""
        if self.spoken:
            text = self.spoken.of(text) + (self.spoken.rest() if last else "")
        text, stopped = self.stops.feed(text)
        if last and not stopped:
            text += self.stops.flush()
        self.text += text
        return text, stopped
