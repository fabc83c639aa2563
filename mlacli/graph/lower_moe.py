"""Lowering of the mixture of experts: routing, grouping by expert, and the experts themselves.

Layouts of the two tables, at their upper bounds:

    routing  ids i32 [T * n_used] | weights f32 [T * n_used]
    groups   offsets i32 [n_expert + 1] | order i32 [T * n_used] | place i32 [T * n_used]
"""

from __future__ import annotations

from codegen.kernels import layers, moe, moe_few, router
from mlacli.graph.lower import At, Launch, Lower, Operand, Scratch, lowers
from mlacli.graph.lower_dense import (
    coded_tokens,
    gated_scratch,
    matrix_scratch,
    panel_scratch,
    row_pitch,
    walk_of,
)
from mlacli.graph.matrix import Matrix
from mlacli.graph.node import Node

WORD = 4


def _slots(lower: Lower, table: Node) -> int:
    """Most slots that a routing or groups table can hold."""
    return table.rows(lower.bounds) * lower.size(table, -1)


def _ids(table: Node) -> At:
    return At(table)


def _weights(lower: Lower, table: Node) -> At:
    return At(table, WORD * _slots(lower, table))


def _order(table: Node) -> At:
    return At(table, WORD * (int(table.attrs["n_expert"]) + 1))


def _place(lower: Lower, table: Node) -> At:
    order = _order(table)
    return At(table, order.offset + WORD * _slots(lower, table))


@lowers("route")
def _route(lower: Lower, node: Node) -> list[Launch]:
    logits, *bias = node.inputs
    spec = router.route(routing=node.attrs["routing"])
    operands: tuple[Operand, ...] = (
        _ids(node),
        _weights(lower, node),
        At(logits),
        At(bias[0]) if bias else 0,
        lower.tokens(node),
    )
    return [Launch(node, spec, operands)]


@lowers("group_tokens")
def _group_tokens(lower: Lower, node: Node) -> list[Launch]:
    routing = node.inputs[0]
    spec = router.group_tokens(n_expert=node.attrs["n_expert"], n_used=lower.size(node, -1))
    operands = (
        At(node),
        _order(node),
        _place(lower, node),
        _ids(routing),
        lower.tokens(node),
    )
    return [Launch(node, spec, operands)]


@lowers("gather_rows")
def _gather_rows(lower: Lower, node: Node) -> list[Launch]:
    x, groups = node.inputs
    spec = router.gather_rows(
        pitch=row_pitch(x, lower.size(x, -1)),
        n_used=lower.size(groups, -1),
        n_expert=groups.attrs["n_expert"],
    )
    return [Launch(node, spec, (At(node), At(x), _order(groups), At(groups)))]


def _sizes(w: Node) -> dict[str, int]:
    m: Matrix = w.attrs["matrix"]
    return {"n_rows": m.n_rows, "n_cols": m.n_cols}


@lowers("moe_up_gate", scratch=gated_scratch)
def _moe_up_gate(lower: Lower, node: Node) -> list[Launch]:
    gate, up, x, table = node.inputs
    m: Matrix = gate.attrs["matrix"]
    formats = {"fmt_gate": m.fmt, "fmt_up": up.attrs["matrix"].fmt}
    operands = (At(node), At(gate), At(up), At(x), At(table))
    if lower.few:
        spec = moe_few.moe_up_gate_vec(
            **_sizes(gate),
            **formats,
            n_used=lower.size(table, -1),
            coded=coded_tokens(lower, node) > 0,
        )
        walk = walk_of(lower, gate, lower.size(table, -1), At(table))
        return [Launch(node, spec, (*operands, lower.tokens(node)), walk=walk)]
    spec = moe.moe_up_gate(
        **_sizes(gate),
        **formats,
        n_expert=m.n_mats,
        coded_tokens=coded_tokens(lower, node),
        scratch_bytes=gated_scratch(lower, node) // lower.n_threads,
    )
    return [Launch(node, spec, (*operands, Scratch(node)))]


@lowers("moe_matmul", scratch=matrix_scratch)
def _moe_matmul(lower: Lower, node: Node) -> list[Launch]:
    w, x, table = node.inputs
    m: Matrix = w.attrs["matrix"]
    operands = (At(node), At(w), At(x), At(table))
    if lower.few:
        per_slot = len(x.shape) == 3  # rows by slot already, not by token
        spec = moe_few.moe_matmul_vec(
            **_sizes(w), fmt=m.fmt, n_used=lower.size(table, -1), per_slot=per_slot
        )
        walk = walk_of(lower, w, lower.size(table, -1), At(table))
        return [Launch(node, spec, (*operands, lower.tokens(node)), walk=walk)]
    spec = moe.moe_matmul(
        **_sizes(w), fmt=m.fmt, n_expert=m.n_mats, scratch_bytes=panel_scratch(lower, m)
    )
    return [Launch(node, spec, (*operands, Scratch(node)))]


@lowers("moe_down", scratch=matrix_scratch)
def _moe_down(lower: Lower, node: Node) -> list[Launch]:
    w, x, *tables, _ = node.inputs
    m: Matrix = w.attrs["matrix"]
    routing = tables[-1]
    n_used = lower.size(routing, -1)
    groups = tables[0]
    spec = moe.moe_down(
        **_sizes(w),
        fmt=m.fmt,
        n_expert=m.n_mats,
        n_used=n_used,
        scratch_bytes=panel_scratch(lower, m),
    )
    operands = (
        At(node),
        At(w),
        At(x),
        At(groups),
        _order(groups),
        _weights(lower, routing),
        Scratch(node),
    )
    return [Launch(node, spec, operands)]


@lowers("silu_mul")
def _silu_mul(lower: Lower, node: Node) -> list[Launch]:
    gate, up = node.inputs
    width = lower.size(node, -1) * lower.size(node, -2)
    spec = layers.silu_mul(n=width)
    return [Launch(node, spec, (At(node), At(gate), At(up), lower.tokens(node)))]


@lowers("moe_sum")
def _moe_sum(lower: Lower, node: Node) -> list[Launch]:
    z, *tables, _ = node.inputs
    routing = tables[-1]
    n_used = lower.size(routing, -1)
    spec = router.moe_sum(n=lower.size(node, -1), n_used=n_used)
    place = At(tables[0]) if lower.few else _place(lower, tables[0])
    operands = (At(node), At(z), _weights(lower, routing), place, lower.tokens(node))
    return [Launch(node, spec, operands)]
