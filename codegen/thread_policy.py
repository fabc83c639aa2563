"""How the threads of a pool sit on the machine: CPUs, priority, and how long they wait awake."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

DEFAULT_POLL = 50
DEFAULT_LOOKS = 2000  # at DEFAULT_POLL: about 0.1 ms
ALWAYS = 2**62
REAL_TIME = 3
_NICENESS = {-1: 5, 1: -5, 2: -10}


def idle_looks(poll: int) -> int:
    """How often a worker looks for work before it sleeps: 0 for 0, twice as often every 5, 100
    never sleeps."""
    if poll in (0, 100):
        return ALWAYS if poll else 0
    return round(DEFAULT_LOOKS * 2 ** ((poll - DEFAULT_POLL) / 5))


@dataclass(frozen=True)
class ThreadPolicy:
    """Thread i may run on cpus[i % len(cpus)]; on any CPU where there are none.

    `poll` is 0 to 100 (`idle_looks`), `priority` -1 (below others) to 3 (real time), 0: as it is.
    """

    cpus: tuple[frozenset[int], ...] = ()
    poll: int = DEFAULT_POLL
    priority: int = 0

    def cpus_of(self, thread: int) -> frozenset[int] | None:
        """Where a thread may run; None: wherever the process may."""
        return self.cpus[thread % len(self.cpus)] if self.cpus else None

    def is_crowded(self, n_threads: int, n_available: int) -> bool:
        """Whether some threads must share a CPU, on a machine with so many available."""
        if not self.cpus:
            return n_threads > n_available
        threads = Counter(self.cpus[i % len(self.cpus)] for i in range(n_threads))
        every = frozenset().union(*threads)
        return n_threads > len(every) or any(n > len(cpus) for cpus, n in threads.items())


@dataclass(frozen=True)
class Rank:
    """A thread's scheduling as the system has it."""

    scheduler: int
    real_time: int
    niceness: int

    @classmethod
    def of(cls, thread_id: int) -> Rank:
        """Raises OSError when there is no such thread."""
        return cls(
            os.sched_getscheduler(thread_id),
            os.sched_getparam(thread_id).sched_priority,
            os.getpriority(os.PRIO_PROCESS, thread_id),
        )

    def give(self, thread_id: int) -> None:
        """Raises OSError (PermissionError) when the system refuses."""
        os.sched_setscheduler(thread_id, self.scheduler, os.sched_param(self.real_time))
        os.setpriority(os.PRIO_PROCESS, thread_id, self.niceness)

    def raised(self, priority: int) -> Rank:
        """This rank with a priority of ThreadPolicy's. A process that is nicer than `-1` makes it
        stays so; what real-time threads start is not real-time."""
        if priority == REAL_TIME:
            return Rank(os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, 1, self.niceness)
        wanted = _NICENESS.get(priority, self.niceness)
        niceness = max(self.niceness, wanted) if priority < 0 else wanted
        return Rank(self.scheduler, self.real_time, niceness)
