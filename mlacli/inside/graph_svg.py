"""One layer as an SVG picture, drawn without graphviz.

The layered way (Sugiyama, Tagawa and Toda 1981): every op stands below all that it reads, edges
that pass ranks get a place in each, places in a rank are ordered by the mean of their neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape

from mlacli.errors import UsageError
from mlacli.inside.graph_dot import COLOURS, kind
from mlacli.inside.graph_facts import GraphFacts, NodeFacts, signature, slices
from mlacli.inside.graph_text import input_text, shape_text

_WIDTH, _LINE, _GAP_X, _GAP_Y, _MARGIN = 236, 15, 26, 34, 24
_THIN = 18  # of an edge that passes a rank
_SWEEPS, _STEPS = 12, 60


@dataclass
class _Place:
    """A box, or with no lines a bend of an edge."""

    lines: tuple[str, ...]
    colour: str = ""
    rank: int = 0
    x: float = 0.0
    above: list[_Place] = field(default_factory=list)
    below: list[_Place] = field(default_factory=list)

    @property
    def width(self) -> float:
        return _WIDTH if self.lines else _THIN


def svg_text(graph: GraphFacts, layer: int | None) -> str:
    """The picture of a layer, by default the first of the kind that is there most often.

    Raises UsageError when there is no such layer.
    """
    layers = {n.layer: [m for m in graph.nodes if m.layer == n.layer] for n in graph.nodes}
    layers.pop(None, None)
    if layer is not None and layer not in layers:
        raise UsageError(f"--layer: {layer} is out of range (0 to {len(layers) - 1})")
    if layer is None:
        kinds = {number: repr(signature(nodes)) for number, nodes in layers.items()}
        most = Counter(kinds.values()).most_common(1)[0][0]
        layer = next(number for number, found in kinds.items() if found == most)
    assert layer is not None
    places = _places(graph, layers[layer])
    ranks = _ranks(places)
    _order(ranks)
    _spread(ranks)
    return "\n".join(_drawn(f"{graph.name}, layer {layer}", ranks)) + "\n"


def _places(graph: GraphFacts, nodes: Iterable[NodeFacts]) -> list[_Place]:
    """A box per op, one per cache, one for what comes from elsewhere; edges between them."""
    found: dict[str, _Place] = {}
    for run, heads in slices(nodes):
        for node in run:
            box = _box(graph, node, heads)
            stem = node.name.rpartition(".")[0]
            found |= {node.name: box} | {f"{stem}.{head}": box for head in heads}
            for name in dict.fromkeys(node.inputs):
                leaf = graph.leaves.get(name)
                if leaf is not None and leaf.op != "cache":
                    continue
                if name not in found:
                    lines = (name, f"{leaf.op}" if leaf else "from before")
                    found[name] = _Place(lines, COLOURS["cache" if leaf else "rows"])
                found[name].below.append(box)
                box.above.append(found[name])
    return list({id(place): place for place in found.values()}.values())


def _box(graph: GraphFacts, node: NodeFacts, heads: list[int]) -> _Place:
    times = f"  ({len(heads)} times)" if len(heads) > 1 else ""
    lines = [node.name + times, f"{node.op}  {shape_text(node.shape)}  {node.dtype}"]
    leaves = [name for name in node.inputs if name in graph.leaves]
    lines += [
        input_text(name, graph.leaves[name]) for name in leaves if graph.leaves[name].op == "weight"
    ]
    inputs = [name for name in leaves if graph.leaves[name].op == "input"]
    if inputs:
        lines.append("+ " + ", ".join(inputs))
    return _Place(tuple(lines), COLOURS[kind(node.op)])


def _ranks(places: list[_Place]) -> list[list[_Place]]:
    """By the longest way from the top; an edge that passes ranks gets a bend in each."""
    waiting = {id(place): len(place.above) for place in places}
    ready = [place for place in places if not place.above]
    while ready:
        place = ready.pop()
        for other in place.below:
            other.rank = max(other.rank, place.rank + 1)
            waiting[id(other)] -= 1
            if not waiting[id(other)]:
                ready.append(other)
    for place in places:  # what has no rank above it stands right above its first reader
        if not place.above and place.below:
            place.rank = min(other.rank for other in place.below) - 1
    least = min(place.rank for place in places)
    ranks: list[list[_Place]] = [[] for _ in range(max(p.rank for p in places) - least + 1)]
    for place in places:
        place.rank -= least
    for place in places:
        ranks[place.rank].append(place)
        for i, other in enumerate(place.below):
            _bend(ranks, place, i, other)
    return ranks


def _bend(ranks: list[list[_Place]], place: _Place, index: int, other: _Place) -> None:
    last = place
    for rank in range(place.rank + 1, other.rank):
        bend = _Place((), rank=rank, above=[last])
        ranks[rank].append(bend)
        if last is place:
            place.below[index] = bend
        else:
            last.below.append(bend)
        last = bend
    if last is not place:
        last.below.append(other)
        other.above[other.above.index(place)] = last


def _order(ranks: list[list[_Place]]) -> None:
    """Down and up again: each rank by the mean place of its neighbours in the one before."""
    at = {id(place): i for rank in ranks for i, place in enumerate(rank)}
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for rank in ranks if down else reversed(ranks):
            means = {}
            for place in rank:
                near = (place.above if down else place.below) or [place]
                means[id(place)] = sum(at[id(p)] for p in near) / len(near)
            rank.sort(key=lambda place, means=means: means[id(place)])  # type: ignore[misc]
            at |= {id(place): i for i, place in enumerate(rank)}


def _spread(ranks: list[list[_Place]]) -> None:
    """Pull everything towards its neighbours, without changing the order in a rank."""
    for rank in ranks:
        for i, place in enumerate(rank[1:]):
            place.x = rank[i].x + _apart(rank[i], place)
    for step in range(_STEPS):
        for rank in ranks if step % 2 else reversed(ranks):
            wanted = []
            for place in rank:
                near = place.above + place.below
                wanted.append(sum(p.x for p in near) / len(near) if near else place.x)
            left = list(wanted)  # pushed apart to the right, and to the left: the middle of both
            for i in range(1, len(rank)):
                left[i] = max(left[i], left[i - 1] + _apart(rank[i - 1], rank[i]))
            right = list(wanted)
            for i in reversed(range(len(rank) - 1)):
                right[i] = min(right[i], right[i + 1] - _apart(rank[i], rank[i + 1]))
            for place, a, b in zip(rank, left, right, strict=True):
                place.x = (a + b) / 2


def _apart(a: _Place, b: _Place) -> float:
    return (a.width + b.width) / 2 + _GAP_X


def _drawn(title: str, ranks: list[list[_Place]]) -> Iterator[str]:
    places = [place for rank in ranks for place in rank]
    left = min(p.x - p.width / 2 for p in places) - _MARGIN
    right = max(p.x + p.width / 2 for p in places) + _MARGIN
    tops, top = [], 2.0 * _MARGIN
    heights = [_LINE * max((len(p.lines) for p in rank), default=1) + 8 for rank in ranks]
    for height in heights:
        tops.append(top)
        top += height + _GAP_Y
    wide, high = right - left, top - _GAP_Y + _MARGIN
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high:.0f}" '
        f'width="{wide:.0f}" height="{high:.0f}" font-family="sans-serif" font-size="12">'
    )
    yield f'<rect width="{wide:.0f}" height="{high:.0f}" fill="white"/>'
    yield f'<text x="{_MARGIN}" y="{_MARGIN}" font-size="14">{escape(title)}</text>'
    yield '<g fill="none" stroke="#666666">'
    for place in places:
        bottom = tops[place.rank] + (_height(place) if place.lines else heights[place.rank])
        for other in place.below:
            yield _curve(place.x - left, bottom, other.x - left, tops[other.rank])
        if not place.lines:
            yield f'<path d="M{place.x - left:.1f} {tops[place.rank]:.1f} V{bottom:.1f}"/>'
    yield "</g>"
    for place in places:
        if place.lines:
            yield from _rectangle(place, place.x - left, tops[place.rank])
    yield "</svg>"


def _height(place: _Place) -> float:
    return _LINE * len(place.lines) + 8


def _curve(x1: float, y1: float, x2: float, y2: float) -> str:
    middle = (y1 + y2) / 2
    return (
        f'<path d="M{x1:.1f} {y1:.1f} C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} '
        f'{x2:.1f} {y2:.1f}"/>'
    )


def _rectangle(place: _Place, x: float, y: float) -> Iterator[str]:
    yield (
        f'<rect x="{x - _WIDTH / 2:.1f}" y="{y:.1f}" width="{_WIDTH}" '
        f'height="{_height(place):.1f}" rx="4" fill="{place.colour}" stroke="#444444"/>'
    )
    for i, line in enumerate(place.lines):
        weight = ' font-weight="bold"' if i == 0 else ""
        yield (
            f'<text x="{x:.1f}" y="{y + _LINE * (i + 1):.1f}" text-anchor="middle"'
            f"{weight}>{escape(line)}</text>"
        )
