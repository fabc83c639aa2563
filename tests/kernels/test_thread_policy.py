"""Threads on CPUs, with priorities, and how long they wait: asked of the system itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen.pool import Pool
from codegen.thread_policy import ALWAYS, DEFAULT_LOOKS, Rank, ThreadPolicy, idle_looks
from tests.conftest import TinyModel
from tests.engines import all_logits, make_engine, shared_pool
from tests.kernels.test_pool import Table, jit

HERE = frozenset(os.sched_getaffinity(0))
CPUS = sorted(HERE)
needs_two = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
LAST = CPUS[-1]


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(jit(), 3)
    yield made
    made.close()


def work(pool: Pool, n_threads: int = 3) -> None:
    table = Table(2, 5)
    assert pool.run(table.launches, n_threads)
    assert table.y[0] == 10


def ticks(thread_id: int) -> int:
    """CPU time of a thread so far, in clock ticks."""
    words = Path(f"/proc/self/task/{thread_id}/stat").read_text().rpartition(")")[2].split()
    return int(words[11]) + int(words[12])


@needs_two
def test_workers_are_placed_and_placed_anew(pool: Pool) -> None:
    ids = pool.thread_ids()
    assert [os.sched_getaffinity(i) for i in ids] == [HERE, HERE]
    pool.follow(ThreadPolicy((frozenset({CPUS[0]}), frozenset({LAST}))))
    assert [os.sched_getaffinity(i) for i in ids] == [{LAST}, {CPUS[0]}]
    work(pool)
    pool.follow(ThreadPolicy((frozenset({LAST}),)))
    assert [os.sched_getaffinity(i) for i in ids] == [{LAST}, {LAST}]
    pool.follow(ThreadPolicy())
    assert [os.sched_getaffinity(i) for i in ids] == [HERE, HERE]
    assert pool.notes == []


@needs_two
def test_thread_0_is_placed_while_it_runs(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = pool._submit

    def spy(*given: int) -> None:
        seen.append(os.sched_getaffinity(0))
        submit(*given)

    monkeypatch.setattr(pool, "_submit", spy)
    pool.follow(ThreadPolicy((frozenset({LAST}),)))
    work(pool)
    assert os.sched_getaffinity(0) == HERE
    pool.follow(ThreadPolicy())
    work(pool)
    assert seen == [{LAST}, HERE]


def test_cpus_that_are_not_there_are_noted(pool: Pool) -> None:
    pool.follow(ThreadPolicy((frozenset({4095}),)))
    work(pool)
    [note] = pool.notes
    assert note == "threads are not placed on CPUs [4095]: Invalid argument"
    assert os.sched_getaffinity(0) == HERE


@pytest.mark.parametrize(
    ("poll", "looks"),
    [
        (0, 0),
        (1, 2),
        (45, DEFAULT_LOOKS // 2),
        (50, DEFAULT_LOOKS),
        (60, 4 * DEFAULT_LOOKS),
        (100, ALWAYS),
    ],
)
def test_polling_levels(poll: int, looks: int) -> None:
    assert idle_looks(poll) == looks
    assert idle_looks(99) < ALWAYS


@pytest.mark.parametrize(("poll", "waits_awake"), [(0, False), (50, False), (100, True)])
def test_idle_workers(poll: int, waits_awake: bool) -> None:
    pool = Pool(jit(), 2, ThreadPolicy(poll=poll))
    try:
        work(pool, 2)
        [worker] = pool.thread_ids()
        time.sleep(0.05)
        before = ticks(worker)
        time.sleep(0.25)
        assert (ticks(worker) - before > 2) == waits_awake
        pool.follow(ThreadPolicy(poll=0))  # who waits awake learns of it, too
        time.sleep(0.05)
        before = ticks(worker)
        time.sleep(0.1)
        assert ticks(worker) - before <= 1
        work(pool, 2)
    finally:
        pool.close()


def test_threads_that_share_a_cpu_do_not_wait_awake_for_ever() -> None:
    pool = Pool(jit(), 2, ThreadPolicy((frozenset({LAST}),), poll=100))
    try:
        work(pool, 2)
        [worker] = pool.thread_ids()
        time.sleep(0.05)
        before = ticks(worker)
        time.sleep(0.1)
        assert ticks(worker) - before <= 1
    finally:
        pool.close()


def in_thread(action: Callable[[], None]) -> None:
    """On a thread of its own: a niceness that was raised may not be lowered again."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    if problems:
        raise problems[0]


