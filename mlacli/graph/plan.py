"""Where every intermediate lies in the arena. The arena's size IS the reported compute buffer.

A result lives from the op that makes it to its last reader, an op's scratch only while the op runs.
The largest are placed first, each at the lowest offset that is free for as long as it lives (greedy
by size, as in Pisarchyk and Lee, arXiv 2001.03288). Leaves and outputs lie elsewhere.
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


@dataclass(frozen=True)
class _Block:
    """Memory that is needed from op `first` to op `last`."""

    nbytes: int
    first: int
    last: int
    node: Node
    is_scratch: bool


def make_plan(
    graph: Graph,
    bounds: Bounds,
    scratch_bytes: Callable[[Node], int],
    keep: Collection[str] = (),
) -> Plan:
    """Lay out all results of a graph. The memory of nodes named in `keep` is given to no other
    result; an op that takes it over in place still does (Program.run_watched sees every value)."""
    offsets: dict[int, int] = {}
    scratch: dict[int, int] = {}
    size = 0
    taken: list[list[tuple[int, int]]] = [[] for _ in graph.nodes]  # (start, end) at each op
    blocks = _blocks(graph, bounds, scratch_bytes, keep)
    for block in sorted(blocks, key=lambda b: (-b.nbytes, b.first)):
        in_use = {span for at in taken[block.first : block.last + 1] for span in at}
        start = _lowest_gap(in_use, block.nbytes)
        for at in taken[block.first : block.last + 1]:
            at.append((start, start + block.nbytes))
        (scratch if block.is_scratch else offsets)[block.node.index] = start
        size = max(size, start + block.nbytes)
    return Plan(size, offsets, scratch)


def _lowest_gap(in_use: set[tuple[int, int]], nbytes: int) -> int:
    """The lowest offset with `nbytes` free bytes behind it."""
    at = 0
    for start, end in sorted(in_use):
        if start - at >= nbytes:
            break
        at = max(at, end)
    return at


def _blocks(
    graph: Graph,
    bounds: Bounds,
    scratch_bytes: Callable[[Node], int],
    keep: Collection[str],
) -> list[_Block]:
    """Everything that needs a place, with its lifetime."""
    end = len(graph.nodes) - 1
    blocks = [
        _Block(_aligned(owner.nbytes(bounds)), owner.index, min(last, end), owner, False)
        for owner, last in _last_uses(graph, keep).items()
    ]
    for node in graph.operations:
        n_scratch = _aligned(scratch_bytes(node))
        if n_scratch:
            blocks.append(_Block(n_scratch, node.index, node.index, node, True))
    return blocks


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
