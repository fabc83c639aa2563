"""The worker pool: threads that live in one native loop and run whole steps.

A step is a table of launches (function, arguments, wait first?, what to ask for afterwards:
ahead.py), walked by every thread. Python
submits once per batch: it fills the job, and `submit` wakes the workers and is itself thread 0.
Workers spin for a while after a step (thread_policy.py: about 0.1 ms), then sleep in a futex
(elsewhere they keep yielding).

The pool's ticket word is `sequence << 10 | n_threads`: a worker learns from the one word both that
there is work and whether it takes part, so that a late riser never reads a half-written job.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from codegen import job as job_layout
from codegen.ahead import emit_ahead
from codegen.dtypes import i32, i64
from codegen.kernel import kernel
from codegen.thread_policy import DEFAULT_LOOKS, Rank, ThreadPolicy, idle_looks
from codegen.values import Value

if TYPE_CHECKING:
    from codegen.builder import Kernel
    from codegen.jit import Jit

# The words that hardly change share a cache line: spinning workers read nothing else.
TICKET, IDLE_LOOKS, SLEEPERS = 0, 1, job_layout.LINE_WORDS
POOL_WORDS = 2 * job_layout.LINE_WORDS
THREAD_BITS = 10
MAX_THREADS = (1 << THREAD_BITS) - 2
STOP = (1 << THREAD_BITS) - 1
BUSY_SPINS = 500
Records = npt.NDArray[np.int64]
LAUNCH_WORDS = 4  # addresses of function and arguments, 1 = barrier first, address of a walk or 0
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # private
_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}


def futex_number() -> int:
    """The futex system call's number here; 0 where there is none."""
    return _FUTEX_CALL.get(platform.machine(), 0) if sys.platform == "linux" else 0


def emit_step(k: Kernel, thread: Value) -> None:
    """Walk the launches; a cancelled step passes its barriers but runs nothing more.

    A launch whose inputs are incomplete is never run: whoever cut them short saw the cancel word,
    and so does everyone who meets that thread at the barrier between.
    """
    k.n_threads = k.job[job_layout.N_THREADS]  # anew for each job
    job_layout.emit_record(k, thread, 0)
    launches = k.load_pointer(k.job.at(job_layout.LAUNCHES), i64)
    with k.loop(0, k.job[job_layout.N_LAUNCHES]) as i:
        launch = launches.at(i * LAUNCH_WORDS)
        with k.when(launch[2].ne(0)):
            k.barrier()
        job_layout.emit_record(k, thread, i * 2 + 1)
        with k.when(k.cancelled().eq(0)):
            k.call_through(launch, k.load_pointer(launch.at(1), i64), k.job, thread)
        job_layout.emit_record(k, thread, i * 2 + 2)
        with k.when(launch[3].ne(0)):
            emit_ahead(k, thread, k.load_pointer(launch.at(3), i64))
    job_layout.emit_finish(k, thread)


@kernel()
def pool_worker(k: Kernel, *, futex: int) -> None:
    """Thread 1, 2, ...: wait for a ticket, run the step if invited, until told to stop."""
    ticket = k.args.at(TICKET)
    seen = k.var(k.const(0, i64))
    with k.repeat_while() as go_on:
        _wait_for_change(k, seen.get(), futex)
        seen.set(k.load_atomic(ticket))
        invited = seen.get() & STOP
        with k.when(invited.ne(STOP) & (k.thread < invited)):
            emit_step(k, k.thread)
        go_on(invited.ne(STOP))


def _wait_for_change(k: Kernel, seen: Value, futex: int) -> None:
    ticket, sleepers = k.args.at(TICKET), k.args.at(SLEEPERS)
    most = k.args.at(IDLE_LOOKS)
    looks = k.var(k.const(0, i64))
    with k.repeat_while() as go_on:
        k.target.pause(k)
        looks += 1
        with k.when(looks.get() > k.load_atomic(most)):
            if futex:
                k.fetch_add(sleepers, 1)
                zero = k.const(0, i64)
                wait = (k.const(futex, i64), ticket, k.const(_FUTEX_WAIT, i64), seen.to(i32), zero)
                k.call_external("syscall", *wait, varargs=True)
                k.fetch_add(sleepers, -1)
            else:
                k.call_external("sched_yield")
        go_on(k.load_atomic(ticket).eq(seen))


