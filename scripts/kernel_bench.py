"""How close does each matrix kernel come to what this machine can do?

    python scripts/kernel_bench.py                        # every case, 1 and 2 threads
    python scripts/kernel_bench.py --filter 'moe.*IQ4_NL' --threads 2
    python scripts/kernel_bench.py --smoke                # small shapes, for continuous integration

Shapes are DeepSeek-V2-Lite's. Kernels and the roof kernels (peak multiply-adds, memory read) take
turns, and the best of each counts: `limit` is the time that the roofs allow for the work, as a
percentage of the time taken. Weights are walked through, so that they come from memory, not from a
cache. Further kernels: add a maker to `MAKERS` and lines to `cases`.
"""

from __future__ import annotations

import argparse
import mmap
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))

from codegen import job as job_layout
from codegen.call import aligned_bytes
from codegen.formats import WEIGHT_FORMATS, BlockFormat
from codegen.jit import Jit, host_target
from codegen.kernel import KernelSpec
from codegen.kernels import matmul, moe, roof
from codegen.kernels.activations import row_bytes
from codegen.kernels.panel import panel_bytes
from codegen.pool import LAUNCH_WORDS, Pool, aligned_words
from codegen.targets.base import Target
from mlacli.gguf.quants import quantise

Array = NDArray[Any]

N_EXPERT, N_USED = 64, 6
# Runs of a few milliseconds, that another process is not likely to interrupt.
PEAK_ROUNDS, READ_BYTES, PASS_SECONDS = 200_000, 32 << 20, 3e-3
PATTERN_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """`pool_bytes` of weights are walked through; `shrink` divides numbers of rows and tokens."""

    threads: tuple[int, ...]
    repeats: int
    clock: Callable[[], float] = time.perf_counter
    pool_bytes: int = 768 << 20  # more than caches hold
    shrink: int = 1


@dataclass(frozen=True)
class Case:
    """A product to time: `maker` builds it from the other fields."""

    maker: str
    label: str
    fmt: BlockFormat
    n_rows: int
    n_cols: int
    n_tokens: int = 1
    n_mats: int = 1  # heads or experts

    @property
    def name(self) -> str:
        mats = f"{self.n_mats}x" if self.n_mats > 1 else ""
        shape = f"{mats}{self.n_rows}x{self.n_cols}"
        return f"{self.maker:15} {self.label:8} {self.fmt.name:6} {shape:13} t{self.n_tokens}"

    @property
    def matrix_bytes(self) -> int:
        return self.n_rows * self.fmt.row_bytes(self.n_cols)


@dataclass(frozen=True)
class Work:
    """A kernel, its arguments, and what it does; `weights` names the arguments that are moved
    through the pool, each of `weight_bytes`."""

    spec: KernelSpec
    arguments: dict[str, Array | int]
    weights: tuple[str, ...]
    weight_bytes: int
    multiply_adds: float
    read_bytes: float


# -- inputs ---------------------------------------------------------------------------------------


