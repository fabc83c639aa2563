"""What a planned graph consists of: its nodes in plain words and numbers, and which layers are
alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from codegen.targets.base import Target
from mlacli.context import ContextPlan, PlannedGraph, plan_context
from mlacli.errors import UsageError
from mlacli.fit import wanted_context
from mlacli.free_memory import available_bytes
from mlacli.graph.lower import scratch_bytes
from mlacli.graph.matrix import Matrix
from mlacli.graph.node import Dim, Node
from mlacli.graph.ops import lower_graph
from mlacli.loading import model_for
from mlacli.machine import this_target
from mlacli.settings import RunSettings

_LAYER = re.compile(r"-(\d+)(?:\.(\d+))?(_q)?$")
_WEIGHT = re.compile(r"^blk\.(\d+)\.")
BEFORE = "(layer before)"


@dataclass(frozen=True)
class NodeFacts:
    """One node. `shape`: run-time sizes by name; `nbytes` at their upper bounds; `offset` into the
    arena (None: outside of it, or in another node's memory, which `in_place` names). `slice`: the
    first head of a slice of heads."""

    index: int
    name: str
    op: str
    dtype: str
    shape: tuple[int | str, ...]
    inputs: tuple[str, ...]
    nbytes: int
    offset: int | None
    in_place: str | None
    scratch: int
    kernels: tuple[str, ...]
    layer: int | None
    slice: int | None


@dataclass(frozen=True)
class LeafFacts:
    """What exists before a step: a weight (with its storage type), an input or a cache."""

    name: str
    op: str
    dtype: str
    shape: tuple[int | str, ...]
    nbytes: int | None


@dataclass(frozen=True)
class GraphFacts:
    """One graph of a context, with the leaves that its nodes read."""

    name: str
    n_tokens_max: int
    arena_bytes: int
    leaves: dict[str, LeafFacts]
    nodes: tuple[NodeFacts, ...]


@dataclass(frozen=True)
class Part:
    """Nodes that are shown once for `layers` alike ones (or slices of heads); none: shared."""

    layers: tuple[int, ...]
    nodes: tuple[NodeFacts, ...]


def graphs_of(settings: RunSettings) -> tuple[GraphFacts, ...]:
    """Every graph that `run` would have with these settings. Raises MlaError."""
    return tuple(map(facts, planned(settings, this_target()).graphs.values()))


def named(graphs: tuple[GraphFacts, ...], name: str | None) -> tuple[GraphFacts, ...]:
    """The graph of this name; all without one. Raises UsageError."""
    known = {graph.name: graph for graph in graphs}
    if name is None:
        return graphs
    if name not in known:
        raise UsageError(f"--graph: {name!r} is not one of {', '.join(known)} (they go with -mla)")
    return (known[name],)


def planned(settings: RunSettings, target: Target) -> ContextPlan:
    """The context that these settings give, planned; one that does not fit, too."""
    model = model_for(replace(settings, mmap=True))
    n_ctx = wanted_context(model.config, settings, available_bytes(), lambda line: None)
    return plan_context(model.config, model.weights, settings, target, n_ctx=n_ctx)


def facts(planned: PlannedGraph) -> GraphFacts:
    """A graph in plain words."""
    kernels: dict[Node, list[str]] = {}
    for launch in lower_graph(planned.lower, planned.graph):
        kernels.setdefault(launch.node, []).append(launch.spec.symbol)
    return GraphFacts(
        name=planned.name,
        n_tokens_max=planned.lower.bounds[Dim.N_TOKENS],
        arena_bytes=planned.plan.size,
        leaves={n.name: _leaf(n, planned) for n in planned.graph.nodes if n.is_leaf},
        nodes=tuple(_node(n, planned, kernels[n]) for n in planned.graph.operations),
    )


def _leaf(node: Node, planned: PlannedGraph) -> LeafFacts:
    matrix: Matrix | None = node.attrs.get("matrix")
    if matrix is not None:
        return LeafFacts(node.name, node.op, matrix.fmt.name, _shape(node), matrix.nbytes)
    nbytes = None if node.op == "cache" else node.nbytes(planned.lower.bounds)
    return LeafFacts(node.name, node.op, node.dtype, _shape(node), nbytes)


def _node(node: Node, planned: PlannedGraph, kernels: list[str]) -> NodeFacts:
    found = _LAYER.search(node.name)
    layer, head = (found[1], found[2]) if found else (None, None)
    taken = node.inputs[node.inplace].name if node.inplace is not None else None
    return NodeFacts(
        index=node.index,
        name=node.name,
        op=node.op,
        dtype=node.dtype,
        shape=_shape(node),
        inputs=tuple(i.name for i in node.inputs),
        nbytes=0 if node.dtype == "cache" else node.nbytes(planned.lower.bounds),
        offset=planned.plan.offsets.get(node.index),
        in_place=taken,
        scratch=scratch_bytes(planned.lower, node),
        kernels=tuple(dict.fromkeys(kernels)),
        layer=int(layer) if layer else None,
        slice=int(head) if head and found and not found[3] else None,
    )


def _shape(node: Node) -> tuple[int | str, ...]:
    return tuple(size.value if isinstance(size, Dim) else size for size in node.shape)


def parts(graph: GraphFacts) -> list[Part]:
    """The graph with layers that are alike, one after another, shown once."""
    found: list[Part] = []
    for layer, group in groupby(graph.nodes, key=lambda node: node.layer):
        nodes = tuple(group)
        last = found[-1] if found else None
        if layer is None:
            found.append(Part((), nodes))
        elif last and last.layers and signature(last.nodes) == signature(nodes):
            found[-1] = replace(last, layers=(*last.layers, layer))
        else:
            found.append(Part((layer,), nodes))
    return found


def signature(nodes: Iterable[NodeFacts]) -> list[NodeFacts]:
    """What must be the same for two layers to be alike: all but numbers and places."""
    return [
        replace(
            node,
            index=0,
            offset=None if node.offset is None else 0,
            name=_relative(node.name, node.layer),
            inputs=tuple(_relative(name, node.layer) for name in node.inputs),
            in_place=_relative(node.in_place, node.layer) if node.in_place else None,
            layer=None,
        )
        for node in nodes
    ]


def _relative(name: str, layer: int | None) -> str:
    """A name without its layer, where that is the node's own."""
    found = _LAYER.search(name)
    if found and int(found[1]) == layer:
        return f"{name[: found.start()]}-N{'.' + found[2] if found[2] else ''}{found[3] or ''}"
    if found:
        return BEFORE
    weight = _WEIGHT.match(name)
    return name if weight is None else "blk.N." + name[weight.end() :]


def slices(nodes: Iterable[NodeFacts]) -> Iterator[tuple[list[NodeFacts], list[int]]]:
    """A layer's nodes in runs: (nodes to show, first heads of the slices that are alike).

    Slices of heads one after another that differ in their heads only are shown once.
    """
    last: list[NodeFacts] = []
    heads: list[int] = []
    for head, group in groupby(nodes, key=lambda node: node.slice):
        run = list(group)
        if last and head is not None and heads and _sliced(last) == _sliced(run):
            heads.append(head)
            continue
        if last:
            yield last, heads
        last, heads = run, [head] if head is not None else []
    if last:
        yield last, heads


def _sliced(nodes: list[NodeFacts]) -> list[NodeFacts]:
    def plain(name: str) -> str:
        return re.sub(r"-N\.\d+$", "-N", name)

    return [
        replace(
            node,
            name=plain(node.name),
            inputs=tuple(map(plain, node.inputs)),
            in_place=plain(node.in_place) if node.in_place else None,
            slice=None,
        )
        for node in signature(nodes)
    ]
