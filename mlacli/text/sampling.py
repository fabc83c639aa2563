"""Picking the next token from its logits.

Each filter is a function of logits that gives logits: what it removes becomes -inf, what it keeps
stays at its place. `Sampler` applies them in llama.cpp's order: repetition penalty, top-k, top-p,
min-p, temperature, then one draw.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from mlacli.errors import ModelError
from mlacli.settings import MAX_SEED, RANDOM_SEEDS, SamplingSettings

_TOP_P_FIRST = 256

Logits = npt.NDArray[np.floating[Any]]
TokenIds = npt.NDArray[np.intp]


class Sampler:
    """Draws tokens by `settings`; the same seed and logits give the same tokens.

    `seed` is the one in use, also when the system drew it. `end_ids` are the tokens that
    `ignore_eos` rules out.
    """

    def __init__(
        self, settings: SamplingSettings, n_vocab: int, end_ids: Collection[int] = ()
    ) -> None:
        self.settings = settings
        self.n_vocab = n_vocab
        given = settings.seed not in RANDOM_SEEDS
        self.seed = settings.seed if given else secrets.randbelow(MAX_SEED)
        self.position = 0
        self._banned = np.array(sorted(end_ids) if settings.ignore_eos else [], np.intp)
        last = settings.repeat_last_n
        self._recent: deque[int] = deque(maxlen=None if last < 0 else last)
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def accept(self, token: int) -> None:
        """Counts `token`, of the prompt or sampled, for the penalty and the position in errors."""
        self._recent.append(token)
        self.position += 1

    def sample(self, logits: Logits) -> int:
        """The next token, from `logits` of shape (n_vocab,), which are left as they are.

        Raises ModelError when one of them is NaN or infinite.
        """
        if logits.shape != (self.n_vocab,):
            raise ValueError(f"logits have shape {logits.shape}, not ({self.n_vocab},)")
        finite = np.isfinite(logits)
        if not finite.all():
            worst = int(finite.argmin())
            raise ModelError(
                f"non-finite logits at position {self.position}: token {worst} has {logits[worst]}"
            )
        settings = self.settings
        if settings.repeat_penalty != 1.0 and self._recent:
            logits = repeat_penalty(logits, self._recent, settings.repeat_penalty)
        if self._banned.size:
            logits = logits.copy()
            logits[self._banned] = -np.inf
        if settings.temp == 0.0:
            return greedy(logits)
        ids = top_k_ids(logits, settings.top_k)
        kept: Logits = logits[ids].astype(np.float64)
        kept = temperature(min_p(top_p(kept, settings.top_p), settings.min_p), settings.temp)
        return int(ids[draw(kept, self._random.random())])


def greedy(logits: Logits) -> int:
    """The id of the greatest logit, the smallest such id if there are several."""
    return int(logits.argmax())


def repeat_penalty(logits: Logits, recent: Collection[int], penalty: float) -> Logits:
    """x / penalty for x > 0, else x * penalty, once per token in `recent` (arXiv 1909.05858)."""
    ids = np.unique(np.fromiter(recent, np.intp, len(recent)))
    logits = logits.copy()
    seen = logits[ids]
    logits[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
    return logits


def top_k_ids(logits: Logits, k: int) -> TokenIds:
    """The ids of the k greatest logits in ascending order; of equal logits the smallest ids."""
    if k <= 0 or k >= logits.size:
        return np.arange(logits.size)
    # A threshold, not argpartition: that would pick among equal logits by the CPU it runs on.
    least = np.partition(logits, logits.size - k)[logits.size - k]
    ids = np.flatnonzero(logits >= least)
    surplus = ids.size - k
    if surplus:
        ids = np.delete(ids, np.flatnonzero(logits[ids] == least)[-surplus:])
    return ids


def top_k(logits: Logits, k: int) -> Logits:
    """Keeps the k greatest logits; all of them for k = 0."""
    ids = top_k_ids(logits, k)
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def top_p(logits: Logits, p: float) -> Logits:
    """Keeps the fewest most probable tokens whose probabilities sum to at least p, at least one."""
    if p >= 1.0:
        return logits
    probabilities = softmax(logits)
    candidates = _TOP_P_FIRST  # sorting a whole vocabulary takes 20 ms, and few tokens are needed
    while True:
        ids = top_k_ids(logits, candidates)
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        total = np.cumsum(probabilities[ids])
        if total[-1] >= p or ids.size == logits.size:
            break
        candidates *= 8
    ids = ids[: int(np.searchsorted(total, p)) + 1]
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def min_p(logits: Logits, p: float) -> Logits:
    """Keeps the tokens that are at least p times as probable as the most probable one."""
    if p <= 0.0:
        return logits
    return np.where(logits >= logits.max() + math.log(p), logits, -np.inf)


def temperature(logits: Logits, temp: float) -> Logits:
    """logits / temp, for temp > 0."""
    return logits / temp


def softmax(logits: Logits) -> Logits:
    """exp(x - max) / sum, for logits of which at least one is finite."""
    weights = np.exp(logits - logits.max())
    normalised: Logits = weights / weights.sum()
    return normalised


def draw(logits: Logits, fraction: float) -> int:
    """The index whose share of the cumulative probabilities holds `fraction`, 0 <= fraction < 1."""
    total = np.cumsum(softmax(logits))
    index = int(np.searchsorted(total, fraction * total[-1], side="right"))
    return min(index, int(np.flatnonzero(logits > -np.inf)[-1]))
