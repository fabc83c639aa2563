"""llama-bench's tests: the cross product of all flag values, and what running one gives.

The engine is plugged in as a `Runner`, so that everything here can be tested without a model.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlacli.errors import MlaError, ModelError, UsageError
from mlacli.settings import RunSettings, fitted

MAX_CASES = 10_000
# The settings that a bench can vary, outermost loop first.
AXES = (
    "n_batch",
    "n_ubatch",
    "type_k",
    "type_v",
    "flash_attn",
    "mla",
    "amb_mib",
    "ser",
    "mmap",
    "rtr",
    "thp",
    "fmoe",
    "n_threads",
    "numa",
    "cpu_mask",
    "cpu_strict",
    "prio",
    "poll",
)


@dataclass(frozen=True)
class BenchCase:
    """One row: `n_depth` + `n_fill` tokens lie in the cache, then the clock starts.

    `n_prompt` tokens are processed, then `n_gen` tokens generated one by one.
    """

    settings: RunSettings
    n_prompt: int
    n_gen: int
    n_depth: int = 0
    n_fill: int = 0  # the prompt of -gp, which is not timed

    @property
    def n_timed(self) -> int:
        return self.n_prompt + self.n_gen

    @property
    def n_threads(self) -> int:
        """Threads of what is timed; of a prompt with generation those of the generation."""
        return self.settings.n_threads if self.n_gen else self.settings.n_threads_batch

    @property
    def test(self) -> str:
        """llama-bench's name: pp512, tg128, pp512+tg128, tg32@pp512, with ` @ d4096`."""
        prompt, gen = f"pp{self.n_prompt}", f"tg{self.n_gen}"
        if self.n_fill:
            name = f"{gen}@pp{self.n_fill}"
        else:
            name = "+".join([prompt] * bool(self.n_prompt) + [gen] * bool(self.n_gen))
        return name + (f" @ d{self.n_depth}" if self.n_depth else "")


@dataclass(frozen=True)
class ModelFacts:
    """What a table says of a model; `size` is the bytes of its weights."""

    description: str
    size: int
    n_params: int


@dataclass(frozen=True)
class BenchResult:
    """What the engine measured; `limit_ts` is the row's limit in tokens/s (with --roof)."""

    model: ModelFacts
    cpu_info: str
    test_time: str  # RFC 3339, UTC
    samples_ns: tuple[int, ...]
    major_faults: int = 0
    limit_ts: float | None = None
    profile: tuple[str, ...] = ()  # lines (with --profile)


@dataclass(frozen=True)
class BenchRow:
    """A case with its result, or with the reason why there is none."""

    case: BenchCase
    result: BenchResult | None = None
    error: str = ""

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        samples = self.result.samples_ns if self.result else ()
        return [1e9 * self.case.n_timed / max(ns, 1) for ns in samples]

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return _deviation(self.samples_ts)

    @property
    def avg_ns(self) -> int:
        assert self.result is not None
        return round(statistics.fmean(self.result.samples_ns))

    @property
    def stddev_ns(self) -> int:
        assert self.result is not None
        return round(_deviation(self.result.samples_ns))

    @property
    def limit_percent(self) -> float | None:
        """The rate as a percentage of the machine's limit for this row."""
        if self.result is None or not self.result.limit_ts:
            return None
        return 100 * self.avg_ts / self.result.limit_ts


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


Runner = Callable[[BenchCase], BenchResult]


@dataclass(frozen=True)
class Grid:
    """All values of all flags. A size of 0 leaves that kind of test out."""

    models: tuple[Path, ...]
    # By name, those of AXES. A value that is a mapping sets several settings together.
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    n_prompt: tuple[int, ...] = (512,)
    n_gen: tuple[int, ...] = (128,)
    prompt_gen: tuple[tuple[int, int], ...] = ()  # -pg: one time over both
    fill_gen: tuple[tuple[int, int], ...] = ()  # -gp: prompt untimed
    n_depth: tuple[int, ...] = (0,)


def cases(grid: Grid) -> list[BenchCase]:
    """The cross product, in llama-bench's order. Raises UsageError when it is empty or absurd."""
    names = [name for name in AXES if grid.axes.get(name)]
    choices = [grid.axes[name] for name in names]
    tests = _tests(grid)
    combinations = len(grid.models) * len(grid.n_depth) * len(tests)
    for values in choices:
        combinations *= len(values)
    if not combinations:
        raise UsageError("-p, -n, -pg, -gp: all are 0, so there is nothing to run")
    if combinations > MAX_CASES:
        raise UsageError(f"{combinations} combinations of flags are too many ({MAX_CASES})")
    found = []
    for model, *values in itertools.product(grid.models, *choices):
        chosen: dict[str, Any] = {}
        for name, value in zip(names, values, strict=True):
            chosen |= value if isinstance(value, Mapping) else {name: value}
        for depth, test in itertools.product(grid.n_depth, tests):
            found.append(_case(model, chosen, depth, test))
    return found


def _tests(grid: Grid) -> list[tuple[int, int, int]]:
    """(prompt, generated, untimed prompt) of each test: all -p, all -n, all -pg, all -gp."""
    tests = [(prompt, 0, 0) for prompt in grid.n_prompt]
    tests += [(0, gen, 0) for gen in grid.n_gen]
    tests += [(prompt, gen, 0) for prompt, gen in grid.prompt_gen]
    tests += [(0, gen, fill) for fill, gen in grid.fill_gen if gen]
    return [test for test in tests if test[0] or test[1]]


def _case(
    model: Path, chosen: Mapping[str, Any], depth: int, test: tuple[int, int, int]
) -> BenchCase:
    n_prompt, n_gen, n_fill = test
    n_ctx = depth + n_fill + n_prompt + n_gen
    settings = fitted(**chosen, model=model, n_ctx=n_ctx)
    return BenchCase(settings, n_prompt, n_gen, depth, n_fill)


def run_cases(cases: Iterable[BenchCase], runner: Runner) -> Iterator[BenchRow]:
    """Each case with its result. A case that cannot run is a row with the reason.

    Raises ModelError: a file that cannot be used has no rows.
    """
    for case in cases:
        try:
            yield BenchRow(case, runner(case))
        except ModelError:
            raise
        except MlaError as problem:
            yield BenchRow(case, error=str(problem))
        except MemoryError:
            yield BenchRow(case, error="out of memory")
