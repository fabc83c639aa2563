"""Where the time of steps goes: sums of what the kernels' threads recorded. Adds numbers only.

A launch's wait is what its threads spent since their launch before it, mostly at its barrier; its
run is the kernel, with the barriers inside. Both are means over the threads, so that together with
the wait for the last thread they are the time from the step's beginning to its end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from codegen.pool import Records, record_table
from mlacli.graph.node import Node
from mlacli.graph.program import Program
from mlacli.work import Batch

Nanoseconds = npt.NDArray[np.float64]


@dataclass
class ProgramTimes:
    """Sums over a program's steps.

    `sums` has the layout of `records`, counted from when each step's first thread began; `span_ns`
    is from there to when the last one ended.
    """

    nodes: tuple[Node, ...]
    records: Records  # of the step under way
    sums: Records
    span_ns: int = 0
    batches: Counter[Batch] = field(default_factory=Counter)

    def add(self, batch: Batch) -> None:
        """Count the step whose records are complete."""
        began = self.records[:, 0].min()
        self.records -= began
        self.sums += self.records
        self.span_ns += int(self.records[:, -1].max())
        self.batches[batch] += 1

    @property
    def run(self) -> Nanoseconds:
        """Time of each launch."""
        return self._mean_spans()[1::2]

    @property
    def wait(self) -> Nanoseconds:
        """Time before each launch; a thread that wakes up late is waited for by the first one."""
        found = self._mean_spans()[0::2]
        found[:1] += self.sums[:, 0].mean()
        return found

    def _mean_spans(self) -> Nanoseconds:
        return np.diff(self.sums.mean(axis=0))

    @property
    def wait_at_end(self) -> float:
        """For the last thread."""
        return self.span_ns - float(self.sums[:, -1].mean())


class Profile:
    """The steps of an engine. `wall_ns` is all the time they took; who times more than steps may
    set it."""

    def __init__(self) -> None:
        self.programs: dict[Program, ProgramTimes] = {}
        self.wall_ns = 0

    def records(self, program: Program, n_threads: int) -> Records:
        """The table that the program's next step is to fill; it always runs on as many threads."""
        times = self.programs.get(program)
        if times is None:
            n = len(program.nodes)
            times = ProgramTimes(
                program.nodes, record_table(n_threads, n), record_table(n_threads, n)
            )
            self.programs[program] = times
        return times.records

    def add(self, program: Program, batch: Batch, wall_ns: int) -> None:
        """Count a step, which took `wall_ns` with all that Python does for it."""
        self.programs[program].add(batch)
        self.wall_ns += wall_ns

    @property
    def n_steps(self) -> int:
        return sum(times.batches.total() for times in self.programs.values())

    @property
    def n_tokens(self) -> int:
        return sum(
            batch.n_tokens * n
            for times in self.programs.values()
            for batch, n in times.batches.items()
        )

    @property
    def run_ns(self) -> float:
        return float(sum(times.run.sum() for times in self.programs.values()))

    @property
    def wait_ns(self) -> float:
        """Barriers, and the beginning and the end of steps."""
        return float(sum(t.wait.sum() + t.wait_at_end for t in self.programs.values()))

    @property
    def unaccounted_ns(self) -> float:
        """Outside of native steps."""
        return self.wall_ns - self.run_ns - self.wait_ns


@dataclass(frozen=True)
class Profiles:
    """Of an answer's two parts."""

    prompt: Profile = field(default_factory=Profile)
    generation: Profile = field(default_factory=Profile)
