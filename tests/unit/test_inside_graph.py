"""mlacli graph: what it says of the demo model's graphs, and its pictures."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlacli.__main__ import main
from mlacli.errors import UsageError
from mlacli.graph.node import Dim, size_of
from mlacli.inside import graph_text
from mlacli.inside.graph_dot import COLOURS, dot_text, kind
from mlacli.inside.graph_facts import GraphFacts, graphs_of, named, parts, planned, slices
from mlacli.inside.graph_svg import svg_text
from mlacli.machine import this_target
from mlacli.settings import RunSettings

N_LAYER = 6
SVG = "{http://www.w3.org/2000/svg}"


@cache
def graphs(**flags: Any) -> dict[str, GraphFacts]:
    return {g.name: g for g in graphs_of(RunSettings(n_ctx=512, n_threads=2, **flags))}


def test_facts_are_those_of_the_plan() -> None:
    settings = RunSettings(n_ctx=512, n_threads=2)
    plan = planned(settings, this_target())
    assert list(graphs()) == list(plan.graphs) == ["few", "absorbed", "expanded"]
    for name, graph in graphs().items():
        real = plan.graphs[name]
        operations = list(real.graph.operations)
        assert [n.name for n in graph.nodes] == [n.name for n in operations]
        assert graph.arena_bytes == real.plan.size
        for fact, node in zip(graph.nodes, operations, strict=True):
            assert fact.offset == real.plan.offsets.get(node.index)
            assert (fact.in_place is None) == (node.inplace is None)
            assert len(fact.kernels) >= 1
            bounds = real.lower.bounds
            sizes = {dim.value: bounds[dim] for dim in Dim}
            told = [sizes[s] if isinstance(s, str) else s for s in fact.shape]
            assert told == [size_of(s, bounds) for s in node.shape]


def test_alike_layers_are_shown_once() -> None:
    """Layer 0 is dense, the last one computes only what is asked for: 1 to 4 are alike."""
    found = [part.layers for part in parts(graphs()["absorbed"])]
    assert found == [(), (0,), (1, 2, 3, 4), (5,), (), (5,), ()]
    text = graph_text.graph_text(graphs()["absorbed"])
    assert "blk.1 .. blk.4 alike" in text and "attn_norm-1" in text and "attn_norm-2" not in text
    every = graph_text.graph_text(graphs()["absorbed"], every=True)
    assert all(f"attn_norm-{layer} " in every for layer in range(N_LAYER))
    assert "alike" not in every


def test_alike_slices_of_heads_are_shown_once() -> None:
    graph = graphs(mla=2, flash_attn=False)["expanded"]
    layer = [n for n in graph.nodes if n.layer == 1]
    found = [(run[0].name, heads) for run, heads in slices(layer)]
    assert ("k-1.0", [0]) in found and ("k-1.1", list(range(1, 8))) in found
    assert sum(len(run) * max(1, len(heads)) for run, heads in slices(layer)) == len(layer)
    assert "(heads 1 .. 7 alike)" in graph_text.graph_text(graph)


def test_a_layer_that_differs_is_not_folded() -> None:
    """Another weight type in one layer is another kernel."""
    graph = graphs()["absorbed"]
    nodes = tuple(replace(n, kernels=("other",)) if n.name == "q-3" else n for n in graph.nodes)
    found = [p.layers for p in parts(replace(graph, nodes=nodes)) if p.layers]
    assert found == [(0,), (1, 2), (3,), (4,), (5,), (5,)]


def test_ops_are_counted() -> None:
    graph = graphs()["expanded"]
    counts = Counter(n.op for n in graph.nodes)
    for line in graph_text.ops_lines(graph)[2:-1]:
        op, n, *_ = line.split()
        assert counts.pop(op) == int(n)
    assert not counts
    assert graph_text.ops_lines(graph)[-1].split() == ["total", str(len(graph.nodes))]


def test_modes_stand_side_by_side() -> None:
    """Each column is the graph of that mode."""
    text = graph_text.modes_text(RunSettings(n_ctx=512, n_threads=2))
    prompt, *_ = text.split("\n\n")
    totals = prompt.splitlines()[-1].split()[1:]
    assert totals == [
        str(len(list(graphs(mla=mla, flash_attn=fa).values())[-1].nodes))
        for mla, fa in graph_text.MODES
    ]
    flash = next(line for line in prompt.splitlines() if line.startswith("flash_absorbed"))
    assert flash.split() == ["flash_absorbed", str(N_LAYER)]  # -mla 1 fa only


def test_a_mode_that_the_cache_type_forbids_is_left_out() -> None:
    text = graph_text.modes_text(RunSettings(mla=0, type_v="q8_0", n_ctx=512, n_threads=2))
    assert "do not go together with -mla 0 no fa, -mla 1 no fa" in text


def test_an_unknown_graph_is_refused() -> None:
    with pytest.raises(UsageError, match="--graph: 'standard' is not one of few, absorbed, expan"):
        named(tuple(graphs().values()), "standard")


# -- pictures -------------------------------------------------------------------------------------


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    found = [r.attrib for r in ET.fromstring(svg).iter(SVG + "rect") if "x" in r.attrib]
    return [tuple(float(r[k]) for k in ("x", "y", "width", "height")) for r in found]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "graph"),
    [
        ({}, "absorbed"),
        ({}, "expanded"),
        ({}, "few"),
        ({"mla": 0}, "standard"),
        ({"mla": 2, "flash_attn": False}, "expanded"),
        ({"mla": 1, "fmoe": False}, "absorbed"),
    ],
)
def test_svg_shows_a_layer(flags: dict[str, Any], graph: str) -> None:
    """Every op once, no box over another one, and everything inside the picture."""
    facts = graphs(**flags)[graph]
    svg = svg_text(facts, None)
    root = ET.fromstring(svg)
    texts = [t.text or "" for t in root.iter(SVG + "text")]
    shown = [n for run, _ in slices([n for n in facts.nodes if n.layer == 1]) for n in run]
    for node in shown:
        assert sum(text.split("  ")[0] == node.name for text in texts) == 1, node.name
    wide, high = (float(root.attrib[k]) for k in ("width", "height"))
    found = boxes(svg)
    assert len(found) == len({*found}) >= len(shown) + 2
    for i, (x, y, w, h) in enumerate(found):
        assert x >= 0 and y >= 0 and x + w <= wide and y + h <= high
        for x2, y2, w2, h2 in found[:i]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_svg_edges_lead_down_from_box_to_box() -> None:
    """Each op's inputs stand above it: the ends of the lines rise nowhere."""
    svg = svg_text(graphs()["absorbed"], 1)
    for path in ET.fromstring(svg).iter(SVG + "path"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
        ys = numbers[1::2] if "C" in path.attrib["d"] else numbers[1:]
        assert all(a <= b for a, b in pairwise(ys))


def test_svg_of_a_layer_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"--layer: 6 is out of range \(0 to 5\)"):
        svg_text(graphs()["absorbed"], N_LAYER)


