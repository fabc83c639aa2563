"""Speed along the context, as llama-sweep-bench measures it: a step is a batch, then the next."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from mlacli.bench_runner import random_tokens
from mlacli.engine import Engine
from mlacli.errors import UsageError
from mlacli.progress import Progress

COLUMNS = "|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |"
LINE = "|-------|--------|--------|----------|----------|----------|----------|"


@dataclass(frozen=True)
class Step:
    """Seconds for `pp` prompt tokens and for `tg` generated ones, both behind `n_kv` others."""

    pp: int
    tg: int
    n_kv: int
    t_pp: float
    t_tg: float

    @property
    def table_line(self) -> str:
        return (
            f"|{self.pp:6d} | {self.tg:6d} | {self.n_kv:6d} | {self.t_pp:8.3f} | "
            f"{self.pp / self.t_pp:8.2f} | {self.t_tg:8.3f} | {self.tg / self.t_tg:8.2f} |"
        )

    def json_line(self, engine: Engine) -> str:
        """The keys of llama-sweep-bench."""
        settings = engine.settings
        return json.dumps(
            {
                "n_kv_max": engine.n_ctx,
                "n_batch": settings.n_batch,
                "n_ubatch": settings.n_ubatch,
                "flash_attn": int(settings.flash_attn),
                "n_gpu_layers": 0,
                "n_threads": settings.n_threads,
                "n_threads_batch": settings.n_threads_batch,
                "pp": self.pp,
                "tg": self.tg,
                "n_kv": self.n_kv,
                "t_pp": round(self.t_pp, 6),
                "speed_pp": round(self.pp / self.t_pp, 6),
                "t_tg": round(self.t_tg, 6),
                "speed_tg": round(self.tg / self.t_tg, 6),
            }
        )


def head_line(engine: Engine) -> str:
    """llama-sweep-bench's first line."""
    s = engine.settings
    return (
        f"main: n_kv_max = {engine.n_ctx}, n_batch = {s.n_batch}, n_ubatch = {s.n_ubatch}, "
        f"flash_attn = {int(s.flash_attn)}, n_threads = {s.n_threads}, "
        f"n_threads_batch = {s.n_threads_batch}"
    )


def sweep(
    engine: Engine,
    n_gen: int,
    *,
    repetitions: int = 1,
    stride: int = 1,
    warmup: bool = False,
    progress: Progress | None = None,
) -> Iterator[Step]:
    """One micro-batch after another until the context is full; every `stride`-th one is measured.

    Tokens are generated first and forgotten again, then the batch is evaluated. The first step is
    repeated, and a mean given. `progress` is told tokens before each step.

    Raises UsageError when not even one step fits, Cancelled.
    """
    n_pp, n_ctx = engine.plan.n_tokens_max, engine.n_ctx
    if n_gen > n_ctx:
        raise UsageError(f"-n: {n_gen} is more than -c {n_ctx}")
    engine.cache.clear()
    if warmup:
        _prompt(engine, 0, n_pp)
        engine.cache.clear()
    for number, n_kv in enumerate(range(0, n_ctx - max(n_pp, n_gen) + 1, n_pp)):
        if progress:
            progress(n_kv, n_ctx)
        if number % stride:
            _prompt(engine, n_kv, n_pp)
            continue
        times = repetitions if number == 0 else 1
        t_tg = sum(_generation(engine, n_kv, n_gen) for _ in range(times)) / times
        t_pp = sum(_prompt(engine, n_kv, n_pp) for _ in range(times)) / times
        yield Step(n_pp, n_gen, n_kv, t_pp, t_tg)


def _prompt(engine: Engine, n_kv: int, n: int) -> float:
    engine.cache.truncate(0, n_kv)
    tokens, start = random_tokens(engine, n), time.perf_counter()
    engine.eval(tokens, range(n_kv, n_kv + n))
    return time.perf_counter() - start


def _generation(engine: Engine, n_kv: int, n: int) -> float:
    tokens, start = random_tokens(engine, n), time.perf_counter()
    for i, token in enumerate(tokens, n_kv):
        engine.eval([token], [i])
    seconds = time.perf_counter() - start
    engine.cache.truncate(0, n_kv)
    return seconds