def test_low_priority_is_given_to_every_thread(pool: Pool) -> None:
    before = Rank.of(0).niceness

    def check() -> None:
        pool.follow(ThreadPolicy(priority=-1))
        work(pool)
        ids = [*pool.thread_ids(), threading.get_native_id()]
        wanted = max(before, 5)
        assert [os.getpriority(os.PRIO_PROCESS, i) for i in ids] == [wanted] * 3
        assert pool.notes == []

    in_thread(check)
    assert Rank.of(0).niceness == before  # this thread never ran a step


@pytest.mark.parametrize("priority", [1, 3])
def test_what_the_system_refuses_is_noted_once(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, priority: int
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    pool.follow(ThreadPolicy(priority=priority))
    work(pool)
    [note] = pool.notes
    assert note.startswith(f"--prio {priority}: the system refuses it (Operation not permitted)")


def test_ranks() -> None:
    plain = Rank(os.SCHED_OTHER, 0, 0)
    assert plain.raised(0) == plain
    assert [plain.raised(p).niceness for p in (-1, 1, 2)] == [5, -5, -10]
    assert Rank(os.SCHED_OTHER, 0, 12).raised(-1).niceness == 12
    real = plain.raised(3)
    assert (real.scheduler, real.real_time) == (os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, 1)


def may_raise() -> bool:
    before = Rank.of(0)
    try:
        before.raised(3).give(0)
        before.raised(1).give(0)
        before.give(0)
    except OSError:
        return False
    return True


def test_priorities_are_given_and_taken_back(pool: Pool) -> None:
    def check() -> None:
        if not may_raise():
            pytest.skip("the system allows no higher priority")
        own, before = threading.get_native_id(), Rank.of(0)
        for priority, niceness in ((2, before.raised(2).niceness), (0, before.niceness)):
            pool.follow(ThreadPolicy(priority=priority))
            work(pool)
            for i in [*pool.thread_ids(), own]:
                assert os.getpriority(os.PRIO_PROCESS, i) == niceness
        pool.follow(ThreadPolicy(priority=3))
        work(pool)
        fifo = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        assert {os.sched_getscheduler(i) for i in [*pool.thread_ids(), own]} == {fifo}
        pool.close()
        assert Rank.of(0) == before

    in_thread(check)


def test_crowded() -> None:
    assert not ThreadPolicy().is_crowded(2, 2) and ThreadPolicy().is_crowded(3, 2)
    two = ThreadPolicy((frozenset({0, 1}), frozenset({2})))
    assert not two.is_crowded(3, 64) and two.is_crowded(4, 64)
    overlapping = ThreadPolicy((frozenset({0, 1}), frozenset({1, 0, 2})))
    assert overlapping.is_crowded(4, 64)


@needs_two
def test_placement_does_not_change_a_bit(tiny_model: TinyModel) -> None:
    path, runs = tiny_model("tiny-v3", "Q8_0"), []
    tokens = np.random.default_rng(3).integers(0, 4096, 150).tolist()
    last = 1 << LAST
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"cpu_mask": last},
        {"cpu_strict": True, "poll": 0},
        {"cpu_mask": 1 << CPUS[0], "cpu_mask_batch": last, "poll_batch": 100},
    )
    for flags in variants:
        engine = make_engine(path, mla=1, n_ubatch=64, n_threads=3, **flags)
        logits = all_logits(engine, tokens)
        where = [os.sched_getaffinity(i) for i in shared_pool().thread_ids()]
        runs.append(np.concatenate([logits, engine.eval([5], [len(tokens)])]))
        if "cpu_mask_batch" in flags:
            assert where == [{LAST}] * len(where)
            ids = shared_pool().thread_ids()
            assert {tuple(os.sched_getaffinity(i)) for i in ids} == {(CPUS[0],)}
    shared_pool().follow(ThreadPolicy())
    assert all(np.array_equal(run, runs[0]) for run in runs)