@kernel()
def pool_submit(k: Kernel, *, futex: int) -> None:
    """Run the job: publish the ticket, wake sleepers, be thread 0. `thread` is the new ticket."""
    k.job[job_layout.BARRIER_BASE] = k.load_atomic(k.job.at(job_layout.BARRIER))
    k.store_atomic(k.job.at(job_layout.FINISHED), 0)
    k.store_atomic(k.args.at(TICKET), k.thread)
    if futex:
        with k.when(k.load_atomic(k.args.at(SLEEPERS)) > 0):
            everyone = k.const(2**31 - 1, i64)
            wake = (k.const(futex, i64), k.args.at(TICKET), k.const(_FUTEX_WAKE, i64), everyone)
            k.call_external("syscall", *wake, varargs=True)
    with k.when((k.thread & STOP).ne(STOP)):
        emit_step(k, k.const(0, i64))


class Pool:
    """`n_threads` threads (the caller is one of them) that run launch tables.

    Not reentrant: one step at a time. `cancel()` may be called from anywhere. `notes` say what of a
    policy the system refused.
    """

    def __init__(self, jit: Jit, n_threads: int, policy: ThreadPolicy | None = None) -> None:
        if not 1 <= n_threads <= MAX_THREADS:
            raise ValueError(f"n_threads {n_threads} is not in 1..{MAX_THREADS}")
        self.n_threads, self.notes = n_threads, list[str]()
        self._jit = jit  # owns the code that the workers are in
        self._words = aligned_words(POOL_WORDS)
        self._job = aligned_words(job_layout.JOB_WORDS)
        self._cancel = aligned_words(job_layout.LINE_WORDS)
        self._job[job_layout.CANCEL] = self._cancel.ctypes.data
        futex = futex_number()
        self._submit = jit.function(pool_submit(futex=futex))
        worker = jit.function(pool_worker(futex=futex))
        self._sequence = 0
        self._lock = threading.Lock()
        self._policy = ThreadPolicy()
        self._looks = idle_looks(self._policy.poll)
        self._words[IDLE_LOOKS] = self._looks
        self._home: set[int] | None = None  # where the workers ran before they were placed
        self._ranks: dict[int, Rank] = {}  # by thread id: before a priority was given
        self._leaders: set[int] = set()  # ids of threads that were given it as thread 0
        self._threads = [
            threading.Thread(target=worker, args=(*self._addresses(), i), daemon=True)
            for i in range(1, n_threads)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)
        if policy is not None:
            self.follow(policy)

    def _addresses(self) -> tuple[int, int]:
        return self._words.ctypes.data, self._job.ctypes.data

    def thread_ids(self) -> list[int]:
        """The system's ids of threads 1, 2, ..."""
        return [thread.native_id or 0 for thread in self._threads]

    def follow(self, policy: ThreadPolicy) -> None:
        """From now on. Thread 0 is placed only while it runs a step, but keeps its priority until
        there is another one, or until `close`."""
        if policy is self._policy:
            return
        with self._lock:
            old, self._policy = self._policy, policy
            self._looks = idle_looks(policy.poll)
            self._words[IDLE_LOOKS] = self._looks
            if policy.cpus != old.cpus:
                if self._home is None:
                    self._home = os.sched_getaffinity(0)
                for i, thread_id in enumerate(self.thread_ids(), start=1):
                    self._place(thread_id, policy.cpus_of(i) or self._home)
            if policy.priority != old.priority:
                for thread_id in [*self.thread_ids(), *self._leaders]:
                    self._rank(thread_id)

    def _place(self, thread_id: int, cpus: frozenset[int] | set[int]) -> None:
        try:
            os.sched_setaffinity(thread_id, cpus)
        except OSError as problem:  # CPUs were taken away since the policy was made
            self._note(f"threads are not placed on CPUs {sorted(cpus)}: {problem.strerror}")

    def _rank(self, thread_id: int) -> None:
        priority = self._policy.priority
        try:
            before = self._ranks.setdefault(thread_id, Rank.of(thread_id))
            before.raised(priority).give(thread_id)
        except OSError as problem:
            self._note(
                f"--prio {priority}: the system refuses it ({problem.strerror}): "
                "it takes root, CAP_SYS_NICE, or limits as ulimit -e and -r set them"
            )

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def run(
        self, launches: npt.NDArray[np.int64], n_threads: int, records: Records | None = None
    ) -> bool:
        """Walk a launch table [n, LAUNCH_WORDS] with `n_threads` threads; False if cancelled.

        `records` (`record_table`) are filled with times. Raises RuntimeError when the pool is
        closed or too small, ValueError when the records are not for this table.
        """
        if records is not None and records.shape != (n_threads, 1 + 2 * len(launches)):
            raise ValueError(
                f"records {records.shape} of {n_threads} threads, {len(launches)} rows"
            )
        if not 1 <= n_threads <= self.n_threads or self._sequence < 0:
            raise RuntimeError(f"pool of {self.n_threads} threads cannot run {n_threads}")
        with self._lock:
            job, home = self._job, os.sched_getaffinity(0)
            job[job_layout.N_THREADS] = n_threads
            crowded = self._policy.is_crowded(n_threads, len(home))
            job[job_layout.SPINS] = 0 if crowded else BUSY_SPINS
            # a worker that never slept would be in the way
            self._words[IDLE_LOOKS] = min(self._looks, DEFAULT_LOOKS) if crowded else self._looks
            job[job_layout.N_LAUNCHES] = len(launches)
            job[job_layout.LAUNCHES] = launches.ctypes.data
            job[job_layout.RECORDS] = 0 if records is None else records.ctypes.data
            self._sequence += 1
            with self._as_thread_0(home):
                self._submit(*self._addresses(), self._sequence << THREAD_BITS | n_threads)
            return not self._cancel[0]

    @contextlib.contextmanager
    def _as_thread_0(self, home: set[int]) -> Iterator[None]:
        """The caller where thread 0 belongs. What it starts later inherits its CPUs: so it gets
        them all back."""
        if self._policy.priority and threading.get_native_id() not in self._leaders:
            self._leaders.add(threading.get_native_id())
            self._rank(threading.get_native_id())
        cpus = self._policy.cpus_of(0)
        if cpus is None or cpus == home:
            yield
            return
        self._place(0, cpus)
        try:
            yield
        finally:
            self._place(0, home)

    def cancel(self) -> None:
        """End the running step at its next tile; the word stays set until `clear_cancel`."""
        self._cancel[0] = 1

    def clear_cancel(self) -> None:
        self._cancel[0] = 0

    def close(self) -> None:
        """Let the workers return, and join them."""
        if self._sequence < 0:
            return
        self._submit(*self._addresses(), (self._sequence + 1) << THREAD_BITS | STOP)
        self._sequence = -1
        for thread in self._threads:
            thread.join()
        for thread in threading.enumerate():
            if before := self._ranks.get(thread.native_id or 0):
                with contextlib.suppress(OSError):  # whoever is not allowed to rise again
                    before.give(thread.native_id or 0)
        atexit.unregister(self.close)


def record_table(n_threads: int, n_launches: int) -> Records:
    """Room for the times of a step, in nanoseconds; the layout is that of job.py."""
    return np.zeros((n_threads, 1 + 2 * n_launches), np.int64)


def aligned_words(n: int) -> npt.NDArray[np.int64]:
    """n zeroed i64 words that start on a cache line."""
    raw = np.zeros(n + job_layout.LINE_WORDS, np.int64)
    skip = -raw.ctypes.data % (8 * job_layout.LINE_WORDS) // 8
    return raw[skip : skip + n]
