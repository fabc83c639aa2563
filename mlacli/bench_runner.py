"""Runs one bench case on the engine, the way llama-bench does: random tokens, no sampling timed."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np

from codegen.jit import Jit
from codegen.pool import Pool
from mlacli.bench import BenchCase, BenchResult, ModelFacts
from mlacli.engine import Cancelled, Engine, Model
from mlacli.errors import Interrupted, SpaceError
from mlacli.loading import memory_notes, model_for
from mlacli.machine import Peaks, Roof, cpu_name, machine_profile, make_jit, mean_peaks
from mlacli.model.choose import PathChooser
from mlacli.profile import Profiles
from mlacli.profile_table import profile_lines
from mlacli.roofline import row_seconds
from mlacli.settings import RunSettings
from mlacli.signals import EXIT_OF_SIGNAL, stop_on_signals


@dataclass
class EngineRunner:
    """A `Runner`. Consecutive cases that only differ in their tests share an engine: it has room
    for the largest of them, if there is memory, and keeps its cache from depth to depth. `keeps`
    says how many engines live at once, for cases that take turns."""

    cases: Sequence[BenchCase]
    repetitions: int
    warmup: bool
    roof: bool
    verbose: bool = False
    profile: bool = False
    delay: float = 0.0  # seconds of rest before each test
    progress: Callable[[str], None] = lambda what: None  # told what comes next, never while timed
    keeps: int = 1
    _jit: Jit | None = None
    _pool: Pool | None = None
    _engines: dict[RunSettings, Engine] = field(default_factory=dict)
    _models: dict[tuple[object, ...], Model] = field(default_factory=dict)
    _memory: list[str] = field(default_factory=list)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the compiler and the threads had to say, and what came of -thp and -lm mlock."""
        jit, pool = self._jit.notes if self._jit else (), self._pool.notes if self._pool else ()
        return (*self._memory, *jit, *pool)

    def chooser(self, case: BenchCase) -> PathChooser:
        """What picks the path of a case's batches. Raises MlaError."""
        return self._engine_for(case.settings).chooser

    def __call__(self, case: BenchCase) -> BenchResult:
        """Run a case. Raises MlaError, and Interrupted on Ctrl-C."""
        engine = self._engine_for(case.settings)
        time.sleep(self.delay)
        with stop_on_signals(engine) as received:
            try:
                return self._measure(engine, case)
            except Cancelled as problem:
                raise Interrupted(EXIT_OF_SIGNAL[received[0]]) from problem

    def _measure(self, engine: Engine, case: BenchCase) -> BenchResult:
        what = _timed_part(case)
        if self.warmup:
            self._fill(engine, case, "warmup depth run")
            self.progress(f"warmup {what} run")
            self._once(engine, case)
        roof = self._roof(case) if self.roof or self.profile else None
        found = [roof.measure()] if roof else []
        profiles = Profiles() if self.profile else None
        samples, faults = [], 0
        for number in range(1, self.repetitions + 1):
            self._fill(engine, case, f"depth run {number}/{self.repetitions}")
            self.progress(f"{what} run {number}/{self.repetitions}")
            faults -= _major_faults()
            samples.append(self._once(engine, case, profiles))
            faults += _major_faults()
            found += [roof.measure()] if roof else []
        peaks = mean_peaks(found) if found else None
        when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return BenchResult(
            facts(engine.model),
            cpu_name(),
            when,
            tuple(map(sum, samples)),
            faults,
            self._limit(engine, case, peaks) if peaks and self.roof else None,
            self._profile(engine, case, profiles, samples, peaks) if peaks and profiles else (),
        )

    def _once(
        self, engine: Engine, case: BenchCase, profiles: Profiles | None = None
    ) -> tuple[int, int]:
        """The timed part: the prompt, then one token after another; nanoseconds of each."""
        at = case.n_depth + case.n_fill
        prompt, tokens = random_tokens(engine, case.n_prompt), random_tokens(engine, case.n_gen)
        engine.profile = profiles.prompt if profiles else None
        start = time.perf_counter_ns()
        if case.n_prompt:
            engine.eval(prompt, range(at, at + case.n_prompt))
        engine.profile = profiles.generation if profiles else None
        between = time.perf_counter_ns()
        for i, token in enumerate(tokens, at + case.n_prompt):
            engine.eval([token], [i])
        engine.profile = None
        return between - start, time.perf_counter_ns() - between

    def _fill(self, engine: Engine, case: BenchCase, name: str) -> None:
        """Exactly n_depth + n_fill tokens in the cache, keeping what is already there; `name` is
        told where there is something to do."""
        at = case.n_depth + case.n_fill
        if engine.cache.n_used > at:
            engine.cache.truncate(0, at)
        have = engine.cache.n_used
        if have < at:
            self.progress(name)
            engine.eval(random_tokens(engine, at - have), range(have, at))

    def _engine_for(self, settings: RunSettings) -> Engine:
        needed, kind = max(settings.n_ctx or 1, 1), replace(settings, n_ctx=0)
        if kind in self._engines and self._engines[kind].n_ctx >= needed:
            return self._engines[kind]
        self._engines.pop(kind, None)
        while len(self._engines) >= self.keeps:  # memory is free before the next one takes its own
            self._engines.pop(next(iter(self._engines)))
        self._jit = self._jit or make_jit()
        n_threads = max(settings.n_threads, settings.n_threads_batch)
        if self._pool is None or self._pool.n_threads < n_threads:
            if self._pool is not None:
                self._engines.clear()
                self._pool.close()
            self._pool = Pool(self._jit, n_threads)
        # A model keeps its -rtr copies: it is opened anew, without them, when -rtr changes.
        opened = (settings.model, settings.mmap, settings.mlock, settings.thp, settings.rtr)
        if opened not in self._models:
            self._models.clear()
            self._engines.clear()
            model = model_for(settings)
            self._models[opened] = model
        alike = (c.settings for c in self.cases if replace(c.settings, n_ctx=0) == kind)
        most = max([needed, *(other.n_ctx or 1 for other in alike)])
        try:
            engine = self._new_engine(self._models[opened], settings, most)
        except SpaceError:
            if most == needed:
                raise
            engine = self._new_engine(self._models[opened], settings, needed)
        self._engines[kind] = engine
        return engine

    def _new_engine(self, model: Model, settings: RunSettings, n_ctx: int) -> Engine:
        assert self._jit is not None and self._pool is not None
        self._pool.follow(settings.policy(batch=True))
        profile = machine_profile(self._jit, self._pool, settings)
        engine = Engine(model, settings, self._jit, profile, n_ctx=n_ctx, pool=self._pool)
        found = (line.removeprefix("note: ") for line in memory_notes(model, settings))
        self._memory += (line for line in found if line not in self._memory)
        return engine

    def _roof(self, case: BenchCase) -> Roof:
        assert self._jit is not None and self._pool is not None
        return Roof(self._jit, self._pool, case.n_threads)

    def _profile(
        self,
        engine: Engine,
        case: BenchCase,
        profiles: Profiles,
        samples: Sequence[tuple[int, int]],
        peaks: Peaks,
    ) -> tuple[str, ...]:
        """The tables of the timed parts that there were."""
        profiles.prompt.wall_ns, profiles.generation.wall_ns = map(sum, zip(*samples, strict=True))
        lines: list[str] = []
        for profile in (profiles.prompt, profiles.generation):
            lines += profile_lines(
                case.test, profile, engine.plan.layout, peaks, by_layer=self.verbose
            )
        return tuple(lines)

    def _limit(self, engine: Engine, case: BenchCase, peaks: Peaks) -> float:
        """Tokens per second at the limit."""
        seconds = row_seconds(
            engine.model.config,
            engine.model.weights,
            engine.plan.layout,
            case.settings,
            peaks,
            n_prompt=case.n_prompt,
            n_gen=case.n_gen,
            n_depth=case.n_depth + case.n_fill,
        )
        return case.n_timed / seconds


def _timed_part(case: BenchCase) -> str:
    return " and ".join(["prompt"] * bool(case.n_prompt) + ["generation"] * bool(case.n_gen))


def random_tokens(engine: Engine, n: int) -> Sequence[int]:
    """Random ids, as llama-bench takes them."""
    ids: list[int] = np.random.default_rng().integers(engine.model.config.n_vocab, size=n).tolist()
    return ids


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def facts(model: Model) -> ModelFacts:
    """llama-bench's description: architecture, size class and quantisation."""
    tensors = model.file.tensors.values()
    n_params = sum(math.prod(t.shape) for t in tensors)
    size = sum(t.nbytes for t in tensors)
    c = model.config
    billions = n_params / 1e9
    scale = f"{billions:.0f}B" if billions >= 1 else f"{n_params / 1e6:.0f}M"
    return ModelFacts(f"{c.arch} {scale} {c.file_type}", size, n_params)