@cache
def pattern(fmt: BlockFormat) -> Array:
    """About a megabyte of valid blocks: random bytes would hold denormals and NaN."""
    blocks = PATTERN_BYTES // fmt.row_bytes(32)
    values = np.random.default_rng(0).normal(size=(blocks // 64, 32)).astype(np.float32)
    return np.tile(quantise(values, fmt).reshape(-1), 64)


def weight_pool(fmt: BlockFormat, nbytes: int) -> Array:
    """In small pages, as a mapped file has them."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    data = np.frombuffer(memory, np.uint8)
    part = pattern(fmt)
    for start in range(0, nbytes, part.nbytes):
        data[start : start + part.nbytes] = part[: nbytes - start]
    return data


def inputs(case: Case, n_rows: int) -> Array:
    """Activation rows of small numbers: a8, or f32 for float formats."""
    if not case.fmt.integer_dot:
        rows = aligned_bytes(4 * n_rows * case.n_cols)
        rows.view(np.float32)[:] = 0.5
        return rows
    n, pitch = case.n_cols, row_bytes(case.n_cols)
    rows = aligned_bytes(n_rows * pitch)
    shaped = rows.reshape(n_rows, pitch)
    shaped[:, :n] = np.arange(n) % 100
    shaped[:, n : n + n // 8].view(np.float32)[:] = 0.01
    return rows


def floats(*shape: int) -> Array:
    return aligned_bytes(4 * int(np.prod(shape))).view(np.float32).reshape(shape)


def scratch(case: Case, target: Target, n_threads: int) -> tuple[Array, int]:
    room = -(-panel_bytes(target, case.fmt, case.n_cols) // 64) * 64
    return aligned_bytes(room * n_threads), room


def routing(n_tokens: int) -> tuple[Array, Array, Array]:
    """(ids, offsets, order): tokens go to experts at random, all experts about equally often."""
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation(N_EXPERT)[:N_USED] for _ in range(n_tokens)]).astype(np.int32)
    order = np.argsort(ids.ravel(), kind="stable").astype(np.int32)
    counts = np.bincount(ids.ravel(), minlength=N_EXPERT)
    return ids, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), order


# -- kernels --------------------------------------------------------------------------------------


def products(case: Case, target: Target, n_threads: int) -> Work:
    """matvec or matmul, with or without heads."""
    x = inputs(case, case.n_tokens * case.n_mats)
    pitch = x.size // (case.n_tokens * case.n_mats)
    shape = matmul.Shape(
        n_rows=case.n_rows,
        n_cols=case.n_cols,
        n_heads=case.n_mats,
        w_pitch=case.matrix_bytes,
        x_token=case.n_mats * pitch,
        x_head=pitch,
        y_token=case.n_mats * case.n_rows,
        y_head=case.n_rows,
    )
    y = floats(case.n_tokens, case.n_mats, case.n_rows)
    arguments: dict[str, Array | int] = {"y": y, "w": 0, "x": x, "residual": 0}
    if case.maker == "matvec":
        spec = matmul.matvec(shape=shape, fmt=case.fmt)
    else:
        arguments["scratch"], room = scratch(case, target, n_threads)
        spec = matmul.matmul(shape=shape, fmt=case.fmt, scratch_bytes=room)
    arguments["n_tokens"] = case.n_tokens
    read = case.n_mats * case.matrix_bytes
    return Work(
        spec, arguments, ("w",), read,
        case.n_tokens * case.n_mats * case.n_rows * case.n_cols, read,
    )  # fmt: skip


def dense_gate(case: Case, target: Target, n_threads: int) -> Work:
    """up_gate or up_gate_vec."""
    y, x = floats(case.n_tokens, case.n_rows), inputs(case, case.n_tokens)
    sizes = {
        "n_rows": case.n_rows,
        "n_cols": case.n_cols,
        "fmt_gate": case.fmt,
        "fmt_up": case.fmt,
    }
    arguments: dict[str, Array | int] = {"y": y, "gate": 0, "up": 0, "x": x}
    if case.maker == "up_gate_vec":
        spec = moe.up_gate_vec(**sizes)
    else:
        arguments["scratch"], room = scratch(case, target, n_threads)
        spec = moe.up_gate(**sizes, scratch_bytes=room)
    arguments["n_tokens"] = case.n_tokens
    madds = 2 * case.n_tokens * case.n_rows * case.n_cols
    return Work(spec, arguments, ("gate", "up"), case.matrix_bytes, madds, 2 * case.matrix_bytes)


def experts(case: Case, target: Target, n_threads: int) -> Work:
    """The moe_ kernels. Of a stack, only the experts that are chosen are read."""
    ids, offsets, order = routing(case.n_tokens)
    few, gated = case.maker.endswith("_vec"), "up_gate" in case.maker
    n_slots, n_read = ids.size, len(np.unique(ids))
    by_token = few and "down" not in case.maker
    sizes: dict[str, Any] = {"n_rows": case.n_rows, "n_cols": case.n_cols}
    sizes |= {"fmt_gate": case.fmt, "fmt_up": case.fmt} if gated else {"fmt": case.fmt}
    down = "down" in case.maker
    y = floats(case.n_tokens if down else n_slots, case.n_rows)
    weights = ("gate", "up") if gated else ("w",)
    arguments: dict[str, Array | int] = {"y": y, **dict.fromkeys(weights, 0)}
    arguments["x"] = inputs(case, case.n_tokens if by_token else n_slots)
    if few:
        sizes["n_used"] = N_USED
        arguments["ids"] = ids
        if case.maker == "moe_matmul_vec":
            sizes["per_slot"] = False
    else:
        arguments["offsets"] = offsets
        sizes["n_expert"] = N_EXPERT
        if down:
            sizes["n_used"], arguments["order"] = N_USED, order
    if down:
        arguments["weights"] = np.full(ids.shape, 0.1, np.float32)
    if few:
        arguments["n_tokens"] = case.n_tokens
    else:
        arguments["scratch"], sizes["scratch_bytes"] = scratch(case, target, n_threads)
    spec = getattr(moe, case.maker)(**sizes)
    madds = len(weights) * n_slots * case.n_rows * case.n_cols
    read = len(weights) * n_read * case.matrix_bytes
    return Work(spec, arguments, weights, N_EXPERT * case.matrix_bytes, madds, read)


Maker = Callable[[Case, Target, int], Work]
MAKERS: dict[str, Maker] = {
    "matvec": products,
    "matmul": products,
    "up_gate": dense_gate,
    "up_gate_vec": dense_gate,
    **{f"moe_{name}": experts for name in ("up_gate", "matmul", "down")},
    **{f"moe_{name}_vec": experts for name in ("up_gate", "matmul", "down")},
}


def cases(shrink: int) -> Iterator[Case]:
    """The table: what is timed."""
    formats = [WEIGHT_FORMATS[name] for name in ("IQ4_NL", "Q8_0", "Q4_0", "F16", "F32")]
    few = [f for f in formats if f.is_quantised]

    def n(size: int) -> int:
        return max(size // shrink, 16)

    for fmt in formats:
        yield Case("matvec", "attn_q", fmt, n(3072), 2048)
        yield Case("matvec", "shexp", fmt, n(2048), 2816)
    for fmt in formats[:2]:
        yield Case("matvec", "attn_q", fmt, n(3072), 2048, 2)
        yield Case("matvec", "attn_q", fmt, n(3072), 2048, 4)
        yield Case("matvec", "output", fmt, n(102400), 2048)
        yield Case("matvec", "k_b", fmt, n(512), 128, 1, 16)
        yield Case("matvec", "v_b", fmt, n(128), 512, 1, 16)
    yield Case("matvec", "gate_inp", WEIGHT_FORMATS["F32"], 64, 2048)
    for fmt in few[:2]:
        yield Case("up_gate_vec", "dense", fmt, n(10944), 2048)
        yield Case("up_gate_vec", "shexp", fmt, n(2816), 2048)
        yield Case("moe_up_gate_vec", "exps", fmt, n(1408), 2048, 1, N_EXPERT)
        yield Case("moe_matmul_vec", "exps", fmt, n(1408), 2048, 1, N_EXPERT)
        yield Case("moe_down_vec", "exps", fmt, n(2048), 1408, 1, N_EXPERT)
    for fmt in formats:
        for tokens in (5, 16, 48, 512):
            yield Case("matmul", "shexp", fmt, n(2816), 2048, tokens)
    for fmt in few[:2]:
        yield Case("matmul", "k_b", fmt, n(512), 128, n(512), 16)
        yield Case("matmul", "v_b", fmt, n(128), 512, n(512), 16)
        yield Case("matmul", "kv_b", fmt, n(4096), 512, n(512))
        yield Case("up_gate", "shexp", fmt, n(2816), 2048, n(512))
        yield Case("moe_up_gate", "exps", fmt, n(1408), 2048, n(512), N_EXPERT)
        yield Case("moe_matmul", "exps", fmt, n(1408), 2048, n(512), N_EXPERT)
        yield Case("moe_down", "exps", fmt, n(2048), 1408, n(512), N_EXPERT)


# -- timing ---------------------------------------------------------------------------------------


@dataclass
class Launches:
    """A launch table with what it points to, and its tile counters, zeroed before each run."""

    table: Array
    counters: Array
    keep: list[Any] = field(default_factory=list)

    def seconds(self, pool: Pool, n_threads: int, clock: Callable[[], float]) -> float:
        self.counters[:] = 0
        start = clock()
        pool.run(self.table, n_threads)
        return clock() - start


def launches(jit: Jit, spec: KernelSpec, calls: Sequence[dict[str, Array | int]]) -> Launches:
    """One kernel, called with one set of arguments after another, a barrier before each."""
    address, n_counters = jit.load(spec)
    words = job_layout.LINE_WORDS * max(1, n_counters)
    made = Launches(
        np.zeros((len(calls), LAUNCH_WORDS), np.int64), aligned_words(words * len(calls))
    )
    for i, arguments in enumerate(calls):
        table, sizes = aligned_words(len(spec.params) + 1), np.zeros(len(spec.params), np.int64)
        for slot, (name, param) in enumerate(spec.params.items()):
            given = arguments[name]
            if isinstance(given, np.ndarray):
                table[slot] = given.ctypes.data
            elif param.kind == "dim":
                sizes[slot] = given
                table[slot] = sizes[slot:].ctypes.data
            else:
                table[slot] = given
        table[-1] = made.counters[i * words :].ctypes.data
        made.table[i] = (address, table.ctypes.data, 1)
        made.keep += [table, sizes, arguments]
    return made


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
        n_copies = data.nbytes // step

        def arguments(copy: int) -> dict[str, Array | int]:
            base = copy % n_copies * step
            moved: dict[str, Array | int] = {
                name: data[base + i * work.weight_bytes :] for i, name in enumerate(work.weights)
            }
            return work.arguments | moved

        once = launches(self.jit, work.spec, [arguments(0)])
        seconds = min(once.seconds(self.pool, n_threads, time.perf_counter) for _ in range(2))
        calls = int(min(max(1.0, PASS_SECONDS / seconds), 200.0))
        tables = [
            launches(self.jit, work.spec, [arguments(first + i) for i in range(calls)])
            for first in range(1, 1 + self.settings.repeats * calls, calls)
        ]
        return tables, calls

    def line(self, case: Case, n_threads: int) -> str:
        """Time a case and its roofs in turn."""
        work = MAKERS[case.maker](case, self.jit.target, n_threads)
        data = self.weights(case.fmt, work.weight_bytes * len(work.weights))
        tables, calls = self.passes(work, data, n_threads)
        unit = "int8" if case.fmt.is_quantised else "f32"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="code generation target (default: the best one here)")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, as 1,2")
    parser.add_argument("--filter", default="", help="regular expression that a line must match")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="small shapes, once")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time: for 1 thread, beside others"
    )
    given = parser.parse_args()
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
