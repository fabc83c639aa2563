"""Mixture of experts: the matrices of a MoE layer, and the pair up + gate of a dense one.

    hidden = silu(W_gate x) * (W_up x),   y += weight * W_down hidden

Expert e of stacked weights lies e matrices in. With many tokens the activation rows are sorted by
expert (offsets, order: codegen/kernels/router.py) and panels of weight rows meet all tokens of
their expert; with few, rows are streamed per slot (token * n_used + rank) by the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.activations import row_bytes
from codegen.kernels.matmul import ROWS_PER_TILE, load_rows, store_rows
from codegen.kernels.panel import decode_panel, multiply_panel, panel_rows
from codegen.kernels.rowdot import Store, Stream, few_dots, group_size
from codegen.values import Pointer, Value
from codegen.vecmath import silu

if TYPE_CHECKING:
    from codegen.builder import Kernel


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, perhaps the first of a stack."""

    data: Pointer
    fmt: BlockFormat
    n_rows: int
    n_cols: int

    @property
    def x_pitch(self) -> int:
        """Bytes from one row of its input to the next: a8 rows, or f32 for other formats."""
        return row_bytes(self.n_cols) if self.fmt.integer_dot else 4 * self.n_cols

    def row(self, index: Value) -> Pointer:
        return self.data.bytes(index * self.fmt.row_bytes(self.n_cols))

    def expert(self, index: Value) -> Matrix:
        """Another one of the stack."""
        return replace(self, data=self.row(index * self.n_rows))


# Multiplies some rows of a matrix with all tokens; the pointer is to what will be read after them.
Multiply = Callable[[Matrix, Pointer, Store], None]


def gated(
    k: Kernel,
    gate: Matrix,
    up: Matrix,
    first: Value,
    step: int,
    place: Callable[[Value], Pointer],
    multiply: Multiply,
) -> None:
    """place(t) = silu(gate x[t]) * (up x[t]) for the rows from `first` on: gate waits there for up.

    Matrices of one format share their code.
    """

    def store_gate(t: Value, total: Value) -> None:
        store_rows(k, place(t), total, first, gate.n_rows)

    def store_product(t: Value, total: Value) -> None:
        waiting = load_rows(k, place(t), total.type, first, gate.n_rows)
        store_rows(k, place(t), silu(k, waiting) * total, first, gate.n_rows)

    after_gate, after_up = up.row(first), gate.row(first + step)
    if gate.fmt != up.fmt:
        multiply(gate, after_gate, store_gate)
        multiply(up, after_up, store_product)
        return
    with k.loop(0, 2) as turn:
        is_gate = turn.eq(0)

        def store(t: Value, total: Value) -> None:
            with k.either(is_gate) as (yes, no):
                with yes:
                    store_gate(t, total)
                with no:
                    store_product(t, total)

        matrix = replace(gate, data=k.select_pointer(is_gate, gate.data, up.data))
        multiply(matrix, k.select_pointer(is_gate, after_gate, after_up), store)


# -- many tokens ----------------------------------------------------------------------------------


def panel_product(
    k: Kernel,
    w: Matrix,
    first: Value,
    panel: Pointer,
    x: Pointer,
    n_tokens: Value,
    store: Store,
) -> None:
    """One panel of a matrix meets all tokens."""
    decode_panel(k, w.fmt, w.data, first, panel, n_rows=w.n_rows, n_cols=w.n_cols)
    multiply_panel(k, w.fmt, panel, x, n_tokens, store, n_cols=w.n_cols, x_pitch=w.x_pitch)


