"""A graph made runnable: its launch table with every address filled in.

One forward pass is one call: `run` zeroes the tile counters and hands the table to the pool.
Barriers stand only where a launch touches memory that an earlier one, since the last barrier, wrote
(or writes what one read).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from codegen import job as job_layout
from codegen.ahead import WALK_WORDS
from codegen.jit import Jit
from codegen.pool import LAUNCH_WORDS, Pool, Records, aligned_words
from mlacli.graph.lower import At, Launch, Lower, Operand, Scratch, Walk, scratch_bytes
from mlacli.graph.node import Dim, Node
from mlacli.graph.plan import Plan

Span = tuple[int, int]


@dataclass(frozen=True)
class Memory:
    """Where things lie: the arena, everything outside it, and the words of the run-time sizes."""

    arena: int
    outside: Callable[[Node], int]  # address of a leaf or an output
    dims: Mapping[Dim, int]


class Program:
    """Ready to run any number of times; the memory it points to must stay where it is."""

    def __init__(
        self, launches: list[Launch], plan: Plan, lower: Lower, memory: Memory, jit: Jit
    ) -> None:
        self._plan, self._memory, self._bounds = plan, memory, lower.bounds
        self.nodes = tuple(launch.node for launch in launches)  # of each row of the table
        self.symbols = tuple(launch.spec.symbol for launch in launches)
        kernels = [jit.load(launch.spec) for launch in launches]
        slots = [len(launch.operands) + 1 for launch in launches]
        self._args = aligned_words(sum(slots))
        self._counters = aligned_words(job_layout.LINE_WORDS * max(1, sum(n for _, n in kernels)))
        self.table = np.zeros((len(launches), LAUNCH_WORDS), np.int64)
        waits = _barriers(launches, lambda operand: self._span(lower, operand))
        at = counter = 0
        for i, (launch, (address, n_counters)) in enumerate(zip(launches, kernels, strict=True)):
            words = [self._address(operand) for operand in launch.operands]
            words.append(self._counters.ctypes.data + 8 * job_layout.LINE_WORDS * counter)
            self._args[at : at + len(words)] = words
            self.table[i, :3] = address, self._args.ctypes.data + 8 * at, waits[i]
            at, counter = at + len(words), counter + n_counters
        self._walks = aligned_words(WALK_WORDS * max(1, len(launches))).reshape(-1, WALK_WORDS)
        for i, walk in enumerate(_walks_ahead(launches)):
            if walk:
                self._walks[i] = self._walk_words(walk)
                self.table[i, 3] = self._walks[i].ctypes.data

    def run(self, pool: Pool, n_threads: int, records: Records | None = None) -> bool:
        """One pass, its times into `records`; False when it was cancelled."""
        self._counters[:] = 0
        return pool.run(self.table, n_threads, records)

    def run_watched(
        self,
        pool: Pool,
        n_threads: int,
        wanted: Collection[Node],
        see: Callable[[Node, int], None],
    ) -> bool:
        """One pass that halts behind each of the `wanted` nodes: `see` is told the node and its
        address while the memory still holds it. False when it was cancelled."""
        self._counters[:] = 0
        start = 0
        for stop in self._ends():
            node = self.nodes[stop - 1]
            if node in wanted:
                if not pool.run(self.table[start:stop], n_threads):
                    return False
                see(node, self.address(node))
                start = stop
        return start == len(self.table) or pool.run(self.table[start:], n_threads)

    def _ends(self) -> Iterator[int]:
        """For each node, the row behind its last launch."""
        n = len(self.nodes)
        return (i + 1 for i in range(n) if i + 1 == n or self.nodes[i + 1] is not self.nodes[i])

    def address(self, node: Node) -> int:
        """Where a node's memory is."""
        owner = node.storage
        if owner.index in self._plan.offsets:
            return self._memory.arena + self._plan.offsets[owner.index]
        return self._memory.outside(owner)

    def _address(self, operand: Operand) -> int:
        match operand:
            case At(node, offset):
                return self.address(node) + offset
            case Scratch(node, offset):
                return self._memory.arena + self._plan.scratch[node.index] + offset
            case Dim():
                return self._memory.dims[operand]
        return operand

    def _walk_words(self, walk: Walk) -> tuple[int, ...]:
        pitch = walk.weights.attrs["matrix"].pitch
        ids = self._address(walk.ids) if walk.ids else 0
        return self.address(walk.weights), walk.n, walk.parts, pitch, walk.part_bytes, ids

    def _span(self, lower: Lower, operand: Operand) -> Span | None:
        """The arena or cache bytes behind an operand; None for what no kernel writes."""
        if isinstance(operand, Scratch):
            start = self._address(Scratch(operand.node))
            return start, start + scratch_bytes(lower, operand.node)
        if not isinstance(operand, At) or operand.node.op in ("weight", "input"):
            return None
        owner = operand.node.storage
        start = self.address(owner)
        return start, start + (1 if owner.op == "cache" else owner.nbytes(self._bounds))


def _walks_ahead(launches: list[Launch]) -> list[Walk | None]:
    """For each launch that reads weights: the walk of the next one, if the experts that it reads
    are known by then."""
    result: list[Walk | None] = [None] * len(launches)
    ahead: Walk | None = None
    written: set[Node] = set()
    for i in reversed(range(len(launches))):
        written.add(launches[i].node.storage)
        if any(_is_matrix(operand) for operand in launches[i].operands):
            is_known = ahead and not (ahead.ids and ahead.ids.node.storage in written)
            result[i], ahead, written = ahead if is_known else None, launches[i].walk, set()
    return result


def _is_matrix(operand: Operand) -> bool:
    matrix = operand.node.attrs.get("matrix") if isinstance(operand, At) else None
    return matrix is not None and matrix.n_rows > 1


def _barriers(launches: list[Launch], span: Callable[[Operand], Span | None]) -> list[int]:
    """1 where a launch must wait for the ones before it.

    An op's own node and scratch count as written, its other operands as read; launches of the same
    op write different parts of the same memory and only wait when they say so.
    """
    waits: list[int] = []
    written: list[tuple[Node, Span]] = []
    read: list[tuple[Node, Span]] = []
    for launch in launches:
        writes, reads = _touched(launch, span)
        clash = any(
            other is not launch.node and _overlap(a, b)
            for other, a in written
            for b in writes + reads
        ) or any(other is not launch.node and _overlap(a, b) for other, a in read for b in writes)
        if clash or launch.after_previous:
            written, read = [], []
        waits.append(int(clash or launch.after_previous))
        written += [(launch.node, s) for s in writes]
        read += [(launch.node, s) for s in reads]
    return waits


def _touched(
    launch: Launch, span: Callable[[Operand], Span | None]
) -> tuple[list[Span], list[Span]]:
    writes: list[Span] = []
    reads: list[Span] = []
    for operand in launch.operands:
        where = span(operand)
        if where is None:
            continue
        own = isinstance(operand, Scratch) or (
            isinstance(operand, At)
            and (operand.node.storage is launch.node.storage or operand.node.op == "cache")
        )
        (writes if own else reads).append(where)
    return writes, reads


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]
