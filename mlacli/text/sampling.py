"""Picking the next token from its logits: `Sampler` runs a chain of filters, then draws once."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection

import numpy as np

from mlacli.errors import ModelError, UsageError
from mlacli.sampling_settings import MAX_SEED, RANDOM_SEEDS, SamplingSettings
from mlacli.text import adaptive, filters, mirostat
from mlacli.text.filters import Logits, TokenIds
from mlacli.text.penalties import (
    dry_penalties,
    longest_exponent,
    penalise,
    repeats,
    tokens_since,
)

# These never remove the likeliest token, so that at temperature 0 they need not run.
_KEEP_THE_BEST = ("top_n_sigma", "top_k", "tfs_z", "top_p", "min_p")


class Sampler:
    """Draws tokens by `settings`; the same seed and logits give the same tokens.

    `seed` is the one in use, also when the system drew it. `end_ids` are the tokens that
    `ignore_eos` rules out, `piece(token)` is a token's text. Raises UsageError for a bias of a
    token outside the vocabulary.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        n_vocab: int,
        end_ids: Collection[int] = (),
        piece: Callable[[int], bytes] = lambda token: b"",
    ) -> None:
        self.settings = settings
        self.n_vocab = n_vocab
        given = settings.seed not in RANDOM_SEEDS
        self.seed = settings.seed if given else secrets.randbelow(MAX_SEED)
        self._end_ids = end_ids
        self._bias = _bias(settings, n_vocab, end_ids)
        self._all = np.arange(n_vocab)
        self._piece, self._history, self._pieces = piece, np.empty(1024, np.int64), list[bytes]()
        self._breakers = [b.encode("utf-8", "surrogateescape") for b in settings.breakers]
        self._n = 0
        self._mu = 2 * settings.mirostat_ent
        self._taken = adaptive.Average(settings.adaptive_target, settings.adaptive_decay)
        self._probabilities: Logits | None = None  # before adaptive-p changed them
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._chain = [name for name in settings.chain if self._does_something(name)]

    def changed(self, settings: SamplingSettings) -> Sampler:
        """One with other settings, that has accepted nothing yet."""
        return Sampler(settings, self.n_vocab, self._end_ids, self._piece)

    @property
    def position(self) -> int:
        """Tokens accepted so far."""
        return self._n

    def accept(self, token: int) -> None:
        """Counts `token`, of the prompt or sampled, for penalties and the position in errors."""
        if self._n == self._history.size:
            self._history = np.resize(self._history, 2 * self._n)
        self._history[self._n] = token
        self._n += 1
        if "dry" in self._chain:
            self._pieces.append(self._piece(token))

    def rewind(self, n: int) -> None:
        """Forget all but the first n accepted tokens."""
        self._n = min(n, self._n)
        del self._pieces[self._n :]

    def sample(self, logits: Logits, allowed: Logits | None = None) -> int:
        """The next token, from `logits` of shape (n_vocab,), which are left as they are.

        `allowed`, if given, is added to them: 0 for tokens that may come, -inf for others. Raises
        ModelError when a logit is NaN or infinite.
        """
        if logits.shape != (self.n_vocab,):
            raise ValueError(f"logits have shape {logits.shape}, not ({self.n_vocab},)")
        finite = np.isfinite(logits)
        if not finite.all():
            worst = int(finite.argmin())
            raise ModelError(
                f"non-finite logits at position {self.position}: token {worst} has {logits[worst]}"
            )
        ids, left = self._all, logits
        for extra in (self._bias, allowed):
            if extra is not None:
                left = left + extra
        if allowed is not None:
            ids, left = _compressed(ids, left)
        for name in self._chain:
            ids, left = self._apply(name, ids, left)
        if self.settings.temp == 0.0 and "temperature" in self._chain:
            return int(ids[filters.greedy(left)])
        place = filters.draw(left.astype(np.float64), self._random.random())
        if self._probabilities is not None:
            self._taken.add(float(self._probabilities[place]))
        if self.settings.mirostat:
            target, rate = self.settings.mirostat_ent, self.settings.mirostat_lr
            self._mu = mirostat.moved(self._mu, left, place, target=target, rate=rate)
        return int(ids[place])

    def _does_something(self, name: str) -> bool:
        s = self.settings
        if s.temp == 0.0 and name in _KEEP_THE_BEST and "temperature" in s.chain:
            return False
        return {
            "penalties": s.repeat_last_n != 0
            and (s.repeat_penalty, s.frequency_penalty, s.presence_penalty) != (1, 0, 0),
            "dry": s.dry_multiplier > 0 and s.dry_penalty_last_n != 0,
            "top_n_sigma": s.top_n_sigma > 0,
            "top_k": s.top_k > 0,
            "tfs_z": s.tfs_z < 1,
            "typical_p": s.typical_p < 1,
            "top_p": s.top_p < 1,
            "min_p": s.min_p > 0,
            "xtc": s.xtc_probability > 0 and s.xtc_threshold <= 0.5,
            "adaptive_p": s.adaptive_target >= 0 and (s.temp > 0 or "temperature" not in s.chain),
        }.get(name, True)

    def _apply(self, name: str, ids: TokenIds, logits: Logits) -> tuple[TokenIds, Logits]:
        s = self.settings
        match name:
            case "penalties":
                return ids, self._penalised(ids, logits)
            case "dry":
                return ids, self._dried(ids, logits)
            case "top_k":
                places = filters.top_k_ids(logits, s.top_k)
                return ids[places], logits[places].astype(np.float64)
            case "temperature" if s.dynatemp_range > 0:
                return ids, filters.dynamic_temperature(
                    logits, s.temp, s.dynatemp_range, s.dynatemp_exp
                )
            case "temperature":
                return ids, filters.temperature(logits, s.temp)
            case "xtc":
                if self._random.random() >= s.xtc_probability:
                    return ids, logits
                return _compressed(ids, filters.exclude_top(logits, s.xtc_threshold))
            case "adaptive_p":
                self._probabilities = filters.softmax(logits)
                wanted = adaptive.near(self._probabilities, self._taken.wanted)
                return ids, np.where(logits > -np.inf, wanted, -np.inf)
            case "mirostat" if s.mirostat == 1:
                return _compressed(ids, mirostat.cut_by_rank(logits, self._mu, self.n_vocab))
            case "mirostat":
                return _compressed(ids, mirostat.cut_by_surprise(logits, self._mu))
        return _compressed(ids, _CUTS[name](logits, getattr(s, name)))

    def _recent(self, last_n: int) -> TokenIds:
        first = 0 if last_n < 0 else max(0, self._n - last_n)
        return self._history[first : self._n]

    def _penalised(self, ids: TokenIds, logits: Logits) -> Logits:
        s = self.settings
        tokens, counts = np.unique(self._recent(s.repeat_last_n), return_counts=True)
        places, found = _places(ids, tokens)
        return penalise(
            logits,
            places,
            counts[found],
            repeat=s.repeat_penalty,
            frequency=s.frequency_penalty,
            presence=s.presence_penalty,
        )

    def _dried(self, ids: TokenIds, logits: Logits) -> Logits:
        s = self.settings
        history = self._recent(s.dry_penalty_last_n)
        since = tokens_since(self._breakers, self._pieces[self._n - len(history) : self._n])
        longest = min(since, s.dry_allowed_length + longest_exponent(s.dry_base))
        lengths = {
            token: length
            for token, length in repeats(history, longest).items()
            if length >= s.dry_allowed_length
            and not any(breaker in self._piece(token) for breaker in self._breakers)
        }
        if not lengths:
            return logits
        tokens = np.array(sorted(lengths))
        places, found = _places(ids, tokens)
        losses = dry_penalties(
            [lengths[t] for t in tokens.tolist()],
            s.dry_multiplier,
            s.dry_base,
            s.dry_allowed_length,
        )
        logits = logits.copy()
        logits[places] -= np.array(losses)[found]
        return logits


