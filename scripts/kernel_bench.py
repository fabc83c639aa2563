"""How close does each kernel with much to compute come to what this machine can do?

    python scripts/kernel_bench.py                        # every case, 1 and 2 threads
    python scripts/kernel_bench.py --filter 'moe.*IQ4_NL' --threads 2
    python scripts/kernel_bench.py --smoke                # small shapes, for continuous integration

The cases are those of scripts/kernel_work.py. Kernels and the roof kernels (peak multiply-adds,
memory read) take turns, and the best of each counts: the time that the roofs allow for the work is
shown as a percentage of the time taken. Weights are walked through, so that they come from memory,
not from a cache.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from codegen.call import aligned_bytes
from codegen.formats import BlockFormat
from codegen.jit import Jit, host_target
from codegen.kernels import roof
from codegen.pool import Pool
from mlacli.inside.kernel_data import Array, floats, weight_pool
from mlacli.inside.kernel_time import Launches, launches, passes
from scripts.kernel_work import MAKERS, Case, Work, cases

PEAK_ROUNDS, READ_BYTES = 200_000, 32 << 20


@dataclass(frozen=True)
class Settings:
    """`pool_bytes` of weights are walked through; `shrink` divides numbers of rows and tokens."""

    threads: tuple[int, ...]
    repeats: int
    clock: Callable[[], float] = time.perf_counter
    pool_bytes: int = 768 << 20  # more than caches hold
    shrink: int = 1


@dataclass(frozen=True)
class Bench:
    """Runs cases and the roof kernels on one target."""

    jit: Jit
    pool: Pool
    settings: Settings
    pools: dict[str, Array] = field(default_factory=dict)

    def weights(self, fmt: BlockFormat, at_least: int = 0) -> Array:
        known = self.pools.get(fmt.name)
        if known is None or known.nbytes < at_least:
            self.pools.clear()  # one format at a time
            known = weight_pool(fmt, max(at_least, self.settings.pool_bytes))
            self.pools[fmt.name] = known
        return known

    def peak(self, what: str, n_threads: int) -> tuple[Launches, float]:
        """A roof kernel and the multiply-adds of one run."""
        target = self.jit.target
        out, seed = floats(64 * n_threads), aligned_bytes(256)
        spec = roof.peak(what=what)
        rounds = PEAK_ROUNDS // self.settings.shrink
        made = launches(self.jit, spec, [{"out": out, "seed": seed, "rounds": rounds}])
        per_round = roof.multiply_adds(what, target.lanes, target.registers)
        return made, n_threads * rounds * per_round

    def reading(self, data: Array, n_threads: int) -> list[Launches]:
        """Reads of one part of the data after another."""
        spec, made = roof.read_memory(), []
        for start in range(0, self.settings.pool_bytes, READ_BYTES):
            arguments: dict[str, Array | int] = {"data": data[start:], "n_bytes": READ_BYTES}
            made.append(launches(self.jit, spec, [arguments | {"out": floats(64 * n_threads)}]))
        return made

    def passes(self, work: Work, data: Array, n_threads: int) -> tuple[list[Launches], int]:
        """Launch tables that walk through the weight pool, and the calls in each."""
        step = work.weight_bytes * len(work.weights)
        n_copies = data.nbytes // max(step, 1)

        def arguments(copy: int) -> dict[str, Array | int]:
            base = copy % n_copies * step
            moved: dict[str, Array | int] = {
                name: data[base + i * work.weight_bytes :] for i, name in enumerate(work.weights)
            }
            turn = {name: given[copy % len(given)] for name, given in work.in_turn.items()}
            return work.arguments | moved | turn

        made = passes(self.jit, self.pool, work.spec, arguments, n_threads, self.settings.repeats)
        tables, calls = zip(*made, strict=True)
        return list(tables), calls[0]

    def line(self, case: Case, n_threads: int) -> str:
        """Time a case and its roofs in turn."""
        work = MAKERS[case.maker](case, self.jit.target, n_threads)
        data = self.weights(case.fmt, work.weight_bytes * len(work.weights))
        tables, calls = self.passes(work, data, n_threads)
        unit = work.unit or ("int8" if case.fmt.is_quantised else "f32")
        peak, peak_madds = self.peak(unit, n_threads)
        reading = self.reading(data, n_threads)

        def best(made: Sequence[Launches]) -> float:
            return min(m.seconds(self.pool, n_threads, self.settings.clock) for m in made)

        rounds = [
            (best([peak]), best([reading[i % len(reading)]]), best([table]))
            for i, table in enumerate(tables)
        ]
        shortest = [min(column) for column in zip(*rounds, strict=True)]
        peak_rate, bandwidth = peak_madds / shortest[0], READ_BYTES / shortest[1]
        return report(case, n_threads, work, peak_rate, bandwidth, shortest[2] / calls)


def report(
    case: Case, n_threads: int, work: Work, peak_rate: float, bandwidth: float, seconds: float
) -> str:
    """One line; rates in multiply-adds and bytes per second."""
    limits = {"compute": work.multiply_adds / peak_rate, "read": work.read_bytes / bandwidth}
    bound = max(limits, key=lambda name: limits[name])
    return (
        f"{case.name:52} {n_threads:3} {seconds * 1e6:10.1f} us"
        f" {2e-12 * work.multiply_adds / seconds:7.3f} TOP/s"
        f" {1e-9 * work.read_bytes / seconds:6.1f} GB/s"
        f"  {100 * limits[bound] / seconds:5.1f} % of {bound:7}"
        f" ({2e-12 * peak_rate:.2f} TOP/s, {1e-9 * bandwidth:.1f} GB/s)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="code generation target (default: the best one here)")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, as 1,2")
    parser.add_argument("--filter", default="", help="regular expression that a line must match")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="small shapes, once")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time: for 1 thread, beside others"
    )
    given = parser.parse_args(arguments)
    threads = tuple(int(n) for n in given.threads.split(","))
    if given.cpu_time and threads != (1,):
        parser.error("--cpu-time counts one thread only: add --threads 1")
    clock = time.thread_time if given.cpu_time else time.perf_counter
    settings = Settings(threads, given.repeats, clock)
    if given.smoke:
        settings = Settings(threads, 1, clock, pool_bytes=READ_BYTES, shrink=16)
    jit = Jit(host_target(given.target))
    pool = Pool(jit, max(threads))
    bench = Bench(jit, pool, settings)
    print(f"target {jit.target.name}")
    for case in cases(settings.shrink):
        if re.search(given.filter, case.name):
            for n_threads in threads:
                print(bench.line(case, n_threads), flush=True)
    pool.close()


if __name__ == "__main__":
    main()
