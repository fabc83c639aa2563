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
from codegen.kernels.panel import Rows, multiply_rows, panel_rows
from codegen.kernels.rowdot import Store, Stream, few_dots, group_size, tiles_ahead
from codegen.values import Pointer, Value
from codegen.vecmath import silu

if TYPE_CHECKING:
    from codegen.builder import Kernel

PANELS_PER_PART, PARTS_PER_THREAD = 8, 4


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
    following: Pointer,
    place: Callable[[Value], Pointer],
    multiply: Multiply,
) -> None:
    """place(t) = silu(gate x[t]) * (up x[t]) for the rows from `first` on: gate waits there for up.
    `following`: what is read after both.

    Matrices of one format share their code.
    """

    def store_gate(t: Value, total: Value) -> None:
        store_rows(k, place(t), total, first, gate.n_rows)

    def store_product(t: Value, total: Value) -> None:
        waiting = load_rows(k, place(t), total.type, first, gate.n_rows)
        store_rows(k, place(t), silu(k, waiting) * total, first, gate.n_rows)

    if gate.fmt != up.fmt:
        multiply(gate, up.row(first), store_gate)
        multiply(up, following, store_product)
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
        multiply(matrix, k.select_pointer(is_gate, up.row(first), following), store)


# -- many tokens ----------------------------------------------------------------------------------


def panel_product(
    k: Kernel,
    w: Matrix,
    first: Value,
    following: Pointer,
    panel: Pointer,
    x: Pointer,
    n_tokens: Value,
    store: Store,
) -> None:
    """One panel of a matrix meets all tokens."""
    multiply_rows(
        k, w.fmt, Rows(w.data, first, w.n_rows), x, n_tokens, store, panel,
        n_cols=w.n_cols, x_pitch=w.x_pitch, following=following,
    )  # fmt: skip


