"""The words that a running step shares with its kernels, and the barrier over them.

A job is an array of i64 words. The barrier counter has a cache line of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import i64
from codegen.values import Pointer

if TYPE_CHECKING:
    from codegen.builder import Kernel

N_THREADS, CANCEL, SPINS, N_LAUNCHES, LAUNCHES, BARRIER_BASE = range(6)
LINE_WORDS = 8  # words per cache line
BARRIER = LINE_WORDS
JOB_WORDS = 2 * LINE_WORDS


def emit_barrier(k: Kernel) -> None:
    """Ticket barrier: the counter only grows; from BARRIER_BASE, its value when the step began, a
    round ends at each multiple of n_threads. It is never reset: a slow thread may still look at it.

    Waits by spinning SPINS times, then gives the core away after each look: with more threads
    than cores SPINS is 0, so that a waiting thread never holds up the one it waits for.
    """
    counter = k.job.at(BARRIER)
    base = k.job[BARRIER_BASE]
    ticket = k.fetch_add(counter, 1)
    goal = ((ticket - base) // k.n_threads + 1) * k.n_threads + base
    wait_until(k, counter, goal, k.job[SPINS])


def wait_until(k: Kernel, word: Pointer, goal: object, spins: object) -> None:
    """Return once `word` >= goal."""
    looks = k.var(k.const(0, i64))
    with k.repeat_while() as go_on:
        k.target.pause(k)
        looks += 1
        with k.when(looks.get() > k.const(spins, i64)):
            k.call_external("sched_yield")
        go_on(k.load_atomic(word) < k.const(goal, i64))
