"""Every op there is: importing this module registers their lowerings."""

from __future__ import annotations

from mlacli.graph import lower_attention, lower_dense, lower_moe, lower_plain
from mlacli.graph.lower import OPS, Launch, Lower, launches_of
from mlacli.graph.node import Graph

__all__ = ["KNOWN_OPS", "lower_attention", "lower_dense", "lower_graph", "lower_moe", "lower_plain"]

KNOWN_OPS = frozenset(OPS)


def lower_graph(lower: Lower, graph: Graph) -> list[Launch]:
    """All launches of a graph, in order."""
    return [launch for node in graph.operations for launch in launches_of(lower, node)]
