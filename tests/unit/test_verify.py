"""The graph verifier: each rule, broken once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlacli.graph.node import Dim, Graph
from mlacli.graph.verify import GraphError, verify

OPS = frozenset({"scale", "add"})


def sound() -> Graph:
    """tokens -> a -> b (in place of a) -> c, the output."""
    graph = Graph()
    tokens = graph.leaf("input", "f32", (Dim.N_TOKENS, 8), "tokens")
    a = graph.add("scale", "f32", (Dim.N_TOKENS, 8), tokens, name="a")
    b = graph.add("add", "f32", (Dim.N_TOKENS, 8), a, tokens, name="b", inplace=0)
    graph.outputs.append(graph.add("scale", "f32", (Dim.N_TOKENS, 8), b, name="c"))
    return graph


def test_a_sound_graph_passes() -> None:
    verify(sound(), OPS)


def test_rows_may_be_written_into_a_cache() -> None:
    graph = sound()
    cache = graph.leaf("cache", "cache", (64,), "cache_c-0")
    graph.add("scale", "cache", (64,), cache, graph.nodes[0], name="c-0", inplace=0)
    verify(graph, OPS)


def unknown_op(graph: Graph) -> None:
    graph.add("subtract", "f32", (8,), graph.nodes[0], name="d")


def same_name(graph: Graph) -> None:
    graph.add("scale", "f32", (8,), graph.nodes[0], name="a")


def input_comes_later(graph: Graph) -> None:
    graph.nodes[1], graph.nodes[2] = graph.nodes[2], graph.nodes[1]


def input_of_another_graph(graph: Graph) -> None:
    graph.add("scale", "f32", (8,), sound().nodes[0], name="d")


def read_after_overwriting(graph: Graph) -> None:
    graph.add("scale", "f32", (8,), graph.nodes[1], name="d")


def overwritten_twice(graph: Graph) -> None:
    a = graph.nodes[1]
    graph.add("scale", a.dtype, a.shape, a, name="d", inplace=0)


def overwrites_an_input(graph: Graph) -> None:
    tokens = graph.nodes[0]
    graph.add("scale", "f32", tokens.shape, tokens, name="d", inplace=0)


def overwrites_a_weight(graph: Graph) -> None:
    w = graph.leaf("weight", "f32", (8,), "w")
    graph.add("scale", "f32", (8,), w, name="d", inplace=0)


def overwrites_another_shape(graph: Graph) -> None:
    graph.add("scale", "f32", (Dim.N_TOKENS, 4), graph.nodes[3], name="d", inplace=0)


def overwrites_another_type(graph: Graph) -> None:
    graph.add("scale", "f16", (Dim.N_TOKENS, 8), graph.nodes[3], name="d", inplace=0)


def no_output(graph: Graph) -> None:
    graph.outputs.clear()


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (unknown_op, r"^d:subtract.*: unknown op"),
        (same_name, r"^a:scale.*: another node has this name"),
        (input_comes_later, r"^b:add.*: input a:.* comes later"),
        (input_of_another_graph, r"^d:scale.*: input tokens:.* comes later"),
        (read_after_overwriting, r"^d:scale.*: reads a:.*, which b:.* overwrote"),
        (overwritten_twice, r"^d:scale.*: reads a:.*, which b:.* overwrote"),
        (overwrites_an_input, r"^d:scale.*: cannot overwrite tokens"),
        (overwrites_a_weight, r"^d:scale.*: cannot overwrite w"),
        (overwrites_another_shape, r"^d:scale.*: takes over c:.* of another type or shape"),
        (overwrites_another_type, r"^d:scale.*: takes over c:.* of another type or shape"),
        (no_output, r"^the graph has no output"),
    ],
)
def test_a_broken_graph_is_refused(break_it: Callable[[Graph], None], complaint: str) -> None:
    graph = sound()
    break_it(graph)
    with pytest.raises(GraphError, match=complaint):
        verify(graph, OPS)


def test_leaves_are_shared_by_name() -> None:
    graph = sound()
    n = len(graph.nodes)
    again = graph.leaf("input", "f32", (Dim.N_TOKENS, 8), "tokens")
    assert again is graph.nodes[0]
    assert len(graph.nodes) == n
