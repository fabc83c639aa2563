"""Mixture of experts for few tokens, and the pair up + gate of a dense layer.

    hidden = silu(W_gate x) * (W_up x),   z = W_down hidden

Rows of weights are streamed per slot (token * n_used + rank) by the experts' ids, not sorted. What
the experts give is weighted and added up by router.moe_sum: a kernel that did all of it would walk
from expert to expert every few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.blocks import BLOCK
from codegen.kernels.gated import Hidden, Matrix, gated
from codegen.kernels.matmul import store_rows
from codegen.kernels.rowdot import Store, few_dots
from codegen.kernels.spread import Activations, Inputs, Take, activations
from codegen.kernels.stream import Stream, group_size, tile_rows, tiles_ahead
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel


@contextmanager
def row_groups(k: Kernel, start: Value, w: Matrix) -> Iterator[tuple[Value, Value]]:
    """(first row, whether it is the last) of the groups in the tile that starts at row `start`."""
    stop = k.minimum(start + tile_rows(k.target, w.pitch), w.n_rows)
    with k.loop(start, stop, k.target.lanes) as first:
        yield first, first + k.target.lanes >= stop


def group_product(
    k: Kernel,
    w: Matrix,
    first: Value,
    following: Pointer,
    take: Take,
    n_tokens: Value | int,
    store: Store,
) -> None:
    """One group of rows meets all tokens."""
    rows = Stream(w.row(first), group_size(k, first, w.n_rows), following)
    few_dots(k, w.fmt, rows, take, n_tokens, store)


def rows_of(held: Activations, x: Pointer, key: Value) -> Take:
    """Takes the activations from the rows at x, which `key` tells from others."""

    def take(fmt: BlockFormat, first: Value, count: Value | int) -> Inputs:
        rows = held.hold(key + first, x.bytes(first * held.pitch), count)
        return rows.inputs(fmt, held.k.const(0, i64), count)

    return take


def gated_group(
    k: Kernel,
    out: Hidden,
    gate: Matrix,
    up: Matrix,
    take: Take,
    n_tokens: Value | int,
    first: Value,
    following: Pointer,
) -> None:
    """out[t, first:] = silu(gate x[t]) * (up x[t]) for one group of rows."""

    def multiply(w: Matrix, following: Pointer, store: Store) -> None:
        group_product(k, w, first, following, take, n_tokens, store)

    def place(t: Value) -> Pointer:
        return out.place(t, first)

    gated(k, gate, up, first, following, place, multiply)


def hidden(k: Kernel, y: Pointer, n: int, coded_tokens: int) -> Hidden:
    waiting = k.stack(f32 * BLOCK, coded_tokens).at(0, f32) if coded_tokens else None
    return Hidden(y, n, BLOCK, waiting)


def close_group(k: Kernel, out: Hidden, first: Value, n_tokens: Value | int) -> None:
    """The group from row `first` on is there for all tokens."""
    if out.waiting is not None:
        with k.when(((first + k.target.lanes) % out.rows).eq(0)):
            out.close(k, first // out.rows * out.rows, n_tokens)


def tile_count(k: Kernel, w: Matrix) -> int:
    return -(-w.n_rows // tile_rows(k.target, w.pitch))


@kernel(y=ptr(u8), gate=ptr(u8), up=ptr(u8), x=ptr(u8), n_tokens=dim())
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
    coded_tokens: int = 0,
) -> None:
    """The same as `up_gate`, row by row."""
    gates, ups = Matrix(gate, fmt_gate, n_rows, n_cols), Matrix(up, fmt_up, n_rows, n_cols)
    held = activations(k, (fmt_gate, fmt_up), n_cols, gates.x_pitch)
    take = rows_of(held, x, k.const(0, i64))
    out, step = hidden(k, y, n_rows, coded_tokens), tile_rows(k.target, gates.pitch)
    with tiles_ahead(k, tile_count(k, gates)) as (tile, next_tile):
        after = gates.row(next_tile * step)
        with row_groups(k, tile * step, gates) as (first, is_last):
            following = k.select_pointer(is_last, after, gates.row(first + k.target.lanes))
            gated_group(k, out, gates, ups, take, n_tokens, first, following)
            close_group(k, out, first, n_tokens)


@contextmanager
def slot_rows(
    k: Kernel,
    ids: Pointer,
    n_slots: Value,
    w: Matrix,
    place: Callable[[Value, Value], Pointer],
    done: Callable[[Value, Value], None] = lambda slot, first: None,
) -> Iterator[tuple[Value, Value, Value, Pointer]]:
    """(slot, its expert, first row, the stack's group after it) of groups of rows, whose results go
    to place(slot, first row); then done(slot, first row) is called.

    The rows of a dropped slot become zero: what comes next reads them, and multiplying anything
    with weight 0 could leave a NaN.
    """
    parts, n, step = tile_count(k, w), k.target.lanes, tile_rows(k.target, w.pitch)

    def start_of(tile: Value) -> tuple[Value, Value, Value]:
        return tile // parts, ids[tile // parts].to(i64), tile % parts * step

    with tiles_ahead(k, n_slots * parts) as (tile, next_tile):
        slot, expert, start = start_of(tile)
        _, next_expert, next_start = start_of(next_tile)
        after = w.expert(k.maximum(next_expert, 0)).row(next_start)
        with row_groups(k, start, w) as (first, is_last):
            with k.either(expert >= 0) as (chosen, dropped):
                with chosen:
                    following = w.expert(expert).row(first + n)
                    yield slot, expert, first, k.select_pointer(is_last, after, following)
                with dropped:
                    store_rows(k, place(slot, first), k.zeros(f32 * n), first, w.n_rows)
            done(slot, first)


@kernel(y=ptr(u8), gate=ptr(u8), up=ptr(u8), x=ptr(u8), ids=ptr(i32), n_tokens=dim())
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
    coded: bool = False,
) -> None:
    """y[slot] = silu(gate_e x[token]) * (up_e x[token]), e = ids[slot], f32 or a8; 0 for dropped
    slots."""
    gates, ups = Matrix(gate, fmt_gate, n_rows, n_cols), Matrix(up, fmt_up, n_rows, n_cols)
    held = activations(k, (fmt_gate, fmt_up), n_cols, gates.x_pitch, capacity=1)
    made, only = hidden(k, y, n_rows, int(coded)), k.const(0, i64)

    def place(slot: Value, first: Value) -> Pointer:
        return made.from_row(slot).place(only, first)

    def done(slot: Value, first: Value) -> None:
        close_group(k, made.from_row(slot), first, 1)

    tiles = slot_rows(k, ids, n_tokens * n_used, gates, place, done)
    with tiles as (slot, expert, first, following):
        out, token = made.from_row(slot), slot // n_used
        take = rows_of(held, x.bytes(token * gates.x_pitch), token)
        gated_group(k, out, gates.expert(expert), ups.expert(expert), take, 1, first, following)


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
    held = activations(k, (fmt,), n_cols, experts.x_pitch, capacity=1)

    def place(slot: Value, first: Value) -> Pointer:
        return y.at(slot * n_rows + first)

    tiles = slot_rows(k, ids, n_tokens * n_used, experts, place)
    with tiles as (slot, expert, first, following):

        def store(t: Value, total: Value) -> None:
            store_rows(k, place(slot, first), total, first, n_rows)

        row = slot if per_slot else slot // n_used
        take = rows_of(held, x.bytes(row * experts.x_pitch), row)
        group_product(k, experts.expert(expert), first, following, take, 1, store)
