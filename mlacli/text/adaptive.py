"""Adaptive-p: tokens near a target probability are preferred, and the target moves so that in the
long run the tokens taken have it on average. Source: llama.cpp pull request 17927.
"""

from __future__ import annotations

import numpy as np

from mlacli.text.filters import Logits

WIDTH, PEAK, SHARPNESS = 0.3, 5.0, 10.0


class Average:
    """The mean probability of the tokens taken, older ones counting `decay` times as much as the
    next. It begins as if every token before had had the target."""

    def __init__(self, target: float, decay: float) -> None:
        self.target, self.decay = target, decay
        self._sum, self._weight = target / (1 - decay), 1 / (1 - decay)

    @property
    def wanted(self) -> float:
        """The probability to aim at now: as far above the target as the mean is below it."""
        return min(max(2 * self.target - self._sum / self._weight, 0.0), 1.0)

    def add(self, probability: float) -> None:
        """Take a token that had this probability."""
        self._sum = probability + self.decay * self._sum
        self._weight = 1 + self.decay * self._weight


def near(probabilities: Logits, wanted: float) -> Logits:
    """Logits that fall off from `wanted`: like a square close to it, then like a line."""
    distance = np.abs(probabilities - wanted) / WIDTH
    return np.asarray(PEAK - SHARPNESS * distance**2 / (1 + distance))
