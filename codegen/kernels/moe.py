"""Mixture of experts: the matrices of a MoE layer, and the pair up + gate of a dense one.

    hidden = silu(W_gate x) * (W_up x),   y += weight * W_down hidden

Expert e of stacked weights lies e matrices in. With many tokens the activation rows are sorted by
expert (offsets, order: codegen/kernels/router.py) and panels of weight rows meet all tokens of
their expert; with few, rows are streamed per slot (token * n_used + rank) by the ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.activations import row_bytes
from codegen.kernels.matmul import ROWS_PER_TILE, load_rows, store_rows
from codegen.kernels.panel import Store, decode_panel, multiply_panel, panel_rows
from codegen.kernels.rowdot import row_dot
from codegen.values import Pointer, Value
from codegen.vecmath import silu

if TYPE_CHECKING:
    from codegen.builder import Kernel


def input_pitch(fmt: BlockFormat, n_cols: int) -> int:
    """Bytes from one activation row to the next, for weights of this format."""
    return row_bytes(n_cols) if fmt.integer_dot else 4 * n_cols


def _panel_product(
    k: Kernel,
    fmt: BlockFormat,
    w: Pointer,
    first: Value,
    panel: Pointer,
    x: Pointer,
    n_tokens: Value,
    store: Store,
    n_rows: int,
    n_cols: int,
) -> None:
    decode_panel(k, fmt, w, first, panel, n_rows=n_rows, n_cols=n_cols)
    pitch = input_pitch(fmt, n_cols)
    multiply_panel(k, fmt, panel, x, n_tokens, store, n_cols=n_cols, x_pitch=pitch)


def _gated_panel(
    k: Kernel,
    y: Pointer,
    gate: Pointer,
    up: Pointer,
    x: Pointer,
    n_tokens: Value,
    first: Value,
    panel: Pointer,
    *,
    n_rows: int,
    n_cols: int,
    fmt_gate: BlockFormat,
    fmt_up: BlockFormat,
) -> None:
    """y[t, first:] = silu(gate x[t]) * (up x[t]) for one panel: the gate waits in y for up."""

    def store_gate(t: Value, total: Value) -> None:
        store_rows(k, y.at(t * n_rows + first), total, first, n_rows)

    def store_product(t: Value, total: Value) -> None:
        place = y.at(t * n_rows + first)
        gated = silu(k, load_rows(k, place, first, n_rows))
        store_rows(k, place, gated * total, first, n_rows)

    for fmt, w, store in ((fmt_gate, gate, store_gate), (fmt_up, up, store_product)):
        _panel_product(k, fmt, w, first, panel, x, n_tokens, store, n_rows, n_cols)


@kernel(y=ptr(f32), gate=ptr(u8), up=ptr(u8), x=ptr(u8), scratch=ptr(u8), n_tokens=dim())
def up_gate(
    k: Kernel,
    y: Pointer,
    gate: Pointer,
    up: Pointer,
    x: Pointer,
    scratch: Pointer,
    n_tokens: Value,
    *,
    n_rows: int,
    n_cols: int,
    fmt_gate: BlockFormat,
    fmt_up: BlockFormat,
    scratch_bytes: int,
) -> None:
    """y[t] = silu(gate x[t]) * (up x[t]): a dense layer, or the shared experts."""
    panel, n = scratch.bytes(k.thread * scratch_bytes), panel_rows(k.target)
    with k.tiles(-(-n_rows // n)) as tile:
        _gated_panel(
            k, y, gate, up, x, n_tokens, tile * n, panel,
            n_rows=n_rows, n_cols=n_cols, fmt_gate=fmt_gate, fmt_up=fmt_up,
        )  # fmt: skip


@kernel(y=ptr(f32), gate=ptr(u8), up=ptr(u8), x=ptr(u8), n_tokens=dim())
def up_gate_vec(
    k: Kernel,
    y: Pointer,
    gate: Pointer,
    up: Pointer,
    x: Pointer,
    n_tokens: Value,
    *,
    n_rows: int,
    n_cols: int,
    fmt_gate: BlockFormat,
    fmt_up: BlockFormat,
) -> None:
    """The same, row by row."""
    with row_parts(k, n_rows, 1) as (_, first, last):
        with k.loop(0, n_tokens) as t:
            row = x.bytes(t * input_pitch(fmt_gate, n_cols))
            with k.loop(first, last) as r:
                y[t * n_rows + r] = _gated(k, gate, up, row, r, n_cols, fmt_gate, fmt_up)


def _gated(
    k: Kernel,
    gate: Pointer,
    up: Pointer,
    x: Pointer,
    row: Value,
    n_cols: int,
    fmt_gate: BlockFormat,
    fmt_up: BlockFormat,
) -> Value:
    """silu(gate[row] . x) * (up[row] . x)."""
    a, b = (
        row_dot(k, fmt, w.bytes(row * fmt.row_bytes(n_cols)), x, n_cols)
        for fmt, w in ((fmt_gate, gate), (fmt_up, up))
    )
    return silu(k, a) * b


@contextmanager
def row_parts(k: Kernel, n_rows: int, n_slots: Any) -> Iterator[tuple[Value, Value, Value]]:
    """(slot, first row, last row + 1): a few rows of one slot at a time, for any thread."""
    parts = -(-n_rows // ROWS_PER_TILE)
    with k.tiles(k.const(n_slots, i64) * parts) as tile:
        first = tile % parts * ROWS_PER_TILE
        yield tile // parts, first, k.minimum(first + ROWS_PER_TILE, n_rows)


@contextmanager
def chosen(k: Kernel, ids: Pointer, slot: Value) -> Iterator[Value]:
    """The expert of a slot, as i64; nothing happens for a dropped slot."""
    expert = ids[slot]
    with k.when(expert >= 0):
        yield expert.to(i64)


# -- many tokens: rows sorted by expert -------------------------------------------------------


@contextmanager
def expert_panels(
    k: Kernel, offsets: Pointer, n_rows: int, n_expert: int
) -> Iterator[tuple[Value, Value, Value, Value]]:
    """(expert, first row of the panel, first sorted position, number of positions)."""
    n = panel_rows(k.target)
    panels = -(-n_rows // n)
    with k.tiles(panels * n_expert) as tile:
        expert, first = tile // panels, tile % panels * n
        start = offsets[expert].to(i64)
        count = offsets[expert + 1].to(i64) - start
        with k.when(count > 0):
            yield expert, first, start, count


@kernel(y=ptr(f32), gate=ptr(u8), up=ptr(u8), x=ptr(u8), offsets=ptr(i32), scratch=ptr(u8))
def moe_up_gate(
    k: Kernel,
    y: Pointer,
    gate: Pointer,
    up: Pointer,
    x: Pointer,
    offsets: Pointer,
    scratch: Pointer,
    *,
    n_rows: int,
    n_cols: int,
    fmt_gate: BlockFormat,
    fmt_up: BlockFormat,
    n_expert: int,
    scratch_bytes: int,
) -> None:
    """y[i] = silu(gate_e x[i]) * (up_e x[i]) for every sorted position i of every expert e."""
    panel, pitch = scratch.bytes(k.thread * scratch_bytes), input_pitch(fmt_gate, n_cols)
    with expert_panels(k, offsets, n_rows, n_expert) as (expert, first, start, count):
        _gated_panel(
            k,
            y.at(start * n_rows),
            gate.bytes(expert * (n_rows * fmt_gate.row_bytes(n_cols))),
            up.bytes(expert * (n_rows * fmt_up.row_bytes(n_cols))),
            x.bytes(start * pitch),
            count,
            first,
            panel,
            n_rows=n_rows,
            n_cols=n_cols,
            fmt_gate=fmt_gate,
            fmt_up=fmt_up,
        )


@kernel(y=ptr(f32), w=ptr(u8), x=ptr(u8), offsets=ptr(i32), scratch=ptr(u8))
def moe_matmul(
    k: Kernel,
    y: Pointer,
    w: Pointer,
    x: Pointer,
    offsets: Pointer,
    scratch: Pointer,
    *,
    n_rows: int,
    n_cols: int,
    fmt: BlockFormat,
    n_expert: int,
    scratch_bytes: int,
) -> None:
    """y[i] = w_e x[i] for every sorted position i of every expert e."""
    panel, pitch = scratch.bytes(k.thread * scratch_bytes), input_pitch(fmt, n_cols)
    with expert_panels(k, offsets, n_rows, n_expert) as (expert, first, start, count):

        def store(i: Value, total: Value) -> None:
            store_rows(k, y.at((start + i) * n_rows + first), total, first, n_rows)

        matrix = w.bytes(expert * (n_rows * fmt.row_bytes(n_cols)))
        rows = x.bytes(start * pitch)
        _panel_product(k, fmt, matrix, first, panel, rows, count, store, n_rows, n_cols)


@kernel(
    y=ptr(f32),
    w=ptr(u8),
    x=ptr(u8),
    offsets=ptr(i32),
    order=ptr(i32),
    weights=ptr(f32),
    scratch=ptr(u8),
)
def moe_down(
    k: Kernel,
    y: Pointer,
    w: Pointer,
    x: Pointer,
    offsets: Pointer,
    order: Pointer,
    weights: Pointer,
    scratch: Pointer,
    *,
    n_rows: int,
    n_cols: int,
    fmt: BlockFormat,
    n_expert: int,
    n_used: int,
    scratch_bytes: int,
) -> None:
    """y[token] += weight * (w_e x[i]): a panel of y's rows goes through its experts in id order,
    so no two threads add to the same place and the order of additions is fixed."""
    panel, n = scratch.bytes(k.thread * scratch_bytes), panel_rows(k.target)
    pitch = input_pitch(fmt, n_cols)
    with k.tiles(-(-n_rows // n)) as tile:
        first = tile * n
        with k.loop(0, n_expert) as expert:
            start = offsets[expert].to(i64)
            count = offsets[expert + 1].to(i64) - start

            def store(i: Value, total: Value, start: Value = start) -> None:
                slot = order[start + i].to(i64)
                place = y.at(slot // n_used * n_rows + first)
                added = load_rows(k, place, first, n_rows) + total * weights[slot]
                store_rows(k, place, added, first, n_rows)

            with k.when((count > 0) & k.cancelled().eq(0)):
                matrix = w.bytes(expert * (n_rows * fmt.row_bytes(n_cols)))
                rows = x.bytes(start * pitch)
                _panel_product(k, fmt, matrix, first, panel, rows, count, store, n_rows, n_cols)


# -- few tokens: rows streamed per slot --------------------------------------------------------


@kernel(y=ptr(f32), gate=ptr(u8), up=ptr(u8), x=ptr(u8), ids=ptr(i32), n_tokens=dim())
def moe_up_gate_vec(
    k: Kernel,
    y: Pointer,
    gate: Pointer,
    up: Pointer,
    x: Pointer,
    ids: Pointer,
    n_tokens: Value,
    *,
    n_rows: int,
    n_cols: int,
    fmt_gate: BlockFormat,
    fmt_up: BlockFormat,
    n_used: int,
) -> None:
    """y[slot] = silu(gate_e x[token]) * (up_e x[token]), e = ids[slot]."""
    with row_parts(k, n_rows, n_tokens * n_used) as (slot, first, last):
        with chosen(k, ids, slot) as expert:
            row = x.bytes(slot // n_used * input_pitch(fmt_gate, n_cols))
            gates = gate.bytes(expert * (n_rows * fmt_gate.row_bytes(n_cols)))
            ups = up.bytes(expert * (n_rows * fmt_up.row_bytes(n_cols)))
            with k.loop(first, last) as r:
                value = _gated(k, gates, ups, row, r, n_cols, fmt_gate, fmt_up)
                y[slot * n_rows + r] = value


@kernel(y=ptr(f32), w=ptr(u8), x=ptr(u8), ids=ptr(i32), n_tokens=dim())
def moe_matmul_vec(
    k: Kernel,
    y: Pointer,
    w: Pointer,
    x: Pointer,
    ids: Pointer,
    n_tokens: Value,
    *,
    n_rows: int,
    n_cols: int,
    fmt: BlockFormat,
    n_used: int,
    per_slot: bool,
) -> None:
    """y[slot] = w_e x[slot], or x[token] when the input has a row per token; e = ids[slot]."""
    pitch, row_size = input_pitch(fmt, n_cols), fmt.row_bytes(n_cols)
    with row_parts(k, n_rows, n_tokens * n_used) as (slot, first, last):
        with chosen(k, ids, slot) as expert:
            row = x.bytes((slot if per_slot else slot // n_used) * pitch)
            with k.loop(first, last) as r:
                matrix_row = w.bytes((expert * n_rows + r) * row_size)
                y[slot * n_rows + r] = row_dot(k, fmt, matrix_row, row, n_cols)


@kernel(y=ptr(f32), w=ptr(u8), x=ptr(u8), ids=ptr(i32), weights=ptr(f32), n_tokens=dim())
def moe_down_vec(
    k: Kernel,
    y: Pointer,
    w: Pointer,
    x: Pointer,
    ids: Pointer,
    weights: Pointer,
    n_tokens: Value,
    *,
    n_rows: int,
    n_cols: int,
    fmt: BlockFormat,
    n_used: int,
) -> None:
    """y[token] += sum over its slots, best first, of weight * (w_e x[slot])."""
    pitch, row_size = input_pitch(fmt, n_cols), fmt.row_bytes(n_cols)
    with row_parts(k, n_rows, n_tokens) as (token, first, last):
        with k.loop(token * n_used, (token + 1) * n_used) as slot:
            with chosen(k, ids, slot) as expert:
                row, weight = x.bytes(slot * pitch), weights[slot]
                with k.loop(first, last) as r:
                    matrix_row = w.bytes((expert * n_rows + r) * row_size)
                    at = token * n_rows + r
                    y[at] = y[at] + weight * row_dot(k, fmt, matrix_row, row, n_cols)
