"""A graph as text and JSON: its nodes, what each op takes, and the ops of every mode."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from mlacli.errors import UsageError
from mlacli.fit import size_text
from mlacli.inside.graph_facts import (
    GraphFacts,
    LeafFacts,
    NodeFacts,
    graphs_of,
    parts,
    slices,
)
from mlacli.settings import RunSettings

_HEADER = ("#", "node", "op", "type", "shape", "inputs", "bytes", "at", "kernel")
_OPS_HEADER = ("op", "nodes", "launched kernels", "bytes", "most scratch")
_PREFIX = re.compile(r"^blk\.\d+\.")
MODES = tuple((mla, flash) for mla in range(4) for flash in (True, False))


def graph_json(graphs: Iterable[GraphFacts]) -> str:
    """Every node of every graph."""
    return json.dumps({g.name: asdict(g) for g in graphs}, indent=2) + "\n"


def graph_text(graph: GraphFacts, *, every: bool = False) -> str:
    """The nodes in the order they run, alike layers once unless `every`; then the ops."""
    n_tokens = f"up to {graph.n_tokens_max} tokens"
    lines = [f"graph {graph.name}: {n_tokens}, {len(graph.nodes)} nodes, "
             f"arena {size_text(graph.arena_bytes)}"]  # fmt: skip
    rows: list[Sequence[object]] = []
    for title, nodes in sections(graph, every=every):
        if title:
            rows.append(("", title, *[""] * 7))
        rows += [_row(node, graph) for node in nodes]
    lines += _table(rows, _HEADER, "lllllllll")
    return "\n".join([*lines, "", *ops_lines(graph), ""])


def sections(graph: GraphFacts, *, every: bool) -> Iterable[tuple[str, Sequence[NodeFacts]]]:
    """(title, nodes) of what is shown together."""
    for part in parts(graph):
        layers = part.layers
        if not layers:
            yield "", part.nodes
        elif every:
            for layer in layers:
                yield f"-- blk.{layer}", [n for n in graph.nodes if n.layer == layer]
        else:
            title = f"-- blk.{layers[0]}"
            if len(layers) > 1:
                title += f" .. blk.{layers[-1]} alike"
            for nodes, heads in slices(part.nodes):
                alike = len(heads) > 1
                behind = f" (heads {heads[0]} .. {heads[-1]} alike)" if alike else ""
                yield title + behind, nodes
                title = f"-- blk.{layers[0]}"


def _row(node: NodeFacts, graph: GraphFacts) -> Sequence[object]:
    at = "output"
    if node.dtype == "cache":
        at = "cache"
    elif node.in_place is not None:
        at = f"= {node.in_place}"
    elif node.offset is not None:
        at = str(node.offset)
    inputs = [input_text(name, graph.leaves.get(name)) for name in node.inputs]
    return (
        node.index, node.name, node.op, node.dtype, shape_text(node.shape), ", ".join(inputs),
        node.nbytes or "-", at, ", ".join(node.kernels),
    )  # fmt: skip


def input_text(name: str, leaf: LeafFacts | None) -> str:
    """A weight with its type, without its layer."""
    if leaf is None or leaf.op != "weight":
        return name
    return f"{_PREFIX.sub('', name).replace('.weight', '', 1)}:{leaf.dtype}"


def shape_text(shape: Sequence[int | str]) -> str:
    return " x ".join(map(str, shape))


def ops_lines(graph: GraphFacts) -> list[str]:
    """For each op its nodes, kernels and bytes; results in place take none of their own."""
    rows: list[Sequence[object]] = []
    for op, n in Counter(node.op for node in graph.nodes).most_common():
        nodes = [node for node in graph.nodes if node.op == op]
        kernels = {kernel for node in nodes for kernel in node.kernels}
        own = sum(node.nbytes for node in nodes if node.in_place is None)
        rows.append((op, n, len(kernels), own, max(node.scratch for node in nodes)))
    rows.append(("total", len(graph.nodes), *[""] * 3))
    return _table(rows, _OPS_HEADER, "lrrrr")


def modes_text(settings: RunSettings) -> str:
    """Nodes per op in every -mla mode with and without flash attention. Raises MlaError."""
    found = {mode: _of_mode(settings, *mode) for mode in MODES}
    refused = [f"-mla {mla} {_flash(fa)}" for (mla, fa), graphs in found.items() if not graphs]
    lines = []
    for title, last in (("prompt batches", True), ("generation (few tokens)", False)):
        counts = {
            mode: Counter(node.op for node in graphs[-1 if last else 0].nodes)
            for mode, graphs in found.items()
            if graphs
        }
        ops = sorted({op for count in counts.values() for op in count})
        rows: list[Sequence[object]] = [
            ("graph", *((found[m][-1 if last else 0].name if m in counts else "-") for m in MODES))
        ]
        rows += [
            (op, *((counts[m][op] or "" if m in counts else "-") for m in MODES)) for op in ops
        ]
        rows.append(("total", *((counts[m].total() if m in counts else "-") for m in MODES)))
        header = (title, *(f"-mla {mla} {_flash(fa)}" for mla, fa in MODES))
        lines += [*_table(rows, header, "l" + "r" * len(MODES)), ""]
    if refused:
        lines += [f"The other flags do not go together with {', '.join(refused)}.", ""]
    lines.append("-mla 2 and 3 also have the absorbed graph of -mla 1, for small batches.")
    return "\n".join(lines) + "\n"


def _of_mode(settings: RunSettings, mla: int, flash: bool) -> tuple[GraphFacts, ...]:
    """The graphs of a mode; none where the cache types that were asked for do not allow it."""
    try:
        return graphs_of(replace(settings, mla=mla, flash_attn=flash))
    except UsageError:
        return ()


def _flash(on: bool) -> str:
    return "fa" if on else "no fa"


def _table(rows: Sequence[Sequence[object]], header: Sequence[str], align: str) -> list[str]:
    import tabulate

    words = {"l": "left", "r": "right"}
    return tabulate.tabulate(
        rows, header, tablefmt="simple", colalign=[words[a] for a in align], disable_numparse=True
    ).splitlines()
