"""Finding -t, -tb, -ub and --mla-threshold for a model on this machine, by measuring.

The values of a flag take turns, round after round, so that what else the machine does strikes all
of them alike. The default stays unless another value beats it by more than the noise: by `MARGIN`
in the median and in `MOST` of the rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlacli.bench import BenchCase, Runner, run_cases
from mlacli.cpu_count import available_cpus, default_threads
from mlacli.model.choose import PathChooser
from mlacli.sampling_settings import MAX_INT
from mlacli.settings import fitted

SHARES = {"t": 1, "tb": 1, "ub": 3, "mla-threshold": 3}  # of the time, by flag
MARGIN, MOST = 0.03, 0.8
MIN_ROUNDS, MAX_ROUNDS = 3, 10
NEVER = MAX_INT  # as a threshold
_PROBE_PROMPT, _PROBE_GEN = 64, 8
_MAX_PROMPT, _MAX_GEN = 2048, 64
_DEPTHS = (256, 4096)  # of the paths' tests: least and most
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Trial:
    """A value that was tried: seconds per token, round by round, and why it may have none."""

    value: int | None  # None: the paths are chosen as without a threshold
    seconds: Sequence[float]
    error: str = ""

    def gains(self, other: Trial) -> list[float]:
        """How many times as fast as another it was in each round."""
        return [theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=False)]


@dataclass(frozen=True)
class Tuned:
    """What came of a flag: `trials` of the default and others in the test of this name, and the
    paths' own times where they are what was measured."""

    name: str
    test: str
    default: int | None
    trials: Sequence[Trial]
    chosen: int | None
    reason: str
    paths: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def base(self) -> Trial | None:
        """The default's trial."""
        return next((trial for trial in self.trials if trial.value == self.default), None)

    @property
    def is_decided(self) -> bool:
        """Whether there was enough to choose by."""
        return self.base is not None and len(self.base.seconds) >= MIN_ROUNDS

    @property
    def flag(self) -> str:
        """The flag as it is typed."""
        return f"--{self.name}" if len(self.name) > 2 else f"-{self.name}"


def choose(default: int | None, trials: Sequence[Trial]) -> tuple[int | None, str]:
    """The value to take, and why."""
    base = next((trial for trial in trials if trial.value == default), None)
    n = min((len(trial.seconds) for trial in trials if not trial.error), default=0)
    if base is None or base.error or n < MIN_ROUNDS:
        return default, base.error if base and base.error else f"only {n} rounds: too little time"
    needed = math.ceil(MOST * n)
    best, gain = default, 1 + MARGIN
    for trial in trials:
        gains = trial.gains(base) if trial is not base and not trial.error else []
        middle = statistics.median(gains) if gains else 0.0
        if middle > gain and sum(g > 1 + MARGIN for g in gains) >= needed:
            best, gain = trial.value, middle
    if best == default:
        return default, f"no other is {MARGIN:.0%} faster in {needed} of {n} rounds"
    return best, f"{gain:.2f} times as fast as the default, in at least {needed} of {n} rounds"