_CUTS: dict[str, Callable[[Logits, float], Logits]] = {
    "top_n_sigma": filters.top_n_sigma,
    "tfs_z": filters.tail_free,
    "typical_p": filters.typical_p,
    "top_p": filters.top_p,
    "min_p": filters.min_p,
}


def _bias(settings: SamplingSettings, n_vocab: int, end_ids: Collection[int]) -> Logits | None:
    if not settings.logit_bias and not (settings.ignore_eos and end_ids):
        return None
    bias = np.zeros(n_vocab, np.float32)
    for token, value in settings.logit_bias:
        if token >= n_vocab:
            raise UsageError(f"-l: token {token} is outside the vocabulary (0 to {n_vocab - 1})")
        bias[token] += value
    if settings.ignore_eos:
        bias[list(end_ids)] = -np.inf
    return bias


def _compressed(ids: TokenIds, logits: Logits) -> tuple[TokenIds, Logits]:
    """Without what was removed; at least one is left."""
    left = np.flatnonzero(logits > -np.inf)  # a mask itself would be slower to index with
    return ids[left], logits[left].astype(np.float64)


def _places(ids: TokenIds, tokens: TokenIds) -> tuple[TokenIds, TokenIds]:
    """Where these tokens (rising) are in ids (rising): places, and which tokens are there."""
    places = np.searchsorted(ids, tokens)
    found = np.flatnonzero(ids[np.minimum(places, ids.size - 1)] == tokens)
    return places[found], found
