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
from codegen.kernels.gated import Matrix, gated
from codegen.kernels.matmul import load_rows, store_rows
from codegen.kernels.panel import Rows, multiply_rows, panel_rows
from codegen.kernels.rowdot import Store
from codegen.kernels.stream import tiles_ahead
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

# moe_down: panels that a thread does for one expert before the next, and parts of the output that
# there are at least for each thread.
PANELS_PER_PART, PARTS_PER_THREAD = 8, 4


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
