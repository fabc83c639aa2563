"""The step between the two products of attention by codes: scores to weights, weights to codes.

Scores of a tile come as sums of codes times the scale of q; the weights that leave here carry the
scales of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32
from codegen.kernels.attention_block import HIDDEN, State
from codegen.kernels.encode import inverse_of
from codegen.values import Pointer, Value
from codegen.vecmath import LOG2_E, exp2, softmax_weight

if TYPE_CHECKING:
    from codegen.builder import Kernel


@dataclass(frozen=True)
class CodeState(State):
    """With the scales of a tile's keys and values, and of the weights [row]."""

    key_scale: Pointer
    value_scale: Pointer
    weight_scale: Pointer


@dataclass(frozen=True)
class Limits:
    """Codes of weights: the largest one, and how much those of any `n_sum` keys from a multiple of
    `n_sum` on may add up to."""

    largest: int
    n_sum: int
    budget: int


def softmax_tile(
    k: Kernel,
    w: CodeState,
    block_rows: int,
    n_rows: Value,
    n_keys: Value,
    *,
    scale: float,
    limits: Limits,
    store: Callable[[Value, Value], None],
) -> None:
    """Scores of a tile to weights: p = 2^(s - m'), l' = l * keep + sum of p.

    m' = max(m, s), keep = 2^(m - m'), s in log2 units. A hidden cell weighs exactly 0; NaN stays.
    `store(row, inverse)` makes codes of the weights p scale_v that w.scores then has for a vector
    of rows, `inverse` being 1 / scale of the codes.
    """
    lanes = k.target.lanes
    with k.loop(0, n_rows, lanes) as row:
        old = w.m.at(row).load(f32 * lanes)
        new = highest_score(k, w, block_rows, row, n_keys, scale)
        keep = exp2(k, old - new)
        total, bound = folded_weights(k, w, block_rows, row, n_keys, new, limits)
        w.m.at(row).store(new)
        w.l.at(row).store(w.l.at(row).load(f32 * lanes) * keep + total)
        w.keep.at(row).store(keep)
        w.weight_scale.at(row).store(bound)
        store(row, inverse_of(k, bound))


def highest_score(
    k: Kernel, w: CodeState, block_rows: int, row: Value, n_keys: Value, scale: float
) -> Value:
    """m' of a vector of rows; their scores become log2 units, those of cells not seen HIDDEN."""
    lanes = k.target.lanes
    pos, seq = (p.at(row).load(i32 * lanes) for p in (w.row_pos, w.row_seq))
    top = k.var(w.m.at(row).load(f32 * lanes))
    with k.loop(0, n_keys) as key:
        at = w.scores.at(key * block_rows + row)
        seen = seq.eq(w.key_seq[key]) & (pos >= w.key_pos[key])
        score = at.load(f32 * lanes) * (w.key_scale[key] * (scale * LOG2_E))
        score = k.select(seen, score, HIDDEN)
        at.store(score)
        top.set(k.maximum(score, top.get()))
    return top.get()


def folded_weights(
    k: Kernel,
    w: CodeState,
    block_rows: int,
    row: Value,
    n_keys: Value,
    top: Value,
    limits: Limits,
) -> tuple[Value, Value]:
    """(sum of p, scale of the codes) of a vector of rows; scores become p' = p scale_v.

    The scale is the least with which codes keep to the limits.
    """
    lanes, n_sum = k.target.lanes, limits.n_sum
    zeros = k.zeros(f32 * lanes)
    total, folded_total, largest, heaviest = (k.var(zeros) for _ in range(4))
    with k.loop(0, n_keys, n_sum) as start:
        part = k.var(zeros)
        with k.loop(start, k.minimum(start + n_sum, n_keys)) as key:
            at = w.scores.at(key * block_rows + row)
            weight = softmax_weight(k, at.load(f32 * lanes) - top)
            folded = k.select(weight.eq(0.0), 0.0, weight * w.value_scale[key])
            at.store(folded)
            total += weight
            part += folded
            largest.set(k.maximum(folded, largest.get()))
        heaviest.set(k.maximum(part.get(), heaviest.get()))
        folded_total += part.get()
    # A code can be half a one more than its number, and the numbers can be off in the last place.
    by_sum = heaviest.get() * (1.0001 / (limits.budget - n_sum))
    bound = k.maximum(largest.get() * (1 / (limits.largest - 1)), by_sum)
    return total.get(), bound + folded_total.get() * 0.0  # which is NaN if a weight is
