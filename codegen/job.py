"""The words that a running step shares with its kernels, and how its threads wait for one another.

A job is an array of i64 words. The barrier counter and that of the threads that have finished the
step have a cache line each.

RECORDS is 0, or the address of an i64 table [n_threads][1 + 2 n_launches]: the nanosecond at which
each thread began the step, and for each launch when it could start, behind its barrier, and ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from codegen.dtypes import i32, i64
from codegen.values import Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

N_THREADS, CANCEL, SPINS, N_LAUNCHES, LAUNCHES, BARRIER_BASE, RECORDS = range(7)
LINE_WORDS = 8  # words per cache line
BARRIER, FINISHED = LINE_WORDS, 2 * LINE_WORDS
JOB_WORDS = 3 * LINE_WORDS


def emit_barrier(k: Kernel) -> None:
    """Ticket barrier: the counter only grows; from BARRIER_BASE, its value when the step began, a
    round ends at each multiple of n_threads. It is never reset: a slow thread may still look at it.

    Nobody waits in a cancelled step: its threads skip kernels from where each of them notices, so
    that they no longer come to the same barriers.
    """
    counter = k.job.at(BARRIER)
    base = k.job[BARRIER_BASE]
    ticket = k.fetch_add(counter, 1)
    goal = ((ticket - base) // k.n_threads + 1) * k.n_threads + base
    wait_while(k, lambda: (k.load_atomic(counter) < goal) & k.cancelled().eq(0))


def emit_finish(k: Kernel, thread: Value) -> None:
    """The end of a step, cancelled or not: thread 0 goes on when no other is in it any more."""
    counter = k.job.at(FINISHED)
    k.fetch_add(counter, 1)
    with k.when(thread.eq(0)):
        wait_while(k, lambda: k.load_atomic(counter) < k.n_threads)


def wait_while(k: Kernel, condition: Callable[[], Value]) -> None:
    """Spin SPINS times, then give the core away after each look: with more threads than cores SPINS
    is 0, so that a waiting thread never holds up the one it waits for."""
    looks, spins = k.var(k.const(0, i64)), k.job[SPINS]
    with k.repeat_while() as go_on:
        k.target.pause(k)
        looks += 1
        with k.when(looks.get() > spins):
            k.call_external("sched_yield")
        go_on(condition())


def emit_record(k: Kernel, thread: Value, place: Value | int) -> None:
    """Write the time into the thread's row of the records, if the step has any."""
    with k.when(k.job[RECORDS].ne(0)):
        width = k.job[N_LAUNCHES] * 2 + 1
        k.load_pointer(k.job.at(RECORDS), i64).at(thread * width)[place] = nanoseconds(k)


def nanoseconds(k: Kernel) -> Value:
    """The system's monotonic clock, which all threads share."""
    now = k.stack(i64, 2)  # a timespec: seconds, nanoseconds
    k.call_external("clock_gettime", k.const(time.CLOCK_MONOTONIC, i32), now)
    return now[0] * 10**9 + now[1]