def gated_panel(
    k: Kernel,
    y: Pointer,
    gate: Matrix,
    up: Matrix,
    x: Pointer,
    n_tokens: Value,
    first: Value,
    following: Pointer,
    panel: Pointer,
) -> None:
    """y[t, first:] = silu(gate x[t]) * (up x[t]) for one panel."""

    def multiply(w: Matrix, following: Pointer, store: Store) -> None:
        panel_product(k, w, first, following, panel, x, n_tokens, store)

    def place(t: Value) -> Pointer:
        return y.at(t * gate.n_rows + first)

    gated(k, gate, up, first, following, place, multiply)


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
    with tiles_ahead(k, -(-n_rows // n)) as (tile, next_tile):
        gated_panel(k, y, gates, ups, x, n_tokens, tile * n, gates.row(next_tile * n), panel)


@contextmanager
def expert_panels(
    k: Kernel, offsets: Pointer, w: Matrix, n_expert: int
) -> Iterator[tuple[Value, Value, Pointer, Value, Value]]:
    """(expert, first row of the panel, the stack's panel after it, first sorted position, number of
    positions)."""
    n = panel_rows(k.target)
    panels = -(-w.n_rows // n)
    with tiles_ahead(k, panels * n_expert) as (tile, next_tile):
        expert, first = tile // panels, tile % panels * n
        start, count = positions(offsets, expert)
        with k.when(count > 0):
            following = w.expert(next_tile // panels).row(next_tile % panels * n)
            yield expert, first, following, start, count


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
    with expert_panels(k, offsets, gates, n_expert) as (expert, first, following, start, count):
        rows, out = x.bytes(start * gates.x_pitch), y.at(start * n_rows)
        gated_panel(
            k, out, gates.expert(expert), ups.expert(expert), rows, count, first, following, panel
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
    panel, experts = scratch.bytes(k.thread * scratch_bytes), Matrix(w, fmt, n_rows, n_cols)
    with expert_panels(k, offsets, experts, n_expert) as (expert, first, following, start, count):

        def store(i: Value, total: Value) -> None:
            store_rows(k, y.at((start + i) * n_rows + first), total, first, n_rows)

        rows = x.bytes(start * experts.x_pitch)
        panel_product(k, experts.expert(expert), first, following, panel, rows, count, store)


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
    """y[token] += weight * (w_e x[i]): a part of y's rows goes through its experts in id order, so
    no two threads add to the same place and the order of additions is fixed.

    A part is several panels, as far as there are threads for all parts: an expert's activations
    are read again for each panel, while they are near.
    """
    panel, experts = scratch.bytes(k.thread * scratch_bytes), Matrix(w, fmt, n_rows, n_cols)
    n, panels = panel_rows(k.target), k.const(-(-n_rows // panel_rows(k.target)), i64)
    height = n * k.maximum(
        1, k.minimum(PANELS_PER_PART, panels // (PARTS_PER_THREAD * k.n_threads))
    )
    with tiles_ahead(k, (n_rows + height - 1) // height) as (tile, next_tile):
        start, next_start = tile * height, next_tile * height
        with k.loop(0, n_expert) as expert:
            position, count = positions(offsets, expert)
            after = k.select_pointer(
                expert.eq(n_expert - 1),
                experts.row(next_start),
                experts.expert(expert + 1).row(start),
            )
            with k.when((count > 0) & k.cancelled().eq(0)):
                rows, matrix = x.bytes(position * experts.x_pitch), experts.expert(expert)
                stop = k.minimum(start + height, n_rows)
                with k.loop(start, stop, n) as first:

                    def store(
                        i: Value, total: Value, position: Value = position, first: Value = first
                    ) -> None:
                        slot = order[position + i].to(i64)
                        place = y.at(slot // n_used * n_rows + first)
                        added = load_rows(k, place, total.type, first, n_rows)
                        store_rows(k, place, added + total * weights[slot], first, n_rows)

                    following = k.select_pointer(first + n < stop, matrix.row(first + n), after)
                    panel_product(k, matrix, first, following, panel, rows, count, store)


# -- few tokens -----------------------------------------------------------------------------------


@contextmanager
def row_groups(k: Kernel, start: Value, n_rows: int) -> Iterator[tuple[Value, Value]]:
    """(first row, whether it is the last) of the groups in the tile that starts at row `start`."""
    stop = k.minimum(start + ROWS_PER_TILE, n_rows)
    with k.loop(start, stop, k.target.lanes) as first:
        yield first, first + k.target.lanes >= stop


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
    following: Pointer,
) -> None:
    """y[t, first:] = silu(gate x[t]) * (up x[t]) for one group of rows."""

    def multiply(w: Matrix, following: Pointer, store: Store) -> None:
        group_product(k, w, first, following, x, n_tokens, store)

    def place(t: Value) -> Pointer:
        return y.at(t * gate.n_rows + first)

    gated(k, gate, up, first, following, place, multiply)


def tile_count(n_rows: int) -> int:
    return -(-n_rows // ROWS_PER_TILE)


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
    with tiles_ahead(k, tile_count(n_rows)) as (tile, next_tile):
        after = gates.row(next_tile * ROWS_PER_TILE)
        with row_groups(k, tile * ROWS_PER_TILE, n_rows) as (first, is_last):
            following = k.select_pointer(is_last, after, gates.row(first + k.target.lanes))
            gated_group(k, y, gates, ups, x, n_tokens, first, following)


@contextmanager
def slot_rows(
    k: Kernel, y: Pointer, ids: Pointer, n_slots: Value, w: Matrix
) -> Iterator[tuple[Value, Value, Value, Pointer]]:
    """(slot, its expert, first row, the stack's group after it) of groups of rows.

    The rows of a dropped slot become zero: what comes next reads them, and multiplying anything
    with weight 0 could leave a NaN.
    """
    parts, n = tile_count(w.n_rows), k.target.lanes

    def place(tile: Value) -> tuple[Value, Value, Value]:
        return tile // parts, ids[tile // parts].to(i64), tile % parts * ROWS_PER_TILE

    with tiles_ahead(k, n_slots * parts) as (tile, next_tile):
        slot, expert, start = place(tile)
        _, next_expert, next_start = place(next_tile)
        after = w.expert(k.maximum(next_expert, 0)).row(next_start)
        with row_groups(k, start, w.n_rows) as (first, is_last):
            with k.either(expert >= 0) as (chosen, dropped):
                with chosen:
                    following = w.expert(expert).row(first + n)
                    yield slot, expert, first, k.select_pointer(is_last, after, following)
                with dropped:
                    store_rows(k, y.at(slot * w.n_rows + first), k.zeros(f32 * n), first, w.n_rows)


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
    with slot_rows(k, y, ids, n_tokens * n_used, gates) as (slot, expert, first, following):
        row, out = x.bytes(slot // n_used * gates.x_pitch), y.at(slot * n_rows)
        gated_group(k, out, gates.expert(expert), ups.expert(expert), row, 1, first, following)


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
    experts = Matrix(w, fmt, n_rows, n_cols)
    with slot_rows(k, y, ids, n_tokens * n_used, experts) as (slot, expert, first, following):

        def store(t: Value, total: Value) -> None:
            store_rows(k, y.at(slot * n_rows + first), total, first, n_rows)

        row = x.bytes((slot if per_slot else slot // n_used) * experts.x_pitch)
        group_product(k, experts.expert(expert), first, following, row, 1, store)


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
    experts, n, parts = Matrix(w, fmt, n_rows, n_cols), k.target.lanes, tile_count(n_rows)

    def of_slot(slot: Value, row: Value) -> Pointer:
        """A row of the slot's expert; some row if the slot is dropped."""
        return experts.expert(k.maximum(ids[slot].to(i64), 0)).row(row)

    with tiles_ahead(k, n_tokens * parts) as (tile, next_tile):
        token, start = tile // parts, tile % parts * ROWS_PER_TILE
        next_part = of_slot(next_tile // parts * n_used, next_tile % parts * ROWS_PER_TILE)
        last_slot = (token + 1) * n_used - 1
        with k.loop(token * n_used, last_slot + 1) as slot:
            expert = ids[slot].to(i64)
            next_slot = of_slot(k.minimum(slot + 1, last_slot), start)
            after = k.select_pointer(slot.eq(last_slot), next_part, next_slot)
            with k.when(expert >= 0), row_groups(k, start, n_rows) as (first, is_last):
                matrix = experts.expert(expert)
                following = k.select_pointer(is_last, after, matrix.row(first + n))
                place, weight = y.at(token * n_rows + first), weights[slot]

                def store(
                    t: Value, total: Value, place: Pointer = place, weight: Value = weight,
                    first: Value = first,
                ) -> None:  # fmt: skip
                    added = load_rows(k, place, total.type, first, n_rows) + total * weight
                    store_rows(k, place, added, first, n_rows)

                row = x.bytes(slot * experts.x_pitch)
                group_product(k, matrix, first, following, row, 1, store)
