"""What tokens lose for having been there before."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlacli.text.filters import Logits, TokenIds

_LARGEST_LOG = 88.7  # of an f32
_WINDOW = 64


def penalise(
    logits: Logits,
    places: TokenIds,
    counts: npt.NDArray[np.integer],
    *,
    repeat: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> Logits:
    """x / repeat (x * repeat where x <= 0) - count * frequency - presence, at these places.

    arXiv 1909.05858 and OpenAI's penalties, as llama.cpp combines them.
    """
    logits = logits.copy()
    seen = logits[places]
    seen = np.where(seen > 0, seen / repeat, seen * repeat)
    logits[places] = seen - counts * frequency - presence
    return logits


def repeats(history: npt.NDArray[np.integer], longest: int) -> dict[int, int]:
    """Token -> how many of the last tokens, at most `longest`, it has followed before.

    Of several places the one where most agree counts: with history a b c d a b c, d has followed
    three.
    """
    found: dict[int, int] = {}
    ends = np.flatnonzero(history[:-1] == history[-1]) if len(history) else np.empty(0, np.intp)
    length = 1
    while ends.size and length <= longest:
        found |= dict.fromkeys(np.unique(history[ends + 1]).tolist(), length)
        ends = ends[ends >= length]
        ends = ends[history[ends - length] == history[-1 - length]]
        length += 1
    return found


def dry_penalties(
    lengths: Sequence[int], multiplier: float, base: float, allowed: int
) -> list[float]:
    """multiplier * base^(length - allowed): what a token loses that would go on with a repetition.

    The exponent is kept where an f32 can hold the power. DRY,
    https://github.com/oobabooga/text-generation-webui/pull/5677
    """
    most = longest_exponent(base)
    return [multiplier * base ** min(length - allowed, most) for length in lengths]


def longest_exponent(base: float) -> int:
    """Beyond it a longer repetition is not worse."""
    return int(_LARGEST_LOG / math.log(base)) if base > 1.000001 else 0


def tokens_since(breakers: Sequence[bytes], pieces: Sequence[bytes]) -> int:
    """How many tokens follow the last place where one of the breakers ends, by their text."""
    size = _WINDOW
    while True:
        window = pieces[-size:]
        text = b"".join(window)
        end = max((text.rfind(b) + len(b) for b in breakers if b in text), default=-1)
        if end >= 0 or size >= len(pieces):
            break
        size *= 4
    if end < 0:
        return len(pieces)
    left, count = len(text), 0
    for piece in reversed(window):
        left -= len(piece)
        if left < end:
            break
        count += 1
    return count