def thread_counts(default: int, cpus: int) -> list[int]:
    """Those to try, most first: quarters of the default, and every CPU."""
    counts = {default, cpus, *(max(1, default * part // 4) for part in (1, 2, 3))}
    return sorted((n for n in counts if n <= cpus or n == default), reverse=True)


@dataclass
class Tuner:
    """Tunes flags one after another: what was chosen holds for those that follow.

    `given` are the settings that are not tuned; `chooser` tells what picks a case's paths.
    """

    given: Mapping[str, Any]
    runner: Runner
    chooser: Callable[[BenchCase], PathChooser]
    note: Callable[[str], None]
    seconds: float
    clock: Callable[[], float] = time.monotonic
    default_t: int = field(default_factory=default_threads)
    cpus: int = field(default_factory=available_cpus)
    _chosen: dict[str, Any] = field(default_factory=dict)

    def tune(self, names: Sequence[str]) -> list[Tuned]:
        """The flags of these names, in the order of SHARES. Raises ModelError, Interrupted."""
        self._end = self.clock() + self.seconds
        self._pp, self._tg = self._probe()
        stages = {
            "t": self._threads,
            "tb": self._threads_batch,
            "ub": self._ubatch,
            "mla-threshold": self._threshold,
        }
        wanted = [name for name in SHARES if name in names]
        found: list[Tuned] = []
        for i, name in enumerate(wanted):
            left = max(0.0, self._end - self.clock())
            share = SHARES[name] / sum(SHARES[n] for n in wanted[i:])
            self.note(f"tune: {name}: at most {left * share:.0f} s")
            found.append(stages[name](left * share))
        return found

    def _probe(self) -> tuple[float, float]:
        """Tokens per second of a short prompt and a short generation, to plan by."""
        rates = []
        for n_prompt, n_gen in ((_PROBE_PROMPT, 0), (0, _PROBE_GEN)):
            case = self._case(n_prompt, n_gen, n_ctx=_PROBE_PROMPT + _PROBE_GEN)
            rows = list(run_cases([case, case], self.runner))  # the first time all is new
            if rows[-1].result is None:
                self.note(f"tune: {case.test}: {rows[-1].error}")
            rates.append(rows[-1].avg_ts if rows[-1].result else 0.0)
        return rates[0], rates[1]

    def _case(
        self, n_prompt: int, n_gen: int, n_ctx: int = 0, depth: int = 0, **settings: Any
    ) -> BenchCase:
        size = n_ctx or depth + n_prompt + n_gen
        threads = {"n_threads": self.default_t, "n_threads_batch": self.default_t}
        every = threads | dict(self.given) | self._chosen | settings
        return BenchCase(fitted(**every, n_ctx=size), n_prompt, n_gen, depth)

    # -- the flags ----------------------------------------------------------------------------

    def _threads(self, seconds: float) -> Tuned:
        counts = thread_counts(self.default_t, self.cpus)
        n = _fit(seconds * self._tg / self._turns(counts), 4, _MAX_GEN)
        cases = {count: self._case(0, n, n_threads=count) for count in counts}
        return self._tuned("t", "n_threads", self.default_t, cases, seconds)

    def _threads_batch(self, seconds: float) -> Tuned:
        counts = thread_counts(self.default_t, self.cpus)
        n = _fit(seconds * self._pp / self._turns(counts), 32, 512)
        cases = {count: self._case(n, 0, n_threads_batch=count) for count in counts}
        return self._tuned("tb", "n_threads_batch", self.default_t, cases, seconds)

    def _ubatch(self, seconds: float) -> Tuned:
        """The sizes next to the default first, as many as there is time for."""
        default, most = self._case(1, 0).settings.n_ubatch, self.given.get("n_batch", _MAX_PROMPT)
        sizes = [default]
        for size in (default // 2, default * 2, default // 4, default * 4):
            tokens = max(*sizes, size) * (len(sizes) + 1)
            fits = tokens * (1 + MIN_ROUNDS) <= seconds * self._pp
            if 16 <= size <= min(most, _MAX_PROMPT) and fits:
                sizes.append(size)
        if len(sizes) == 1:
            return self._skipped("ub", default, 1.5 * default * (1 + MIN_ROUNDS) / self._rate)
        cases = {size: self._case(max(sizes), 0, n_ubatch=size) for size in sorted(sizes)}
        return self._tuned("ub", "n_ubatch", default, cases, seconds)

    def _threshold(self, seconds: float) -> Tuned:
        """Both paths of batches around the cost model's crossover, behind a filled cache."""
        if self._case(1, 0).settings.mla in (0, 1):
            return Tuned("mla-threshold", "", None, (), None, "-mla 0 and 1 have one path only")
        low, high = _DEPTHS
        depth = 1 << int(math.log2(_fit(0.1 * seconds * self._pp, low, high)))
        chooser = self.chooser(self._case(1, 0))
        sizes = batch_sizes(chooser.crossover, self._case(1, 0).settings.n_ubatch)
        tokens = 2 * (depth + sum(sizes) * (1 + MIN_ROUNDS))
        if tokens > seconds * self._pp:
            return self._skipped("mla-threshold", None, tokens / self._rate)
        paths = {"absorbed": NEVER, "expanded": 1}
        cases = {
            (path, n): self._case(n, 0, depth + max(sizes), depth, mla_threshold=threshold)
            for path, threshold in paths.items()
            for n in sizes
        }
        times, errors = self._rounds(cases, seconds)
        test = f"pp{','.join(map(str, sizes))} @ d{depth}"
        if errors:
            return Tuned("mla-threshold", test, None, (), None, next(iter(errors.values())))
        own = [chooser.path(n, depth + n) for n in sizes]
        trials = [Trial(None, mixed(times, sizes, own))]
        for first in (*sizes, NEVER):
            chosen = ["expanded" if n >= first else "absorbed" for n in sizes]
            trials.append(Trial(first, mixed(times, sizes, chosen)))
        shown = {f"{path} pp{n} @ d{depth}": times[path, n] for n in sizes for path in paths}
        value, reason = choose(None, trials)
        return Tuned("mla-threshold", test, None, trials, value, reason, shown)

    # -- measuring ----------------------------------------------------------------------------

    @property
    def _rate(self) -> float:
        return max(self._pp, 1e-9)

    def _turns(self, counts: Sequence[int]) -> float:
        """Enough rounds of all these thread counts, in turns of the default."""
        return (2 + MIN_ROUNDS) * sum(max(1, self.default_t / count) for count in counts)

    def _skipped(self, name: str, default: int | None, needed: float) -> Tuned:
        share = SHARES[name] / sum(SHARES.values())
        reason = f"too little time: alone it needs about --time {math.ceil(needed)}"
        if share < 1:
            reason += f" (with all others {math.ceil(needed / share)})"
        return Tuned(name, "", default, (), default, reason)

    def _tuned(
        self,
        name: str,
        setting: str,
        default: int,
        cases: Mapping[int, BenchCase],
        seconds: float,
    ) -> Tuned:
        times, errors = self._rounds(cases, seconds)
        trials = [Trial(value, times[value], errors.get(value, "")) for value in cases]
        chosen, reason = choose(default, trials)
        self._chosen[setting] = chosen
        return Tuned(name, next(iter(cases.values())).test, default, trials, chosen, reason)

    def _rounds(
        self, cases: Mapping[_Key, BenchCase], seconds: float
    ) -> tuple[dict[_Key, list[float]], dict[_Key, str]]:
        """Seconds per token of every case, round by round, and why cases cannot run.

        The first round is not kept: there everything is new. The order turns round from one to the
        next. A round that the time would not suffice for is not begun, or not kept.
        """
        end = min(self.clock() + seconds, self._end)
        found: dict[_Key, list[float]] = {key: [] for key in cases}
        errors: dict[_Key, str] = {}
        order, took = list(cases), 0.0
        for number in range(1 + MAX_ROUNDS):
            started, taken = self.clock(), {}
            if number and started + took > end:
                break
            for key in order:
                row = next(run_cases([cases[key]], self.runner))
                if row.result is None:
                    errors[key] = row.error
                else:
                    taken[key] = row.result.samples_ns[0] / 1e9 / row.case.n_timed
                if self.clock() > end and number:
                    break
            order = [key for key in reversed(order) if key not in errors]
            took = self.clock() - started
            if number and len(taken) == len(order):
                for key, time_taken in taken.items():
                    found[key].append(time_taken)
        return found, errors


def batch_sizes(crossover: int, n_ubatch: int) -> list[int]:
    """Batches around a crossover, of at least 4 tokens and at most a micro-batch."""
    middle = crossover if 8 <= crossover <= n_ubatch else min(128, n_ubatch)
    sizes = {middle // 4, middle // 2, middle, middle * 2, middle * 4}
    return sorted(n for n in sizes if 4 <= n <= n_ubatch)


def mixed(
    times: Mapping[tuple[str, int], Sequence[float]], sizes: Iterable[int], paths: Iterable[str]
) -> list[float]:
    """Of each round the mean time of batches that take these paths, each size over the median of
    its faster path: so every size counts as much."""
    found = []
    for n, path in zip(sizes, paths, strict=True):
        both = (times["absorbed", n], times["expanded", n])
        if not both[0] or not both[1]:
            return []
        best = min(map(statistics.median, both))
        found.append([seconds / best for seconds in times[path, n]])
    return [statistics.fmean(column) for column in zip(*found, strict=True)]


def _fit(number: float, low: int, high: int) -> int:
    return max(low, min(high, int(number)))
