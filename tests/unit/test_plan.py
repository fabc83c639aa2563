"""The arena planner: what lives at the same time never shares a byte."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacli.graph.node import Dim, Graph, Node
from mlacli.graph.plan import ALIGNMENT, Plan, make_plan

BOUNDS = {Dim.N_TOKENS: 7, Dim.N_KV: 96, Dim.N_OUT: 2}
ROWS: tuple[int | Dim, ...] = (1, 1, 2, *Dim)
WIDTHS: tuple[int | Dim, ...] = (32, 32, 64, Dim.N_KV)  # a8 rows are whole blocks of 32
Span = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A random graph with scratch bytes per node index and the names to keep."""

    graph: Graph
    scratch: dict[int, int]
    keep: tuple[str, ...]

    def plan(self) -> Plan:
        return make_plan(
            self.graph, BOUNDS, lambda node: self.scratch.get(node.index, 0), self.keep
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Weights, inputs and caches read by ops, some of which take over an input's memory."""
    graph = Graph()
    for i in range(draw(st.integers(1, 4))):
        graph.leaf(draw(st.sampled_from(["weight", "input", "cache"])), "f32", (64,), f"leaf{i}")
    readable = list(graph.nodes)
    for i in range(draw(st.integers(1, 25))):
        inputs = draw(st.lists(st.sampled_from(readable), min_size=1, max_size=3, unique=True))
        can_take = [j for j, n in enumerate(inputs) if not n.is_leaf or n.op == "cache"]
        inplace = draw(st.sampled_from([None, *can_take]))
        shape: tuple[int | Dim, ...] = draw(
            st.tuples(st.sampled_from(ROWS), st.sampled_from(WIDTHS))
        )
        dtype = draw(st.sampled_from(["f16", "f32", "a8"]))
        if inplace is not None:
            taken = inputs[inplace]
            shape, dtype = taken.shape, taken.dtype
            readable.remove(taken)
        readable.append(graph.add("op", dtype, shape, *inputs, name=f"op{i}", inplace=inplace))
    ops = list(graph.operations)
    graph.outputs += draw(st.lists(st.sampled_from(ops), max_size=2, unique=True))
    wide = st.dictionaries(st.sampled_from([n.index for n in ops]), st.integers(1, 5000))
    names = st.lists(st.sampled_from([n.name for n in ops]), max_size=3)
    return Case(graph, draw(wide), tuple(draw(names)))


def aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def lifetimes(graph: Graph, keep: Collection[str]) -> dict[Node, Span]:
    """Arena-owned node -> (op that makes it, op that uses it last), by looking at all pairs."""
    outside = [n.storage for n in graph.outputs]
    alive = {}
    for owner in graph.operations:
        if owner.storage is not owner or owner in outside:
            continue
        users = [
            n
            for n in graph.operations
            if n.storage is owner or any(used.storage is owner for used in n.inputs)
        ]
        kept = any(n.storage is owner and n.name in keep for n in graph.operations)
        alive[owner] = (owner.index, len(graph.nodes) if kept else max(n.index for n in users))
    return alive


def meets(a: Span, b: Span) -> bool:
    """Whether two half-open ranges overlap."""
    return a[0] < b[1] and b[0] < a[1]


@settings(max_examples=300, deadline=None)
@given(cases())
def test_nothing_that_lives_is_overwritten(case: Case) -> None:
    plan, alive = case.plan(), lifetimes(case.graph, case.keep)
    assert set(plan.offsets) == {n.index for n in alive}
    where = {
        n: (plan.offsets[n.index], plan.offsets[n.index] + aligned(n.nbytes(BOUNDS))) for n in alive
    }
    for node, span in where.items():
        assert span[0] % ALIGNMENT == 0
        assert 0 <= span[0] <= span[1] <= plan.size
        for other, other_span in where.items():
            together = meets(
                (alive[node][0], alive[node][1] + 1), (alive[other][0], alive[other][1] + 1)
            )
            if node is not other and together:
                assert not meets(span, other_span), (node, other)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_scratch_overlaps_nothing_that_lives_while_its_op_runs(case: Case) -> None:
    plan, alive = case.plan(), lifetimes(case.graph, case.keep)
    assert set(plan.scratch) == set(case.scratch)
    for index, start in plan.scratch.items():
        stop = start + case.scratch[index]
        assert start % ALIGNMENT == 0
        assert stop <= plan.size
        for node, (first, last) in alive.items():
            if first <= index <= last:
                begin = plan.offsets[node.index]
                assert not meets((start, stop), (begin, begin + node.nbytes(BOUNDS))), node


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_arena_holds_the_busiest_moment_and_no_more_than_everything(case: Case) -> None:
    plan, alive = case.plan(), lifetimes(case.graph, case.keep)
    sizes = {n: aligned(n.nbytes(BOUNDS)) for n in alive}
    scratch = {index: aligned(n) for index, n in case.scratch.items()}
    busiest = max(
        sum(sizes[n] for n, (first, last) in alive.items() if first <= op.index <= last)
        + scratch.get(op.index, 0)
        for op in case.graph.operations
    )
    assert busiest <= plan.size <= sum(sizes.values()) + sum(scratch.values())


def chain(*lengths: int) -> Graph:
    """Each op reads the one before it; the last one is the output."""
    graph = Graph()
    node = graph.leaf("input", "i32", (1,), "tokens")
    for i, n in enumerate(lengths):
        node = graph.add("op", "f32", (n,), node, name=f"op{i}")
    graph.outputs.append(node)
    return graph


def offsets(graph: Graph, keep: tuple[str, ...] = ()) -> tuple[int, list[int]]:
    plan = make_plan(graph, BOUNDS, lambda node: 0, keep)
    return plan.size, [plan.offsets[n.index] for n in graph.operations if n.index in plan.offsets]


def test_a_chain_needs_two_places() -> None:
    assert offsets(chain(16, 16, 16, 16, 16)) == (128, [0, 64, 0, 64])


def test_a_kept_node_keeps_its_place() -> None:
    size, where = offsets(chain(16, 16, 16, 16, 16), keep=("op0",))
    assert (size, where) == (192, [0, 64, 128, 64])


def test_small_results_share_the_place_of_a_large_one() -> None:
    graph = chain(48, 16)  # op0 is free after op1, the output
    a = graph.add("op", "f32", (16,), graph.nodes[0], name="a")
    b = graph.add("op", "f32", (32,), graph.nodes[0], name="b")
    graph.add("op", "f32", (16,), a, b, name="c")
    plan = make_plan(graph, BOUNDS, lambda node: 0)
    assert plan.size == 4 * 64  # b and c side by side with a; op0 was there before


def test_the_output_lies_elsewhere() -> None:
    assert offsets(chain(16, 99999)) == (64, [0])


def test_scratch_is_free_again_after_its_op() -> None:
    graph = chain(16, 16, 16)
    first = next(graph.operations)
    plan = make_plan(graph, BOUNDS, lambda node: 640 if node is first else 0)
    assert plan.scratch.keys() == {first.index}
    assert plan.size == 64 + 640  # op1 lies where the scratch was


def test_a_node_taken_over_shares_its_place() -> None:
    graph = chain(16, 16)
    taken = graph.nodes[1]
    added = graph.add("add", "f32", (16,), taken, name="add", inplace=0)
    graph.add("op", "f32", (16,), added, name="reader")
    plan = make_plan(graph, BOUNDS, lambda node: 0)
    assert added.index not in plan.offsets
    assert added.storage is taken
    assert plan.size == 128  # op0 = add, and reader; op1 is the output


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("f32", 4 * 7 * 64), ("f16", 2 * 7 * 64), ("i32", 4 * 7 * 64)]
)
def test_run_time_sizes_count_at_their_upper_bound(dtype: str, nbytes: int) -> None:
    graph = Graph()
    graph.add("op", dtype, (Dim.N_TOKENS, 64), name="x")
    assert make_plan(graph, BOUNDS, lambda node: 0).size == aligned(nbytes)
