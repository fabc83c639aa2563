"""Speed along the context, as llama-sweep-bench measures it: a step is a batch, then the next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from mlacli.bench_runner import random_tokens
from mlacli.engine import Engine
from mlacli.errors import UsageError
from mlacli.memory import MIB, peak_memory
from mlacli.progress import Progress

_COLUMNS = "|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |"
_LINE = "|-------|--------|--------|----------|----------|----------|----------|"
_MEMORY_COLUMNS = "    RSS HWM | VRAM delta |"
_MEMORY_LINE = "------------|------------|"


@dataclass(frozen=True)
class Step:
    """Seconds for `pp` prompt tokens and for `tg` generated ones, both behind `n_kv` others.

    `rss_mib` is the most memory that the process has held, where that is to be shown.
    """

    pp: int
    tg: int
    n_kv: int
    t_pp: float
    t_tg: float
    rss_mib: float | None = None

    @property
    def table_line(self) -> str:
        memory = "" if self.rss_mib is None else f" {self.rss_mib:10.1f} | {'n/a':>10} |"
        return (
            f"|{self.pp:6d} | {self.tg:6d} | {self.n_kv:6d} | {self.t_pp:8.3f} | "
            f"{self.pp / self.t_pp:8.2f} | {self.t_tg:8.3f} | {self.tg / self.t_tg:8.2f} |{memory}"
        )

    def json_line(self, engine: Engine) -> str:
        """The keys of llama-sweep-bench, its numbers of digits, and its spaces."""
        s = engine.settings
        memory = ""
        if self.rss_mib is not None:
            memory = f', "rss_hwm_mib": {self.rss_mib:.3f}, "vram_delta_mib": null'
        return (
            f'{{"n_kv_max": {engine.n_ctx}, "n_batch": {s.n_batch}, "n_ubatch": {s.n_ubatch}, '
            f'"flash_attn": {int(s.flash_attn)}, "n_gpu_layers": 0, '
            f'"n_threads": {s.n_threads}, "n_threads_batch": {s.n_threads_batch}, '
            f'"pp": {self.pp}, "tg": {self.tg}, "n_kv": {self.n_kv}, '
            f'"t_pp": {self.t_pp:f}, "speed_pp": {self.pp / self.t_pp:f}, '
            f'"t_tg": {self.t_tg:f}, "speed_tg": {self.tg / self.t_tg:f}{memory} }}'
        )


def head(engine: Engine, memory: bool = False) -> str:
    """llama-sweep-bench's lines above its first step."""
    s = engine.settings
    main = (
        f"main: n_kv_max = {engine.n_ctx}, n_batch = {s.n_batch}, n_ubatch = {s.n_ubatch}, "
        f"flash_attn = {int(s.flash_attn)}, n_gpu_layers = 0, n_threads = {s.n_threads}, "
        f"n_threads_batch = {s.n_threads_batch}"
    )
    columns = _COLUMNS + _MEMORY_COLUMNS * memory
    return "\n".join([main, "", columns, _LINE + _MEMORY_LINE * memory]) + "\n"


def check_room(n_gen: int, n_ctx: int) -> None:
    """Raise UsageError when not even one step fits."""
    if n_gen > n_ctx:
        raise UsageError(f"-n: {n_gen} is more than -c {n_ctx}")


def sweep(
    engine: Engine,
    n_gen: int,
    *,
    repetitions: int = 1,
    stride: int = 1,
    warmup: bool = False,
    progress: Progress | None = None,
    memory: bool = False,
) -> Iterator[Step]:
    """One micro-batch after another until the context is full; every `stride`-th one is measured.

    Tokens are generated first and forgotten again, then the batch is evaluated. The first step is
    repeated, and a mean given. `progress` is told tokens before each step.

    Raises UsageError when not even one step fits, Cancelled.
    """
    n_pp, n_ctx = engine.plan.n_tokens_max, engine.n_ctx
    check_room(n_gen, n_ctx)
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
        yield Step(n_pp, n_gen, n_kv, t_pp, t_tg, peak_memory()[0] / MIB if memory else None)


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
