"""A graph in the language of graphviz: ops as boxes, a cluster for each layer that is shown."""

from __future__ import annotations

from collections.abc import Iterable

from mlacli.inside.graph_facts import GraphFacts, NodeFacts
from mlacli.inside.graph_text import input_text, sections, shape_text

# kind of op: its colour; the kind is told by the first word that the op's name begins with
COLOURS = {
    "attention": "#f6c6a8",
    "matrix": "#b9d4f1",
    "experts": "#c9e3b4",
    "cache": "#f3e3a1",
    "rows": "#e6e6e6",
}
_KINDS = {
    "attention": ("flash", "kq", "soft_max", "absorb", "rope", "transpose", "expand"),
    "experts": ("route", "group", "gather", "moe", "silu"),
    "matrix": ("matmul", "up_gate", "embed"),
    "cache": ("store", "cache"),
}


def kind(op: str) -> str:
    """What an op has to do with, for its colour."""
    found = (name for name, words in _KINDS.items() if op.startswith(words))
    return next(found, "rows")


def dot_text(graph: GraphFacts, *, every: bool) -> str:
    """DOT text; layers that are alike once, unless `every`."""
    lines = [f"digraph {graph.name} {{", '  node [shape=box, style=filled, fontname="sans-serif"];']
    shown: dict[str, NodeFacts] = {}
    for i, (title, nodes) in enumerate(sections(graph, every=every)):
        shown |= {node.name: node for node in nodes}
        body = [f"  {_quoted(node.name)} [{_label(node, graph)}];" for node in nodes]
        if title:
            label = _quoted(title.removeprefix("-- "))
            body = [f"  subgraph cluster_{i} {{", f"    label={label};", *body, "  }"]
        lines += body
    last: dict[str, str] = {}  # of what is not shown: the node shown that stands for it
    previous: NodeFacts | None = None
    for node in graph.nodes:
        if node.name in shown:
            lines += _edges(node, graph, shown, last)
            previous = node
        elif previous is not None:
            last[node.name] = previous.name
    return "\n".join([*lines, "}", ""])


def _edges(
    node: NodeFacts, graph: GraphFacts, shown: dict[str, NodeFacts], last: dict[str, str]
) -> Iterable[str]:
    for name in dict.fromkeys(node.inputs):
        leaf = graph.leaves.get(name)
        if leaf is None:
            style = " [style=bold]" if name == node.in_place else ""
            yield f"  {_quoted(shown[name].name if name in shown else last[name])} -> " + (
                f"{_quoted(node.name)}{style};"
            )
        elif leaf.op != "weight":
            form = "cylinder" if leaf.op == "cache" else "ellipse"
            yield f'  {_quoted(name)} [shape={form}, fillcolor="{COLOURS["cache"]}"];'
            yield f"  {_quoted(name)} -> {_quoted(node.name)};"


def _label(node: NodeFacts, graph: GraphFacts) -> str:
    lines = [node.name, f"{node.op}  {shape_text(node.shape)}  {node.dtype}"]
    leaves = [graph.leaves[name] for name in node.inputs if name in graph.leaves]
    lines += [input_text(leaf.name, leaf) for leaf in leaves if leaf.op == "weight"]
    text = "\\n".join(_escaped(line) for line in lines)
    return f'label="{text}", fillcolor="{COLOURS[kind(node.op)]}"'


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
