"""Attention of a single q row: nothing is shared between rows, so no slab pays; cells are decoded
into registers and used at once. Scores of a tile lie across lanes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64
from codegen.kernels.attention_block import HIDDEN, Sizes, Workspace
from codegen.kernels.attention_f32 import Rows
from codegen.kernels.tile import load_vectors
from codegen.values import Value
from codegen.vecmath import LOG2_E, exp2, softmax_weight

if TYPE_CHECKING:
    from codegen.builder import Kernel

AHEAD = 16  # cells between what is decoded and what is asked for


def attend_row(
    k: Kernel, sizes: Sizes, w: Workspace, n_keys: Value, rows: Rows, scale: float
) -> None:
    """Fold the listed cells into m, l and o of a block of one row; q lies in w.packed."""
    score_row(k, sizes, w, n_keys, rows)
    keep = softmax_row(k, w, n_keys, scale)
    value_row(k, sizes, w, n_keys, keep, rows)


def score_row(k: Kernel, sizes: Sizes, w: Workspace, n_keys: Value, rows: Rows) -> None:
    """scores[cell] = k[cell] . q for the listed cells, not scaled."""
    lanes, slab = k.target.lanes, sizes.key_slab
    with k.loop(0, n_keys) as i:
        cell = w.key_cell[i].to(i64)
        sums = [k.var(k.zeros(f32 * lanes)) for _ in range(2)]
        with k.loop(0, sizes.d_k, slab) as column:
            rows.prefetch(cell + AHEAD, column, slab)
            q = load_vectors(w.packed.at(column), lanes, slab // lanes)
            for j, (a, b) in enumerate(zip(q, rows.key(cell, column), strict=True)):
                sums[j % 2] += a * b
        w.scores[i] = (sums[0].get() + sums[1].get()).sum()


def softmax_row(k: Kernel, w: Workspace, n_keys: Value, scale: float) -> Value:
    """Scores to weights in place, as softmax_tile does for many rows; returns keep."""
    lanes, old = k.target.lanes, w.m[0]
    pos, seq = w.row_pos[0], w.row_seq[0]
    steps = k.vector(list(range(lanes)), i32)
    tops, sums = k.var(k.splat(old, lanes)), k.var(k.zeros(f32 * lanes))
    with k.loop(0, n_keys, lanes) as i:
        seen = w.key_seq.at(i).load(i32 * lanes).eq(seq)
        seen = seen & (w.key_pos.at(i).load(i32 * lanes) <= pos)
        seen = seen & (steps < k.splat((n_keys - i).to(i32), lanes))
        score = w.scores.at(i).load(f32 * lanes) * (scale * LOG2_E)
        score = k.select(seen, score, HIDDEN)
        w.scores.at(i).store(score)
        tops.set(k.maximum(score, tops.get()))
    top = tops.get().max()
    with k.loop(0, n_keys, lanes) as i:
        score = w.scores.at(i).load(f32 * lanes)
        weight = softmax_weight(k, score - top)
        w.scores.at(i).store(weight)
        sums += weight
    keep = exp2(k, old - top)
    w.m[0], w.l[0] = top, w.l[0] * keep + sums.get().sum()
    return keep


def value_row(
    k: Kernel, sizes: Sizes, w: Workspace, n_keys: Value, keep: Value, rows: Rows
) -> None:
    """o = o * keep + sum of weights[cell] * v[cell] over the listed cells."""
    lanes, slab = k.target.lanes, sizes.value_slab
    with k.loop(0, sizes.d_v, slab) as column:
        o = w.o.at(column)
        sums = [k.var(v * keep) for v in load_vectors(o, lanes, slab // lanes)]
        with k.loop(0, n_keys) as i:
            weight = k.splat(w.scores[i], lanes)
            for total, v in zip(sums, rows.value(w.key_cell[i].to(i64), column), strict=True):
                total += v * weight
        for j, total in enumerate(sums):
            o.at(j * lanes).store(total.get())
