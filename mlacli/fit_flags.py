"""`report --fit`: the largest context for so much memory, and the flags that make room for it.

Flags that were given stay. The others are lowered, quality first: again and again the first of
these steps that lets at least a sixteenth more context fit (or the first at all, while none fits):

    -ctk f16 -> q8_KV       half the cache
    -ub 512 -> 256 .. 32    smaller buffers, slower prompts
    -amb 256 -> 128 .. 8    smaller slices of K*Q, or chunks of expanded rows: slower prompts

None is taken once all of the wanted context fits.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlacli.context import plan_context
from mlacli.engine import Model
from mlacli.errors import SpaceError, UsageError
from mlacli.fit import CONTEXT_STEP, check_cache_rows, least_need, planned_memory
from mlacli.machine import this_target
from mlacli.settings import RunSettings
from mlacli.units import size_text

LEAST_UBATCH, LEAST_AMB = 32, 8
GAIN = 16  # a step must gain 1 / GAIN of the context
_GUESSES = 8  # before the search goes by halves


@dataclass(frozen=True)
class Step:
    """A flag that was lowered: its field and values, and the tokens that fitted before (0: none)
    and do now."""

    field: str
    before: Any
    after: Any
    n_before: int
    n_after: int


@dataclass(frozen=True)
class Fitted:
    """Settings whose context, of the `n_wanted` tokens, fits and cannot be longer."""

    settings: RunSettings
    n_wanted: int
    steps: tuple[Step, ...]


def fit_flags(
    model: Model,
    settings: RunSettings,
    given: Collection[str],
    limit: int,
    *,
    least: int = 1,
    with_weights: bool = False,
) -> Fitted:
    """The largest context up to -c (or what was trained) that `limit` bytes hold.

    `given` names the fields that must stay as they are; `with_weights` asks for room for the
    weights, too, so that they stay in memory once they are read. Raises SpaceError when fewer than
    `least` tokens fit, UsageError for a cache type that cannot work with this model.
    """
    check_cache_rows(model.config, settings)
    wanted = settings.n_ctx or model.config.n_ctx_train
    search = _Search(model, limit, wanted, with_weights)
    n, steps = search.largest(settings), list[Step]()
    while found := _first_gain(search, settings, n, _lower(model, settings, given)):
        field, value, after = found
        before = getattr(settings, field)
        steps.append(Step(field, before, value, search.tokens(n), search.tokens(after)))
        settings, n = _changed(settings, field, value), after
    if search.tokens(n) < max(1, least):
        raise SpaceError(search.refusal(settings, least))
    chosen = replace(settings, n_ctx=search.tokens(n))
    return Fitted(chosen, wanted, tuple(_joined(steps)))


def _first_gain(
    search: _Search, settings: RunSettings, n: int, changes: Iterator[tuple[str, int | str]]
) -> tuple[str, int | str, int] | None:
    """The first change that is worth it, and the steps of context that fit with it."""
    goal = n + max(1, n // GAIN)
    if goal > search.most:
        return None
    for field, value in changes:
        trial = _changed(settings, field, value)
        if search.fits(trial, goal):
            return field, value, search.largest(trial, goal)
        if not n:
            return field, value, 0
    return None


def _changed(settings: RunSettings, field: str, value: int | str) -> RunSettings:
    change: dict[str, Any] = {field: value}
    return replace(settings, **change)


def _lower(
    model: Model, settings: RunSettings, given: Collection[str]
) -> Iterator[tuple[str, int | str]]:
    """(field, lower value), in the order in which they are tried."""
    if "type_k" not in given and settings.type_k == "f16":
        with contextlib.suppress(UsageError):  # rows that its blocks do not divide: not tried
            check_cache_rows(model.config, replace(settings, type_k="q8_KV"))
            yield "type_k", "q8_KV"
    for field, least in (("n_ubatch", LEAST_UBATCH), ("amb_mib", LEAST_AMB)):
        value = getattr(settings, field) // 2
        while field not in given and value >= least:
            yield field, value
            value //= 2


def _joined(steps: Iterable[Step]) -> Iterator[Step]:
    """Steps of one field, one after another, as one."""
    for _, group in itertools.groupby(steps, lambda step: step.field):
        same = list(group)
        yield replace(same[0], after=same[-1].after, n_after=same[-1].n_after)


class _Search:
    """Contexts of 1, 2, .. `most` steps of 256 tokens (or one of fewer than 256, if no more are
    wanted), planned exactly as the engine does."""

    def __init__(self, model: Model, limit: int, wanted: int, with_weights: bool) -> None:
        self._model, self._limit, self._with_weights = model, limit, with_weights
        self._step = min(CONTEXT_STEP, wanted)
        self._target = this_target()
        self.most = wanted // self._step

    def tokens(self, n: int) -> int:
        return n * self._step

    def need(self, settings: RunSettings, n: int) -> int:
        """Bytes, exactly."""
        model, n_ctx = self._model, self.tokens(n)
        plan = plan_context(model.config, model.weights, settings, self._target, n_ctx=n_ctx)
        needed, weights = planned_memory(plan, settings, model.file.size_bytes)
        return needed + weights * self._with_weights

    def fits(self, settings: RunSettings, n: int) -> bool:
        return self.need(settings, n) <= self._limit

    def largest(self, settings: RunSettings, low: int = 0) -> int:
        """The largest n that fits, 0 if none does; `low` is known to.

        What is not in the estimate (buffers, derived weights) hardly depends on n, so that two or
        three plans are enough.
        """
        low, high, n, rounds = low, self.most + 1, self.most, 0
        while high - low > 1:
            need = self.need(settings, n)
            low, high = (n, high) if need <= self._limit else (low, n)
            rounds += 1
            rest = need - self._estimate(settings, n)
            guess = self._guess(settings, rest, low, high) if rounds < _GUESSES else 0
            n = guess or (low + high) // 2
        return low

    def _guess(self, settings: RunSettings, rest: int, low: int, high: int) -> int:
        """The largest n between two bounds that the estimate and `rest` bytes let fit."""
        low, high = low + 1, high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._estimate(settings, middle) + rest <= self._limit
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _estimate(self, settings: RunSettings, n: int) -> int:
        return least_need(self._model.config, settings, self.tokens(n)).total

    def refusal(self, settings: RunSettings, least: int) -> str:
        """Why nothing fits: what the least context takes with every flag as low as it goes."""
        n = max(1, -(-least // self._step))
        return (
            f"--fit: -c {self.tokens(n)} does not fit: it needs "
            f"{size_text(self.need(settings, n))} with -ctk {settings.type_k}, "
            f"-ub {settings.n_ubatch}, -amb {settings.amb_mib}; "
            f"{size_text(self._limit)} can be had"
        )
