"""Where every intermediate lies in the arena. The arena's size IS the reported compute buffer.

Walks the graph once: a result gets the best-fitting gap when it is made and gives it back after its
last reader. An op's scratch lives only while the op runs. Leaves and outputs lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from mlacli.graph.node import Bounds, Graph, Node

ALIGNMENT = 64


@dataclass(frozen=True)
class Plan:
    """Byte offsets into the arena: of results and, under the op's index too, of scratch."""

    size: int
    offsets: dict[int, int]
    scratch: dict[int, int]


class _Gaps:
    """Free ranges of an arena that grows at its end."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []  # (start, length), sorted, never adjacent

    def take(self, length: int) -> int:
        fitting = [(n, start) for start, n in self._free if n >= length]
        if fitting:
            n, start = min(fitting)
            self._free.remove((start, n))
            if n > length:
                self._insert(start + length, n - length)
            return start
        if self._free and sum(self._free[-1]) == self.size:
            start, _ = self._free.pop()  # grow the gap at the end
        else:
            start = self.size
        self.size = start + length
        return start

    def give_back(self, start: int, length: int) -> None:
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        self._free = sorted([*self._free, (start, length)])
        merged = [self._free[0]]
        for s, n in self._free[1:]:
            last_start, last_length = merged[-1]
            if last_start + last_length == s:
                merged[-1] = (last_start, last_length + n)
            else:
                merged.append((s, n))
        self._free = merged


def make_plan(
    graph: Graph,
    bounds: Bounds,
    scratch_bytes: Callable[[Node], int],
    keep: Collection[str] = (),
) -> Plan:
    """Lay out all results of a graph. Nodes named in `keep` are never overwritten (for dumps)."""
    last_use = _last_uses(graph, keep)
    sizes = {owner: _aligned(owner.nbytes(bounds)) for owner in last_use}
    gaps, offsets, scratch = _Gaps(), {}, {}
    ending: dict[int, list[Node]] = {}
    for owner, last in last_use.items():
        ending.setdefault(last, []).append(owner)
    for node in graph.operations:
        if node in last_use:
            offsets[node.index] = gaps.take(sizes[node])
        n_scratch = _aligned(scratch_bytes(node))
        if n_scratch:
            scratch[node.index] = gaps.take(n_scratch)
            gaps.give_back(scratch[node.index], n_scratch)
        for owner in ending.get(node.index, []):
            gaps.give_back(offsets[owner.index], sizes[owner])
    return Plan(gaps.size, offsets, scratch)


def _last_uses(graph: Graph, keep: Collection[str]) -> dict[Node, int]:
    """Arena-owned nodes -> index of the op after which their memory is free."""
    never = len(graph.nodes)
    owner_of: dict[Node, Node] = {}  # Node.storage, without walking long chains again and again
    for node in graph.nodes:
        owner_of[node] = node if node.inplace is None else owner_of[node.inputs[node.inplace]]
    outside = {owner_of[n] for n in graph.outputs}
    last: dict[Node, int] = {}
    for node in graph.operations:
        for used in (*node.inputs, node):
            owner = owner_of[used]
            if not owner.is_leaf and owner not in outside:
                kept = used.name in keep or last.get(owner) == never
                last[owner] = never if kept else node.index
    return last


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
