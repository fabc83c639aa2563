"""Timing one kernel: launch tables that call it with one set of arguments after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codegen import job as job_layout
from codegen.jit import Jit
from codegen.kernel import KernelSpec
from codegen.pool import LAUNCH_WORDS, Pool, aligned_words
from mlacli.inside.kernel_data import Array

PASS_SECONDS = 3e-3  # runs of a few milliseconds, that another process is not likely to interrupt
_MOST_CALLS = 200
Arguments = dict[str, Array | int]


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


def launches(jit: Jit, spec: KernelSpec, calls: Sequence[Arguments]) -> Launches:
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
        made.table[i, :3] = address, table.ctypes.data, 1
        made.keep += [table, sizes, arguments]
    return made


def passes(
    jit: Jit,
    pool: Pool,
    spec: KernelSpec,
    arguments: Callable[[int], Arguments],
    n_threads: int,
    repeats: int,
) -> Iterator[tuple[Launches, int]]:
    """`repeats` launch tables and the calls in each; call number i has `arguments(i)`."""
    once = launches(jit, spec, [arguments(0)])
    seconds = min(once.seconds(pool, n_threads, time.perf_counter) for _ in range(2))
    calls = int(min(max(1.0, PASS_SECONDS / seconds), _MOST_CALLS))
    for first in range(1, 1 + repeats * calls, calls):
        yield launches(jit, spec, [arguments(first + i) for i in range(calls)]), calls
