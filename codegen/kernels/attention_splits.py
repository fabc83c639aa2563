"""Few tokens over many cells: the cells are split so that all threads have work, and what the
splits leave of a row, its output o, maximum m and sum l, is merged in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i64
from codegen.kernels import tile
from codegen.kernels.attention_block import FIRST_MAX, Sizes
from codegen.values import Pointer, Value
from codegen.vecmath import exp2

if TYPE_CHECKING:
    from codegen.builder import Kernel

MIN_SPLIT = 128  # cells per split at least: what a split leaves has to be merged
# Splits from that many cells on: an even number for two threads to share, but few, and long ones
# once there are some.
COUNTS = ((2, 256), (4, 1024), (8, 3072), (16, 6144), (32, 12288), (64, 24576), (128, 49152))
SPLIT_STEP = 4
MAX_ITEMS = 128


def partial_rows(sizes: Sizes) -> int:
    """Rows times splits at most: what bounds the memory of results not yet merged."""
    return max(1024, 32 * sizes.n_head)


@dataclass(frozen=True)
class Splits:
    """How the cells are divided; a function of the batch and cache sizes alone, never of threads.

    `partial` holds, per split and row: o [d_v], then (behind all of those) m and l.
    """

    count: Value
    cells: Value
    n_rows: Value
    partial: Pointer
    limits: Pointer


def plan_splits(
    k: Kernel, sizes: Sizes, scratch: Pointer, n_blocks: Value, n_tokens: Value, n_kv: Value
) -> Splits:
    """As many splits as there are cells, scratch memory and use for."""
    n_rows = n_tokens * sizes.n_head
    most_rows, items = (k.const(n, i64) for n in (partial_rows(sizes), MAX_ITEMS))
    most = k.minimum(most_rows // n_rows, items // n_blocks)
    wanted = k.const(1, i64)
    for n_splits, start in COUNTS:
        wanted = k.select((n_kv >= start) & (most >= n_splits), n_splits, wanted)
    cells = tile.round_up((n_kv + wanted - 1) // wanted, SPLIT_STEP)
    count = (n_kv + cells - 1) // cells
    partial = scratch.at(k.n_threads * sizes.thread_words)
    return Splits(count, cells, n_rows, partial, partial.at(count * n_rows * sizes.d_v))


def inverse(k: Kernel, total: Value) -> Value:
    """1 / total; 0 for a row that saw no cell."""
    return k.select(total.eq(0.0), 0.0, 1.0 / total)


def merge_splits(k: Kernel, sizes: Sizes, out: Pointer, splits: Splits) -> None:
    """out[row] = sum over splits, in order, of 2^(m_s - max m) o_s, divided by that of l_s."""
    lanes, d_v = k.target.lanes, sizes.d_v
    weights = k.stack(f32, MAX_ITEMS)
    with k.tiles(splits.n_rows) as row:
        top, total = k.var(k.const(FIRST_MAX, f32)), k.var(k.zeros(f32))
        with k.loop(0, splits.count) as split:
            top.set(k.maximum(splits.limits[(split * splits.n_rows + row) * 2], top.get()))
        with k.loop(0, splits.count) as split:
            limits = splits.limits.at((split * splits.n_rows + row) * 2)
            weight = exp2(k, limits[0] - top.get())
            weights[split] = weight
            total += weight * limits[1]
        factor = inverse(k, total.get())
        with k.loop(0, d_v, 2 * lanes) as column:
            sums = [k.var(k.zeros(f32 * lanes)) for _ in range(2)]
            with k.loop(0, splits.count) as split:
                source = splits.partial.at((split * splits.n_rows + row) * d_v + column)
                for i, acc in enumerate(sums):
                    acc += source.at(i * lanes).load(f32 * lanes) * weights[split]
            for i, acc in enumerate(sums):
                out.at(row * d_v + column + i * lanes).store(acc.get() * factor)
