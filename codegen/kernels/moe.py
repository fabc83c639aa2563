"""Mixture of experts for many tokens, and the pair up + gate of a dense layer.

    hidden = silu(W_gate x) * (W_up x),   y += weight * W_down hidden

Expert e of stacked weights lies e matrices in. The activation rows are sorted by expert (offsets,
order: codegen/kernels/router.py), and panels of weight rows meet all tokens of their expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.blocks import BLOCK
from codegen.kernels.gated import Hidden, Matrix, gated
from codegen.kernels.matmul import batch_pieces, load_rows, piece_of, store_rows
from codegen.kernels.panel import Rows, multiply_rows, panel_rows
from codegen.kernels.rowdot import Store
from codegen.kernels.stream import parts_ahead, tiles_ahead
from codegen.targets.base import Target
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

PANELS_PER_PART = 8  # moe_down: most that a thread does for one expert before the next


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


def hidden_rows(target: Target, coded_tokens: int) -> int:
    """Rows of up and gate that a thread does at a time."""
    return max(panel_rows(target), BLOCK if coded_tokens else 0)


def waiting_bytes(target: Target, coded_tokens: int) -> int:
    """Scratch of a thread, in front of its panel, for what is yet to become a8."""
    return 4 * hidden_rows(target, coded_tokens) * coded_tokens


def hidden(k: Kernel, y: Pointer, n: int, scratch: Pointer, coded_tokens: int) -> Hidden:
    rows = hidden_rows(k.target, coded_tokens)
    return Hidden(y, n, rows, scratch.cast(f32) if coded_tokens else None)


def gated_panels(
    k: Kernel,
    out: Hidden,
    gate: Matrix,
    up: Matrix,
    x: Pointer,
    n_tokens: Value,
    first: Value,
    following: Pointer,
    panel: Pointer,
) -> None:
    """out[t, first:] = silu(gate x[t]) * (up x[t]) for out.rows rows."""
    n = panel_rows(k.target)
    firsts = [first + i for i in range(0, out.rows, n)]
    for here, after in zip(firsts, [*map(gate.row, firsts[1:]), following], strict=True):

        def multiply(w: Matrix, following: Pointer, store: Store, here: Value = here) -> None:
            panel_product(k, w, here, following, panel, x, n_tokens, store)

        def place(t: Value, here: Value = here) -> Pointer:
            return out.place(t, here)

        gated(k, gate, up, here, after, place, multiply)
    out.close(k, first, n_tokens)


@kernel(y=ptr(u8), gate=ptr(u8), up=ptr(u8), x=ptr(u8), scratch=ptr(u8), n_tokens=dim())
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
    coded_tokens: int = 0,
) -> None:
    """y[t] = silu(gate x[t]) * (up x[t]): a dense layer, or the shared experts. Rows of y are f32,
    or a8 for batches of `coded_tokens` at most."""
    own = scratch.bytes(k.thread * scratch_bytes)
    panel = own.bytes(waiting_bytes(k.target, coded_tokens))
    gates, ups = Matrix(gate, fmt_gate, n_rows, n_cols), Matrix(up, fmt_up, n_rows, n_cols)
    made = hidden(k, y, n_rows, own, coded_tokens)
    panels = -(-n_rows // made.rows)
    pieces = batch_pieces(k, panels, n_tokens)
    with tiles_ahead(k, pieces * panels, one_by_one=True) as (tile, next_tile):
        start, count = piece_of(k, tile % pieces, pieces, n_tokens)
        first, following = tile // pieces * made.rows, gates.row(next_tile // pieces * made.rows)
        rows, out = x.bytes(start * gates.x_pitch), made.from_row(start)
        gated_panels(k, out, gates, ups, rows, count, first, following, panel)


@contextmanager
def expert_panels(
    k: Kernel, offsets: Pointer, w: Matrix, n_expert: int, n: int
) -> Iterator[tuple[Value, Value, Pointer, Value, Value]]:
    """(expert, first of n rows, the stack's rows after them, first sorted position, number of
    positions)."""
    panels = -(-w.n_rows // n)
    with tiles_ahead(k, panels * n_expert, one_by_one=True) as (tile, next_tile):
        expert, first = tile // panels, tile % panels * n
        start, count = positions(offsets, expert)
        with k.when(count > 0):
            following = w.expert(next_tile // panels).row(next_tile % panels * n)
            yield expert, first, following, start, count


def positions(offsets: Pointer, expert: Value) -> tuple[Value, Value]:
    """(first sorted position of an expert, number of them)."""
    start = offsets[expert].to(i64)
    return start, offsets[expert + 1].to(i64) - start


@kernel(y=ptr(u8), gate=ptr(u8), up=ptr(u8), x=ptr(u8), offsets=ptr(i32), scratch=ptr(u8))
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
    coded_tokens: int = 0,
) -> None:
    """y[i] = silu(gate_e x[i]) * (up_e x[i]) for every sorted position i of every expert e. Rows of
    y are f32, or a8 for experts of `coded_tokens` at most."""
    own = scratch.bytes(k.thread * scratch_bytes)
    panel = own.bytes(waiting_bytes(k.target, coded_tokens))
    gates, ups = Matrix(gate, fmt_gate, n_rows, n_cols), Matrix(up, fmt_up, n_rows, n_cols)
    made = hidden(k, y, n_rows, own, coded_tokens)
    tiles = expert_panels(k, offsets, gates, n_expert, made.rows)
    with tiles as (expert, first, following, start, count):
        rows, out = x.bytes(start * gates.x_pitch), made.from_row(start)
        gated_panels(
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
    tiles = expert_panels(k, offsets, experts, n_expert, panel_rows(k.target))
    with tiles as (expert, first, following, start, count):

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

    A part is several panels, until few are left: an expert's activations are read again for each
    panel, while they are near.
    """
    panel, experts = scratch.bytes(k.thread * scratch_bytes), Matrix(w, fmt, n_rows, n_cols)
    n = panel_rows(k.target)
    with parts_ahead(k, -(-n_rows // n), most=PANELS_PER_PART) as (part, stop, next_part):
        start, next_start, behind = part * n, next_part * n, k.minimum(stop * n, n_rows)
        with k.loop(0, n_expert) as expert:
            position, count = positions(offsets, expert)
            after = k.select_pointer(
                expert.eq(n_expert - 1),
                experts.row(next_start),
                experts.expert(expert + 1).row(start),
            )
            with k.when((count > 0) & k.cancelled().eq(0)):
                rows, matrix = x.bytes(position * experts.x_pitch), experts.expert(expert)
                with k.loop(start, behind, n) as first:

                    def store(
                        i: Value, total: Value, position: Value = position, first: Value = first
                    ) -> None:
                        slot = order[position + i].to(i64)
                        place = y.at(slot // n_used * n_rows + first)
                        added = load_rows(k, place, total.type, first, n_rows)
                        store_rows(k, place, added + total * weights[slot], first, n_rows)

                    following = k.select_pointer(first + n < behind, matrix.row(first + n), after)
                    panel_product(k, matrix, first, following, panel, rows, count, store)
