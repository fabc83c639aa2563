"""Filters of logits: what a filter removes becomes -inf, what it keeps stays at its place.

Each is a function of logits, of which at least one is finite, that leaves its argument as it is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

_FIRST = 256  # candidates: sorting a whole vocabulary takes long, and few are needed
_BLOCK = 4096

Logits = npt.NDArray[np.floating[Any]]
TokenIds = npt.NDArray[np.intp]


def greedy(logits: Logits) -> int:
    """The id of the greatest logit, the smallest such id if there are several."""
    return int(logits.argmax())


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
    return _only(logits, top_k_ids(logits, k))


def top_p(logits: Logits, p: float) -> Logits:
    """Keeps the fewest most probable tokens whose probabilities sum to at least p, at least one.

    Nucleus sampling, arXiv 1904.09751.
    """
    if p >= 1.0:
        return logits
    probabilities = softmax(logits)
    first = np.sort(probabilities[top_k_ids(logits, _FIRST)])[::-1]
    n = _reaching(first, p)
    if n is None:
        n = _reaching(np.sort(probabilities)[::-1], p)
    return top_k(logits, logits.size if n is None else n)


def _reaching(probabilities: Logits, p: float) -> int | None:
    """How many of these, from the first on, sum to at least p; None if all are less."""
    before = 0.0
    for start in range(0, probabilities.size, _BLOCK):
        total = before + np.cumsum(probabilities[start : start + _BLOCK], dtype=np.float64)
        if total[-1] >= p:
            return start + int(np.searchsorted(total, p)) + 1
        before = float(total[-1])
    return None


def min_p(logits: Logits, p: float) -> Logits:
    """Keeps the tokens that are at least p times as probable as the most probable one.

    arXiv 2407.01082.
    """
    if p <= 0.0:
        return logits
    return np.where(logits >= logits.max() + math.log(p), logits, -np.inf)


def top_n_sigma(logits: Logits, n: float) -> Logits:
    """Keeps logits within n standard deviations of the greatest; all for n <= 0.

    Those that are -inf already do not count. arXiv 2411.07641.
    """
    if n <= 0.0:
        return logits
    left = logits[logits > -np.inf].astype(np.float64)
    return np.where(logits >= left.max() - n * left.std(), logits, -np.inf)


def typical_p(logits: Logits, p: float) -> Logits:
    """Keeps the tokens whose surprise is nearest to the entropy, until they sum to more than p.

    |-log p_i - H| rising, H = -sum of p log p. Locally typical sampling, arXiv 2202.00666.
    """
    if p >= 1.0:
        return logits
    # -log p_i = log sum exp x - x_i
    weights = np.exp(logits - logits.max()).astype(np.float64)
    probabilities = weights / weights.sum()
    surprise = math.log(weights.sum()) + float(logits.max()) - logits.astype(np.float64)
    left = probabilities > 0
    entropy = float((probabilities[left] * surprise[left]).sum())
    distance = np.abs(surprise - entropy)
    candidates = _FIRST
    while True:
        ids = top_k_ids(-distance, candidates)
        ids = ids[np.argsort(distance[ids], kind="stable")]
        ids = ids[logits[ids] > -np.inf]
        total = np.cumsum(probabilities[ids])
        if total[-1] > p or candidates >= logits.size:
            break
        candidates *= 8
    return _only(logits, ids[: int(np.searchsorted(total, p, side="right")) + 1])


def tail_free(logits: Logits, z: float) -> Logits:
    """Cuts the tail of the sorted probabilities where their curve has become straight.

    The absolute second differences, normalised to 1, are added up from the most probable token on;
    what lies behind the place where the sum exceeds z is removed. At least one token stays.
    https://trentbrick.github.io/Tail-Free-Sampling
    """
    n = int(np.count_nonzero(logits > -np.inf))
    if z >= 1.0 or n <= 2:
        return logits
    rising = np.sort(softmax(logits))[-n:].astype(np.float64)
    bends = np.abs(np.diff(rising[::-1], n=2))
    total = bends.sum()
    weights = bends / total if total > 1e-6 else np.full(bends.size, 1 / bends.size)
    beyond = np.flatnonzero(np.cumsum(weights)[1:] > z)
    return top_k(logits, int(beyond[0]) + 1 if beyond.size else n)


def exclude_top(logits: Logits, threshold: float) -> Logits:
    """Removes all tokens of at least this probability but the least probable one of them.

    XTC, https://github.com/oobabooga/text-generation-webui/pull/6335; whether it is applied at all
    is a matter of chance, which the caller takes.
    """
    probabilities = softmax(logits)
    above = np.flatnonzero(probabilities >= threshold)
    if above.size < 2:
        return logits
    above = above[np.argsort(-logits[above], kind="stable")]
    kept = logits.copy()
    kept[above[:-1]] = -np.inf
    return kept


def temperature(logits: Logits, temp: float) -> Logits:
    """logits / temp; for temp = 0 only the greatest one stays."""
    if temp == 0.0:
        return _only(logits, np.array([greedy(logits)]))
    return logits / temp


def dynamic_temperature(logits: Logits, temp: float, spread: float, exponent: float) -> Logits:
    """logits / T, T between temp - spread (not below 0) and temp + spread by how flat they are.

    T = low + (high - low) (H / log n)^exponent, H being the entropy of the n tokens left.
    https://github.com/ggml-org/llama.cpp/pull/4972
    """
    probabilities = softmax(logits).astype(np.float64)
    left = probabilities[logits > -np.inf]
    if left.size <= 1:
        return logits
    positive = left[left > 0]
    flatness = float(-(positive * np.log(positive)).sum() / math.log(left.size))
    low, high = max(0.0, temp - spread), temp + spread
    return temperature(logits, low + (high - low) * min(1.0, max(0.0, flatness)) ** exponent)


def softmax(logits: Logits) -> Logits:
    """exp(x - max) / sum."""
    weights = np.exp(logits - logits.max())
    normalised: Logits = weights / weights.sum()
    return normalised


def draw(logits: Logits, fraction: float) -> int:
    """The index whose share of the cumulative probabilities holds `fraction`, 0 <= fraction < 1."""
    total = np.cumsum(softmax(logits))
    index = int(np.searchsorted(total, fraction * total[-1], side="right"))
    return min(index, int(np.flatnonzero(logits > -np.inf)[-1]))


def _only(logits: Logits, ids: TokenIds) -> Logits:
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept
