"""Attention of a block of q rows in f32, for f32 caches and where scores stay in memory: a tile of
cells is decoded a slab at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64
from codegen.kernels import tile
from codegen.kernels.attention_block import (
    HIDDEN,
    TILE_KEYS,
    Block,
    Sizes,
    Workspace,
    clear,
    copy_row,
)
from codegen.values import Pointer, Value
from codegen.vecmath import LOG2_E, exp2, softmax_weight

if TYPE_CHECKING:
    from codegen.builder import Kernel

LoadColumns = Callable[[Value, Value], list[Value]]


@dataclass(frozen=True)
class Rows:
    """Where keys and values come from.

    `key(cell, column)` and `value(cell, column)` are a slab's columns of one cell from `column` on,
    as f32 vectors. `prefetch(cell, column, count)` asks for the memory of `count` columns of a
    cell's keys, and the like part of its values.
    """

    key: LoadColumns
    value: LoadColumns
    prefetch: Callable[[Value, Value, int], None]


def pack_block(
    k: Kernel, sizes: Sizes, w: Workspace, block: Block, q_row: Callable[[Value], Pointer]
) -> None:
    """Rows of q to w.packed; `q_row(row)` is the address of one, counted over tokens and heads."""
    if sizes.block_rows == 1:
        copy_row(k, q_row(block.first), w.packed, sizes.d_k)
        return
    tile.pack_rows(
        k,
        w.packed,
        lambda i: q_row(block.row(i)),
        block.n_rows,
        width=sizes.d_k,
        block_rows=sizes.block_rows,
    )


def fill_slab(
    k: Kernel, w: Workspace, n_keys: Value, column: Value, width: int, load: LoadColumns
) -> None:
    """Decode `width` columns of the listed cells."""
    with k.loop(0, n_keys) as i:
        for j, vector in enumerate(load(w.key_cell[i].to(i64), column)):
            w.slab.at(i * width + j * k.target.lanes).store(vector)


def score_tile(
    k: Kernel,
    sizes: Sizes,
    w: Workspace,
    n_rows: Value,
    n_keys: Value,
    next_cell: Value,
    rows: Rows,
) -> None:
    """scores[cell][row] = k[cell] . q[row] for the listed cells, not scaled.

    The memory of the tile from `next_cell` on is asked for meanwhile.
    """
    size, slab = sizes.block_rows, sizes.key_slab
    group = tile.micro(k, size).vectors * k.target.lanes
    clear(k, w.scores, k.const(TILE_KEYS * size, i64))
    with k.loop(0, sizes.d_k, slab) as column:
        fill_slab(k, w, n_keys, column, slab, rows.key)

        def ahead(done: Value, count: int, column: Value = column) -> None:
            # A slab's worth of the next tile's memory, in the order in which that will be read.
            rows.prefetch(next_cell + done // slab, column + done % slab, count)

        tile.multiply_keys(
            k,
            w.scores,
            w.packed.at(column * group),
            w.slab,
            n_rows,
            n_keys,
            width=slab,
            q_width=sizes.d_k,
            block_rows=size,
            ahead=ahead,
        )


def softmax_tile(
    k: Kernel, sizes: Sizes, w: Workspace, n_rows: Value, n_keys: Value, scale: float
) -> None:
    """Scores of a tile to weights, in place: p = 2^(s - m'), l' = l * keep + sum of p.

    m' = max(m, s), keep = 2^(m - m'), s in log2 units. A hidden cell weighs exactly 0; NaN stays.
    """
    lanes = k.target.lanes
    with k.loop(0, n_rows, lanes) as row:
        pos, seq = (p.at(row).load(i32 * lanes) for p in (w.row_pos, w.row_seq))
        old = w.m.at(row).load(f32 * lanes)
        top = k.var(old)
        with k.loop(0, n_keys) as key:
            at = w.scores.at(key * sizes.block_rows + row)
            seen = seq.eq(w.key_seq[key]) & (pos >= w.key_pos[key])
            score = k.select(seen, at.load(f32 * lanes) * (scale * LOG2_E), HIDDEN)
            at.store(score)
            top.set(k.maximum(score, top.get()))
        new = top.get()
        keep = exp2(k, old - new)
        total = k.var(w.l.at(row).load(f32 * lanes) * keep)
        with k.loop(0, n_keys) as key:
            at = w.scores.at(key * sizes.block_rows + row)
            score = at.load(f32 * lanes)
            weight = softmax_weight(k, score - new)
            at.store(weight)
            total += weight
        w.m.at(row).store(new)
        w.l.at(row).store(total.get())
        w.keep.at(row).store(keep)


def value_tile(
    k: Kernel, sizes: Sizes, w: Workspace, n_rows: Value, n_keys: Value, rows: Rows
) -> None:
    """o = o * keep + weights^T v for the listed cells."""
    with k.loop(0, sizes.d_v, sizes.value_slab) as column:
        fill_slab(k, w, n_keys, column, sizes.value_slab, rows.value)
        tile.add_values(
            k,
            w.o.at(column),
            w.scores,
            w.slab,
            w.keep,
            n_rows,
            n_keys,
            width=sizes.value_slab,
            o_width=sizes.d_v,
            block_rows=sizes.block_rows,
        )