def gated_panel(
    k: Kernel,
    y: Pointer,
    gate: Matrix,
    up: Matrix,
    x: Pointer,
    n_tokens: Value,
    first: Value,
    panel: Pointer,
) -> None:
    """y[t, first:] = silu(gate x[t]) * (up x[t]) for one panel."""

    def multiply(w: Matrix, following: Pointer, store: Store) -> None:
        panel_product(k, w, first, panel, x, n_tokens, store)

    def place(t: Value) -> Pointer:
        return y.at(t * gate.n_rows + first)

    gated(k, gate, up, first, panel_rows(k.target), place, multiply)


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
    gates, ups = Matrix(gate, fmt_gate, n_rows, n_cols), Matrix(up, fmt_up, n_rows, n_cols)
    with k.tiles(-(-n_rows // n)) as tile:
        gated_panel(k, y, gates, ups, x, n_tokens, tile * n, panel)


@contextmanager
def expert_panels(
    k: Kernel, offsets: Pointer, n_rows: int, n_expert: int
) -> Iterator[tuple[Value, Value, Value, Value]]:
    """(expert, first row of the panel, first sorted position, number of positions)."""
    n = panel_rows(k.target)
    panels = -(-n_rows // n)
    with k.tiles(panels * n_expert) as tile:
        expert, first = tile // panels, tile % panels * n
        start, count = positions(offsets, expert)
        with k.when(count > 0):
            yield expert, first, start, count


def positions(offsets: Pointer, expert: Value) -> tuple[Value, Value]:
    """(first sorted position of an expert, number of them)."""
    start = offsets[expert].to(i64)
    return start, offsets[expert + 1].to(i64) - start


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
    panel = scratch.bytes(k.thread * scratch_bytes)
    gates, ups = Matrix(gate, fmt_gate, n_rows, n_cols), Matrix(up, fmt_up, n_rows, n_cols)
    with expert_panels(k, offsets, n_rows, n_expert) as (expert, first, start, count):
        rows, out = x.bytes(start * gates.x_pitch), y.at(start * n_rows)
        gated_panel(k, out, gates.expert(expert), ups.expert(expert), rows, count, first, panel)


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
    panel, experts = scratch.bytes(k.thread * scratch_bytes), Matrix(w, fmt, n_rows, n_cols)
    with expert_panels(k, offsets, n_rows, n_expert) as (expert, first, start, count):

        def store(i: Value, total: Value) -> None:
            store_rows(k, y.at((start + i) * n_rows + first), total, first, n_rows)

        rows = x.bytes(start * experts.x_pitch)
        panel_product(k, experts.expert(expert), first, panel, rows, count, store)


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
    panel, experts = scratch.bytes(k.thread * scratch_bytes), Matrix(w, fmt, n_rows, n_cols)
    n = panel_rows(k.target)
    with k.tiles(-(-n_rows // n)) as tile:
        first = tile * n
        with k.loop(0, n_expert) as expert:
            start, count = positions(offsets, expert)

            def store(i: Value, total: Value, start: Value = start) -> None:
                slot = order[start + i].to(i64)
                place = y.at(slot // n_used * n_rows + first)
                added = load_rows(k, place, total.type, first, n_rows) + total * weights[slot]
                store_rows(k, place, added, first, n_rows)

            with k.when((count > 0) & k.cancelled().eq(0)):
                rows = x.bytes(start * experts.x_pitch)
                panel_product(k, experts.expert(expert), first, panel, rows, count, store)


# -- few tokens -----------------------------------------------------------------------------------


@contextmanager
def row_groups(k: Kernel, first: Value, n_rows: int) -> Iterator[Value]:
    """First rows of the groups in the tile that starts at row `first`."""
    stop = k.minimum(first + ROWS_PER_TILE, n_rows)
    with k.loop(first, stop, k.target.lanes) as group:
        yield group


def group_product(
    k: Kernel,
    w: Matrix,
    first: Value,
    following: Pointer,
    x: Pointer,
    n_tokens: Value | int,
    store: Store,
) -> None:
    """One group of rows meets all tokens."""
    rows = Stream(w.row(first), group_size(k, first, w.n_rows), following)
    few_dots(k, w.fmt, rows, x, n_tokens, store, w.n_cols, w.x_pitch)


def gated_group(
    k: Kernel,
    y: Pointer,
    gate: Matrix,
    up: Matrix,
    x: Pointer,
    n_tokens: Value | int,
    first: Value,
) -> None:
    """y[t, first:] = silu(gate x[t]) * (up x[t]) for one group of rows."""

    def multiply(w: Matrix, following: Pointer, store: Store) -> None:
        group_product(k, w, first, following, x, n_tokens, store)

    def place(t: Value) -> Pointer:
        return y.at(t * gate.n_rows + first)

    gated(k, gate, up, first, k.target.lanes, place, multiply)


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
    """The same as `up_gate`, row by row."""
    gates, ups = Matrix(gate, fmt_gate, n_rows, n_cols), Matrix(up, fmt_up, n_rows, n_cols)
    with k.tiles(-(-n_rows // ROWS_PER_TILE)) as tile:
        with row_groups(k, tile * ROWS_PER_TILE, n_rows) as first:
            gated_group(k, y, gates, ups, x, n_tokens, first)


@contextmanager
def slot_rows(
    k: Kernel, y: Pointer, ids: Pointer, n_slots: Value, n_rows: int
) -> Iterator[tuple[Value, Value, Value]]:
    """(slot, its expert, first row) of groups of rows. The rows of a dropped slot become zero: what
    comes next reads them, and multiplying anything with weight 0 could leave a NaN."""
    parts = -(-n_rows // ROWS_PER_TILE)
    with k.tiles(n_slots * parts) as tile:
        slot, expert = tile // parts, ids[tile // parts].to(i64)
        with row_groups(k, tile % parts * ROWS_PER_TILE, n_rows) as first:
            with k.either(expert >= 0) as (chosen, dropped):
                with chosen:
                    yield slot, expert, first
                with dropped:
                    zeros = k.zeros(f32 * k.target.lanes)
                    store_rows(k, y.at(slot * n_rows + first), zeros, first, n_rows)


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
    """y[slot] = silu(gate_e x[token]) * (up_e x[token]), e = ids[slot]; 0 for dropped slots."""
    gates, ups = Matrix(gate, fmt_gate, n_rows, n_cols), Matrix(up, fmt_up, n_rows, n_cols)
    with slot_rows(k, y, ids, n_tokens * n_used, n_rows) as (slot, expert, first):
        row, out = x.bytes(slot // n_used * gates.x_pitch), y.at(slot * n_rows)
        gated_group(k, out, gates.expert(expert), ups.expert(expert), row, 1, first)


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
    """y[slot] = w_e x[slot], or x[token] when the input has a row per token; e = ids[slot]; 0 for
    dropped slots."""
    experts, n = Matrix(w, fmt, n_rows, n_cols), k.target.lanes
    with slot_rows(k, y, ids, n_tokens * n_used, n_rows) as (slot, expert, first):

        def store(t: Value, total: Value) -> None:
            store_rows(k, y.at(slot * n_rows + first), total, first, n_rows)

        matrix = experts.expert(expert)
        row = x.bytes((slot if per_slot else slot // n_used) * experts.x_pitch)
        group_product(k, matrix, first, matrix.row(first + n), row, 1, store)


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
    experts, n = Matrix(w, fmt, n_rows, n_cols), k.target.lanes
    parts = -(-n_rows // ROWS_PER_TILE)
    with k.tiles(n_tokens * parts) as tile:
        token, start = tile // parts, tile % parts * ROWS_PER_TILE
        with k.loop(token * n_used, (token + 1) * n_used) as slot:
            expert = ids[slot].to(i64)
            with k.when(expert >= 0), row_groups(k, start, n_rows) as first:

                def store(
                    t: Value, total: Value, token: Value = token, slot: Value = slot,
                    first: Value = first,
                ) -> None:  # fmt: skip
                    place = y.at(token * n_rows + first)
                    added = load_rows(k, place, total.type, first, n_rows) + total * weights[slot]
                    store_rows(k, place, added, first, n_rows)

                matrix = experts.expert(expert)
                row = x.bytes(slot * experts.x_pitch)
                group_product(k, matrix, first, matrix.row(first + n), row, 1, store)
