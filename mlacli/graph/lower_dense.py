"""Lowering of the ops on plain rows: embedding, norms, quantisation, matrices, output rows."""

from __future__ import annotations

from codegen.kernels import activations, layers, matmul, moe, moe_few, panel
from codegen.kernels.matmul import Shape
from codegen.kernels.stream import tile_rows
from mlacli.graph.lower import At, Launch, Lower, Operand, Scratch, Walk, lowers
from mlacli.graph.matrix import Matrix
from mlacli.graph.node import Node


def row_pitch(x: Node, n: int) -> int:
    """Bytes from one row of n activations to the next, as the matrix kernels read them."""
    return activations.row_bytes(n) if x.dtype == "a8" else 4 * n


def panel_scratch(lower: Lower, matrix: Matrix) -> int:
    """Per-thread room for one decoded panel, on cache-line boundaries."""
    return -(-panel.panel_bytes(lower.target, matrix.fmt, matrix.n_cols) // 64) * 64


def matrix_scratch(lower: Lower, node: Node) -> int:
    matrices = [n.attrs["matrix"] for n in node.inputs if n.op == "weight"]
    widest = max(panel_scratch(lower, m) for m in matrices)
    return 0 if lower.few else widest * lower.n_threads


def walk_of(lower: Lower, w: Node, n: int, ids: At | None = None) -> Walk:
    """How the rows of n matrices are streamed for few tokens."""
    m: Matrix = w.attrs["matrix"]
    row = m.fmt.row_bytes(m.n_cols)
    step = tile_rows(lower.target, row)
    return Walk(w, n, -(-m.n_rows // step), step * row, ids)


def multiply(
    lower: Lower, node: Node, w: Node, x: Node, y: Operand, shape: Shape, residual: Operand
) -> Launch:
    """y = w x (+ residual): rows streamed for few tokens, panels for many."""
    matrix: Matrix = w.attrs["matrix"]
    tokens = lower.tokens(node)
    if lower.few:
        spec = matmul.matvec(shape=shape, fmt=matrix.fmt)
        walk = walk_of(lower, w, shape.n_heads)
        return Launch(node, spec, (y, At(w), At(x), residual, tokens), walk=walk)
    per_thread = panel_scratch(lower, matrix)
    spec = matmul.matmul(shape=shape, fmt=matrix.fmt, scratch_bytes=per_thread)
    return Launch(node, spec, (y, At(w), At(x), residual, Scratch(node), tokens))


@lowers("embed")
def _embed(lower: Lower, node: Node) -> list[Launch]:
    table, tokens = node.inputs
    spec = layers.embed(fmt=table.attrs["matrix"].fmt, n=lower.size(node, 1))
    return [Launch(node, spec, (At(node), At(table), At(tokens), lower.tokens(node)))]


@lowers("rms_norm")
def _rms_norm(lower: Lower, node: Node) -> list[Launch]:
    x, w = node.inputs
    spec = layers.rms_norm(
        n=lower.size(node, -1), x_stride=lower.size(x, -1), eps=node.attrs["eps"]
    )
    return [Launch(node, spec, (At(node), At(x), At(w), lower.tokens(node)))]


@lowers("quantize")
def _quantize(lower: Lower, node: Node) -> list[Launch]:
    n, rows = lower.size(node, -1), 1
    for size in node.shape[1:-1]:
        assert isinstance(size, int)
        rows *= size
    spec = activations.quantize(n=n, rows_per_token=rows, row_stride=node.attrs.get("stride", n))
    return [Launch(node, spec, (At(node), At(node.inputs[0]), lower.tokens(node)))]


@lowers("matmul", scratch=matrix_scratch)
def _matmul(lower: Lower, node: Node) -> list[Launch]:
    w, x, *rest = node.inputs
    matrix: Matrix = w.attrs["matrix"]
    shape = Shape(
        n_rows=matrix.n_rows,
        n_cols=matrix.n_cols,
        n_heads=1,
        w_pitch=0,
        x_token=row_pitch(x, matrix.n_cols),
        x_head=0,
        y_token=matrix.n_rows,
        y_head=0,
        residual=bool(rest),
    )
    residual: Operand = At(rest[0]) if rest else 0
    return [multiply(lower, node, w, x, At(node), shape, residual)]


@lowers("matmul_heads", scratch=matrix_scratch)
def _matmul_heads(lower: Lower, node: Node) -> list[Launch]:
    """y[t, h] = w[h] x[t, h] for all heads."""
    w, x = node.inputs
    m: Matrix = w.attrs["matrix"]
    pitch = row_pitch(x, m.n_cols)
    shape = Shape(
        m.n_rows, m.n_cols, m.n_mats, m.pitch, m.n_mats * pitch, pitch, m.n_mats * m.n_rows,
        m.n_rows,
    )  # fmt: skip
    return [multiply(lower, node, w, x, At(node), shape, 0)]


def coded_tokens(lower: Lower, node: Node) -> int:
    """Most tokens of what up and gate give as a8; 0 where it is f32."""
    return lower.size(node, 0) if node.dtype == "a8" else 0


def gated_scratch(lower: Lower, node: Node) -> int:
    """A panel for each thread, and room for what is yet to become a8."""
    room = moe.waiting_bytes(lower.target, coded_tokens(lower, node))
    return 0 if lower.few else matrix_scratch(lower, node) + lower.n_threads * room


@lowers("up_gate", scratch=gated_scratch)
def _up_gate(lower: Lower, node: Node) -> list[Launch]:
    """silu(gate x) * (up x)."""
    gate, up, x = node.inputs
    m: Matrix = gate.attrs["matrix"]
    sizes = {
        "n_rows": m.n_rows,
        "n_cols": m.n_cols,
        "fmt_gate": m.fmt,
        "fmt_up": up.attrs["matrix"].fmt,
    }
    operands = (At(node), At(gate), At(up), At(x))
    coded = coded_tokens(lower, node)
    if lower.few:
        spec = moe_few.up_gate_vec(**sizes, coded_tokens=coded)
        walk = walk_of(lower, gate, 1)
        return [Launch(node, spec, (*operands, lower.tokens(node)), walk=walk)]
    spec = moe.up_gate(
        **sizes, coded_tokens=coded, scratch_bytes=gated_scratch(lower, node) // lower.n_threads
    )
    return [Launch(node, spec, (*operands, Scratch(node), lower.tokens(node)))]


@lowers("take_rows")
def _take_rows(lower: Lower, node: Node) -> list[Launch]:
    x, rows = node.inputs
    spec = layers.take_rows(n=lower.size(node, 1))
    return [Launch(node, spec, (At(node), At(x), At(rows), lower.tokens(node)))]
