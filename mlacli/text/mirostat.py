"""Mirostat: how many tokens to choose from, so that the text keeps a given surprise.

arXiv 2007.14966. The surprise of a token is -log2 of its probability; mu is the bound on it, which
moves after each token by the learning rate times how far its surprise was from the target.
"""

from __future__ import annotations

import math

import numpy as np

from mlacli.text.filters import Logits, greedy, softmax, top_k, top_k_ids

_ESTIMATED_FROM = 100  # of the most probable tokens


def cut_by_rank(logits: Logits, mu: float, n_vocab: int) -> Logits:
    """Version 1: keeps k = (e 2^mu / (1 - n_vocab^-e))^(1/s), e = s - 1, s being the exponent of
    Zipf's law that fits the most probable tokens best."""
    probabilities = softmax(logits)[top_k_ids(logits, _ESTIMATED_FROM)]
    top = np.sort(probabilities.astype(np.float64))[::-1]
    top = top[top > 0]
    if top.size < 2:
        return logits
    ranks = np.arange(1, top.size)
    t, b = np.log((ranks + 1) / ranks), np.log(top[:-1] / top[1:])
    s = float((t * b).sum() / (t * t).sum())
    if s <= 0:  # all alike
        return logits
    e = s - 1
    ratio = 1 / math.log(n_vocab) if abs(e) < 1e-9 else e / (1 - n_vocab**-e)
    log_k = (math.log(ratio) + mu * math.log(2)) / s
    k = n_vocab if log_k > math.log(n_vocab) else int(math.exp(log_k))
    return top_k(logits, max(1, k))


def cut_by_surprise(logits: Logits, mu: float) -> Logits:
    """Version 2: removes the tokens whose surprise is above mu, but for the most probable one."""
    best = greedy(logits)
    log_sum = float(logits[best]) + math.log(np.exp(logits - logits[best]).sum(dtype=np.float64))
    keep = logits >= log_sum - mu * math.log(2)  # -log2 p_i = (log sum exp x - x_i) / log 2
    keep[best] = True
    return np.where(keep, logits, -np.inf)


def moved(mu: float, logits: Logits, chosen: int, *, target: float, rate: float) -> float:
    """mu after the token at `chosen` was drawn from `logits`."""
    probability = float(softmax(logits)[chosen])
    return mu - rate * (-math.log2(max(probability, 1e-300)) - target)
