"""The word that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    if not near and word.startswith("--"):
        near = [k for k in known if len(k) > 4 and (word.startswith(k) or k.startswith(word))]
    return f"; did you mean {near[0]}?" if near else ""
