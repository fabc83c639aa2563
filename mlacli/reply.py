"""One answer in the making: tokens drawn become text until something ends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mlacli.engine import Logits
from mlacli.generation import Generator
from mlacli.sampling_settings import MAX_INT
from mlacli.text.stops import Stops
from mlacli.text.tokenizer import StreamDecoder, Tokenizer

# The model (or the grammar) ended it; a stop text; as many tokens as wanted; no room is left.
Finish = Literal["end", "stop", "length", "context"]


@dataclass
class Reply:
    """What has come so far; `finish` is None until the answer has ended by itself.

    `limit` is the most tokens, `stops` end it, `ignores_end` lets it go on after an end token.
    """

    generator: Generator
    tokenizer: Tokenizer
    limit: int = MAX_INT
    stops: Stops = field(default_factory=lambda: Stops(()))
    ignores_end: bool = False
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # without the end token
    finish: Finish | None = None

    def pieces(self, logits: Logits) -> Iterator[str]:
        """The text that follows a prompt with these logits. Raises Cancelled."""
        decoder = StreamDecoder(self.tokenizer)
        ended: Finish | None = None
        for token in self.generator.stream(logits, self.limit):
            if self.tokenizer.is_end_of_generation(token) and not self.ignores_end:
                ended = "end"
                break
            self.tokens.append(token)
            text, stopped = self.stops.feed(decoder.feed(token))
            yield self._said(text)
            if stopped:
                self.finish = "stop"
                return
        text, stopped = self.stops.feed(decoder.flush())
        self.finish = ended or ("stop" if stopped else self._ran_out())
        yield self._said(text + ("" if stopped else self.stops.flush()))

    def _said(self, text: str) -> str:
        self.text += text
        return text

    def _ran_out(self) -> Finish:
        if len(self.tokens) >= self.limit:
            return "length"
        # Short of both, only a grammar's end is left.
        full = len(self.generator.tokens) >= self.generator.engine.n_ctx
        return "context" if full else "end"
