"""Weights times activations, for few tokens (`matvec`) and for many (`matmul`).

    y[t, h, r] = sum_j w[h, r, j] * x[t, h, j]  (+ residual[t, h, r])

A plain matrix has one h. With heads, one launch covers them all (k_b x q_nope, v_b x latent).
Strides are in bytes for x rows and in f32 elements for y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import DType, f32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.panel import Rows, multiply_rows, panel_rows
from codegen.kernels.rowdot import few_dots
from codegen.kernels.spread import Inputs, activations
from codegen.kernels.stream import Stream, group_size, tile_rows, tiles_ahead
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel


# A batch is cut into pieces until each thread has so many tiles; of so many tokens at least.
TILES_PER_THREAD, PIECE_TOKENS = 8, 64


@dataclass(frozen=True)
class Shape:
    """Sizes of one product; `w_pitch` is the bytes from one head's matrix to the next."""

    n_rows: int
    n_cols: int
    n_heads: int
    w_pitch: int
    x_token: int
    x_head: int
    y_token: int
    y_head: int
    residual: bool = False


@kernel(y=ptr(f32), w=ptr(u8), x=ptr(u8), residual=ptr(f32), n_tokens=dim())
def matvec(
    k: Kernel,
    y: Pointer,
    w: Pointer,
    x: Pointer,
    residual: Pointer,
    n_tokens: Value,
    *,
    shape: Shape,
    fmt: BlockFormat,
) -> None:
    """y[t, h, r] = w[h, r] . x[t, h] (+ residual), each row streamed once per token."""
    s, n, pitch = shape, k.target.lanes, fmt.row_bytes(shape.n_cols)
    step = tile_rows(k.target, pitch)
    per_head = -(-s.n_rows // step)

    def place(tile: Value) -> tuple[Value, Value, Pointer]:
        """(head, first row, where that row is)."""
        head, start = tile // per_head, tile % per_head * step
        return head, start, w.bytes(head * s.w_pitch + start * pitch)

    held = activations(k, (fmt,), s.n_cols, s.x_token)
    with tiles_ahead(k, per_head * s.n_heads) as (tile, next_tile):
        head, start, address = place(tile)
        x_rows, (*_, after) = x.bytes(head * s.x_head), place(next_tile)

        def take(fmt: BlockFormat, first: Value, count: Value | int) -> Inputs:
            key, rows = head * n_tokens + first, x_rows.bytes(first * s.x_token)
            return held.hold(key, rows, count).inputs(fmt, k.const(0, i64), count)

        stop = k.minimum(start + step, s.n_rows)
        with k.loop(start, stop, n) as first:
            here = address.bytes((first - start) * pitch)
            following = k.select_pointer(first + n < stop, here.bytes(n * pitch), after)
            rows = Stream(here, group_size(k, first, s.n_rows), following)

            def store(t: Value, total: Value, first: Value = first) -> None:
                at = t * s.y_token + head * s.y_head + first
                if s.residual:
                    total = total + load_rows(k, residual.at(at), total.type, first, s.n_rows)
                store_rows(k, y.at(at), total, first, s.n_rows)

            few_dots(k, fmt, rows, take, n_tokens, store)


@kernel(y=ptr(f32), w=ptr(u8), x=ptr(u8), residual=ptr(f32), scratch=ptr(u8), n_tokens=dim())
def matmul(
    k: Kernel,
    y: Pointer,
    w: Pointer,
    x: Pointer,
    residual: Pointer,
    scratch: Pointer,
    n_tokens: Value,
    *,
    shape: Shape,
    fmt: BlockFormat,
    scratch_bytes: int,
) -> None:
    """The same for a batch: panels of rows are handed out, each meets a piece of the batch."""
    s, n = shape, panel_rows(k.target)
    panel = scratch.bytes(k.thread * scratch_bytes)
    per_head = -(-s.n_rows // n)
    pieces = batch_pieces(k, per_head * s.n_heads, n_tokens)
    with tiles_ahead(k, pieces * (per_head * s.n_heads), one_by_one=True) as (tile, next_tile):
        start, count = piece_of(k, tile % pieces, pieces, n_tokens)
        part, next_part = tile // pieces, next_tile // pieces
        head, first = part // per_head, part % per_head * n
        matrix = w.bytes(head * s.w_pitch)
        next_row = next_part % per_head * n * fmt.row_bytes(s.n_cols)
        following = w.bytes(next_part // per_head * s.w_pitch + next_row)

        def store(t: Value, total: Value) -> None:
            at = (start + t) * s.y_token + head * s.y_head + first
            if s.residual:
                total = total + load_rows(k, residual.at(at), total.type, first, s.n_rows)
            store_rows(k, y.at(at), total, first, s.n_rows)

        x_rows = x.bytes(head * s.x_head + start * s.x_token)
        multiply_rows(
            k, fmt, Rows(matrix, first, s.n_rows), x_rows, count, store, panel,
            n_cols=s.n_cols, x_pitch=s.x_token, following=following,
        )  # fmt: skip


def batch_pieces(k: Kernel, panels: int, n_tokens: Value) -> Value:
    """Into how many pieces a batch is cut, so that matrices of few rows occupy all threads; a
    panel is decoded for each of them."""
    wanted = (k.n_threads * TILES_PER_THREAD + (panels - 1)) // panels
    return k.maximum(k.minimum(wanted, n_tokens // PIECE_TOKENS), 1)


def piece_of(k: Kernel, index: Value, pieces: Value, n_tokens: Value) -> tuple[Value, Value]:
    """(first token, number of tokens) of a piece."""
    first = index * n_tokens // pieces
    return first, (index + 1) * n_tokens // pieces - first


def load_rows(k: Kernel, p: Pointer, t: DType, first: Value, n_rows: int) -> Value:
    """f32 values for a panel's or a group's rows, only as far as there are rows."""
    if n_rows % t.lanes == 0:
        return p.load(t)
    return k.load_part(p, t, k.minimum(n_rows - first, t.lanes))


def store_rows(k: Kernel, p: Pointer, value: Value, first: Value, n_rows: int) -> None:
    """Store sums of a panel's or a group's rows, only as far as there are rows."""
    n = value.type.lanes
    if n_rows % n == 0:
        p.store(value)
    else:
        k.store_part(p, value, k.minimum(n_rows - first, n))