@pytest.mark.parametrize("every", [True, False])
def test_dot_has_an_edge_for_each_input(every: bool) -> None:
    facts = graphs()["absorbed"]
    lines = dot_text(facts, every=every).splitlines()
    declared = {m[1] for line in lines if (m := re.match(r' +"([^"]+)" \[', line))}
    edges = [m.groups() for line in lines if (m := re.match(r' +"([^"]+)" -> "([^"]+)"', line))]
    assert all(a in declared and b in declared for a, b in edges)
    shown = {n.name: n for n in facts.nodes if n.name in declared}
    assert (len(shown) == len(facts.nodes)) == every
    for node in shown.values():
        inputs = {i for i in node.inputs if not i.endswith((".weight", ".bias"))}
        inputs -= {n for n, leaf in facts.leaves.items() if leaf.op == "weight"}
        assert len([a for a, b in edges if b == node.name]) == len(inputs)
    assert dot_text(facts, every=every).count("{") == dot_text(facts, every=every).count("}")


def test_kinds_have_colours() -> None:
    ops = {n.op for mode in ({}, {"mla": 0}) for g in graphs(**mode).values() for n in g.nodes}
    assert {kind(op) for op in ops} == set(COLOURS)
    assert (kind("flash_expanded"), kind("moe_down"), kind("rms_norm")) == (
        "attention", "experts", "rows",
    )  # fmt: skip


# -- the command ----------------------------------------------------------------------------------


def test_json_has_every_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "-c", "512", "--json", "--graph", "absorbed"]) == 0
    found = json.loads(capsys.readouterr().out)["absorbed"]
    names = {node["name"] for node in found["nodes"]} | set(found["leaves"])
    assert len(found["nodes"]) == len(graphs()["absorbed"].nodes)
    assert all(i in names for node in found["nodes"] for i in node["inputs"])
    weight = found["leaves"]["blk.1.attn_q_b.weight"]
    assert (weight["dtype"], weight["shape"]) == ("Q8_0", [1, 512, 192])


def test_a_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "layer.svg"
    assert main(["graph", "-c", "512", "-t", "2", "--svg", str(file), "--graph", "expanded"]) == 0
    assert file.read_text() == svg_text(graphs()["expanded"], None)
    assert main(["graph", "-c", "512", "--dot", "-", "--graph", "few"]) == 0
    assert capsys.readouterr().out.startswith("digraph few {")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--dot", "a.png"], "--dot: a.png: the name does not end with .dot"),
        (["--svg", "/no/such/a.svg"], "--svg: /no/such/a.svg: there is no such folder"),
        (["--svg", "a.svg", "--json"], "--json and --svg: give one of them, not both"),
        (["--layer", "1"], "--layer: needs --svg FILE"),
        (["--graph", "fast"], "--graph: 'fast' is not one of few, absorbed, expanded"),
    ],
)
def test_wrong_flags_give_one_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["graph", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {complaint}")
    assert captured.err.count("\n") == 1
