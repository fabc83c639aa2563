"""The worker pool: launch tables, barriers and cancelling, with launches that do nothing else."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen.dtypes import i64
from codegen.jit import Jit
from codegen.kernel import dim, kernel, ptr
from codegen.pool import LAUNCH_WORDS, Pool, record_table
from codegen.values import Pointer, Value
from tests.kernels.harness import compiler, host_targets

if TYPE_CHECKING:
    from codegen.builder import Kernel

SECONDS = 20.0  # after which a pool counts as stuck


@kernel(y=ptr(i64), n=dim())
def count_meetings(k: Kernel, y: Pointer, n: Value) -> None:
    """n times: all threads meet, one adds 1 to y, all meet."""
    with k.loop(0, n):
        k.barrier()
        with k.when(k.thread.eq(0)):
            y[0] = y[0] + 1
        k.barrier()


def jit() -> Jit:
    return compiler(host_targets()[0])


@cache
def shared(n_threads: int) -> Pool:
    return Pool(jit(), n_threads)


@pytest.fixture(params=[1, 2, 3, 5])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    found = shared(request.param)
    yield found
    found.clear_cancel()


class Table:
    """`n_launches` launches of count_meetings on the same arguments, no barrier between them."""

    def __init__(self, n_launches: int, n_meetings: int) -> None:
        address, _ = jit().load(count_meetings())
        self.y, self.n = np.zeros(1, np.int64), np.array([n_meetings], np.int64)
        self.args = np.array([self.y.ctypes.data, self.n.ctypes.data, 0], np.int64)
        self.launches = np.zeros((n_launches, LAUNCH_WORDS), np.int64)
        self.launches[:, 0], self.launches[:, 1] = address, self.args.ctypes.data


def run_in_time(pool: Pool, launches: NDArray[np.int64], n_threads: int) -> bool:
    """pool.run on another thread, so that a pool that is stuck fails the test and not the run."""
    result: list[Any] = []
    thread = threading.Thread(
        target=lambda: result.append(pool.run(launches, n_threads)), daemon=True
    )
    thread.start()
    thread.join(SECONDS)
    assert result, f"{n_threads} threads are stuck in a step"
    return bool(result[0])


def test_threads_meet_inside_and_between_launches(pool: Pool) -> None:
    table = Table(20, 30)
    for n_threads in range(1, pool.n_threads + 1):
        table.y[0] = 0
        assert run_in_time(pool, table.launches, n_threads)
        assert table.y[0] == 20 * 30


def test_cancelled_while_threads_meet_inside_a_kernel(pool: Pool) -> None:
    """Some threads skip a launch that others are in: those must not wait for them for ever."""
    table, rng = Table(20_000, 1), random.Random(1)
    ended_early = 0
    for _ in range(40):
        table.y[0] = 0
        timer = threading.Timer(2e-3 * rng.random(), pool.cancel)
        timer.start()
        complete = run_in_time(pool, table.launches, pool.n_threads)
        timer.join()
        assert not complete or table.y[0] == len(table.launches)
        ended_early += not complete
        pool.clear_cancel()
    assert ended_early


def test_works_after_it_was_cancelled(pool: Pool) -> None:
    table = Table(20, 30)
    pool.cancel()
    assert not run_in_time(pool, table.launches, pool.n_threads)
    assert table.y[0] == 0
    pool.clear_cancel()
    assert run_in_time(pool, table.launches, pool.n_threads)
    assert table.y[0] == 20 * 30


def test_more_threads_than_there_are_is_refused() -> None:
    pool, table = shared(2), Table(1, 1)
    with pytest.raises(RuntimeError, match="pool of 2 threads cannot run 3"):
        pool.run(table.launches, 3)


def test_a_closed_pool_lets_its_threads_go() -> None:
    before = threading.active_count()
    pool = Pool(jit(), 3)
    assert threading.active_count() == before + 2
    time.sleep(0.01)  # asleep in the futex by now
    pool.close()
    pool.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="cannot run"):
        pool.run(Table(1, 1).launches, 1)


def test_a_step_records_when_each_launch_ran(pool: Pool) -> None:
    table = Table(20, 3)
    table.launches[::2, 2] = 1  # with a barrier first
    for n_threads in range(1, pool.n_threads + 1):
        records = record_table(n_threads, 20)
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        assert pool.run(table.launches, n_threads, records)
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        assert before <= records.min() and records.max() <= after
        assert (np.diff(records, axis=1) >= 0).all()
        starts, ends = records[:, 1::2], records[:, 2::2]
        assert (starts < ends).all()
        # nobody starts behind a barrier before everybody has ended what was before it
        assert (starts[:, 2::2].min(axis=0) >= ends[:, 1:-1:2].max(axis=0)).all()


def test_nothing_is_recorded_unasked(pool: Pool) -> None:
    table, records = Table(3, 1), record_table(pool.n_threads, 3)
    pool.run(table.launches, pool.n_threads, records)
    kept = records.copy()
    pool.run(table.launches, pool.n_threads)
    assert np.array_equal(records, kept)


def test_records_of_another_table_are_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="records"):
        pool.run(Table(3, 1).launches, pool.n_threads, record_table(pool.n_threads, 2))
