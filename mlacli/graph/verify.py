"""What must hold for any graph before it is planned; a violation is a bug of ours."""

from __future__ import annotations

from mlacli.graph.node import Graph, Node


class GraphError(Exception):
    """The graph is malformed: names the node and the rule."""


def verify(graph: Graph, known_ops: frozenset[str]) -> None:
    """Raise GraphError unless inputs precede users, ops are known, names are unique and nothing
    is read after another op has taken over its memory."""
    seen: set[Node] = set()
    names: set[str] = set()
    overwritten: dict[Node, Node] = {}
    for node in graph.nodes:
        if not node.is_leaf and node.op not in known_ops:
            raise GraphError(f"{node}: unknown op")
        if node.name in names:
            raise GraphError(f"{node}: another node has this name")
        for used in node.inputs:
            if used not in seen:
                raise GraphError(f"{node}: input {used} comes later")
            if used in overwritten:
                raise GraphError(f"{node}: reads {used}, which {overwritten[used]} overwrote")
        if node.inplace is not None:
            _check_inplace(node)
            overwritten[node.inputs[node.inplace]] = node
        seen.add(node)
        names.add(node.name)
    if not graph.outputs:
        raise GraphError("the graph has no output")


def _check_inplace(node: Node) -> None:
    source = node.inputs[node.inplace or 0]
    if source.op in ("weight", "input"):
        raise GraphError(f"{node}: cannot overwrite {source}")
    if source.op != "cache" and (source.dtype, source.shape) != (node.dtype, node.shape):
        raise GraphError(f"{node}: takes over {source} of another type or shape")
