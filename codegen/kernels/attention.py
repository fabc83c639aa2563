"""Flash attention over cache rows: online softmax, all work in f32.

    out[t, h] = sum over j of w[j] v[j, h],  w = softmax over visible j of scale * q[t, h] . k[j, h]

Row j is visible to token t iff cell_seq[j] == seq[t] and cell_pos[j] <= pos[t]; a token that sees
no row gets zeros. Two kinds, chosen at build time:

    absorbed   k is one row per cell for all heads, v its first d_v values (a view)
    standard   k and v have a row per cell and head, in two caches of their own formats

q is [n_tokens][n_head][d_k], out [n_tokens][n_head][d_v]. A work item is a block of q rows and a
range of cells (codegen/kernels/attention_block.py). With few tokens the cells are split so that
all threads have work, and the parts are merged in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels import tile
from codegen.kernels.attention_block import (
    ABSORBED,
    FIRST_MAX,
    LINE_WORDS,
    STANDARD,
    TILE_KEYS,
    Block,
    Cells,
    Rows,
    Sizes,
    Workspace,
    clear,
    copy_row,
    decode,
    make_sizes,
    open_block,
    score_tile,
    softmax_tile,
    touch,
    value_tile,
    visible_cells,
    workspace,
)
from codegen.kernels.attention_row import attend_row
from codegen.values import Pointer, Value
from codegen.vecmath import exp2

if TYPE_CHECKING:
    from codegen.builder import Kernel

MIN_SPLIT = 4 * TILE_KEYS  # cells per split at least: packing q again must stay cheap
MAX_ITEMS = 128
WORD = 4


def partial_rows(sizes: Sizes) -> int:
    """Rows times splits at most: what bounds the memory of results not yet merged."""
    return max(1024, 32 * sizes.n_head)


def flash_scratch_bytes(
    n_tokens_max: int,
    n_kv_max: int,
    n_threads: int,
    *,
    kind: str,
    n_head: int,
    d_k: int,
    d_v: int,
) -> int:
    """Bytes of `scratch` that `flash_attn` needs for batches and caches up to these sizes."""
    sizes = make_sizes(kind, n_head, d_k, d_v, n_tokens_max)
    splits = -(-n_kv_max // MIN_SPLIT)
    rows = min(partial_rows(sizes), n_tokens_max * n_head * splits) if splits > 1 else 0
    return WORD * (n_threads * sizes.thread_words + rows * (d_v + 2))


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
    wanted = k.maximum(k.minimum(most, (n_kv + (MIN_SPLIT - 1)) // MIN_SPLIT), 1)
    cells = tile.round_up((n_kv + wanted - 1) // wanted, TILE_KEYS)
    count = (n_kv + cells - 1) // cells
    partial = scratch.at(k.n_threads * sizes.thread_words)
    return Splits(count, cells, n_rows, partial, partial.at(count * n_rows * sizes.d_v))


def inverse(k: Kernel, total: Value) -> Value:
    """1 / total; 0 for a row that saw no cell."""
    return k.select(total.eq(0.0), 0.0, 1.0 / total)


def close_block(
    k: Kernel, sizes: Sizes, w: Workspace, block: Block, out: Pointer, splits: Splits, split: Value
) -> None:
    """Results of an item: to `out` when there is one split, else to `partial`."""
    d_v = sizes.d_v
    with k.loop(0, block.n_rows) as i:
        row, o = block.row(i), w.o.at(i * d_v)
        with k.either(splits.count.eq(1)) as (yes, no):
            with yes:
                factor = inverse(k, w.l[i])
                copy_row(k, o, out.at(row * d_v), d_v, factor)
            with no:
                slot = split * splits.n_rows + row
                copy_row(k, o, splits.partial.at(slot * d_v), d_v)
                splits.limits[slot * 2] = w.m[i]
                splits.limits[slot * 2 + 1] = w.l[i]


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


def cache_rows(
    k: Kernel,
    sizes: Sizes,
    k_cache: Pointer,
    v_cache: Pointer,
    head: Value,
    fmt_k: BlockFormat,
    fmt_v: BlockFormat,
) -> Rows:
    """Rows of the caches of one head, or of all heads."""
    d_k, absorbed = sizes.d_k, sizes.kind == ABSORBED
    key_bytes, value_bytes = fmt_k.row_bytes(d_k), fmt_v.row_bytes(sizes.d_v)

    def row(cell: Value) -> Value:
        return cell if absorbed else cell * sizes.n_head + head

    def key(cell: Value, column: Value) -> list[Value]:
        return decode(k, fmt_k, k_cache.bytes(row(cell) * key_bytes), column, sizes.key_slab)

    def value(cell: Value, column: Value) -> list[Value]:
        fmt, cache, n = (fmt_v, v_cache, value_bytes)
        if absorbed:
            fmt, cache, n = (fmt_k, k_cache, key_bytes)
        return decode(k, fmt, cache.bytes(row(cell) * n), column, sizes.value_slab)

    def prefetch(cell: Value, column: Value, count: int) -> None:
        touch(k, k_cache.bytes(row(cell) * key_bytes), column, count, key_bytes, d_k)
        if not absorbed:
            touch(k, v_cache.bytes(row(cell) * value_bytes), column, count, value_bytes, d_k)

    return Rows(key, value, prefetch)


def attend_cells(
    k: Kernel,
    sizes: Sizes,
    w: Workspace,
    cells: Cells,
    block: Block,
    start: Value,
    stop: Value,
    rows: Rows,
    scale: float,
) -> None:
    """Fold cells start..stop into m, l and o of an open block."""
    with k.loop(start, stop, TILE_KEYS) as first:
        last = k.minimum(first + TILE_KEYS, stop)
        n_keys = visible_cells(k, sizes, w, cells, first, last)
        with k.when(n_keys > 0):
            if sizes.block_rows == 1:
                attend_row(k, sizes, w, n_keys, rows, scale)
            else:
                score_tile(k, sizes, w, block.n_rows, n_keys, last, rows)
                softmax_tile(k, sizes, w, block.n_rows, n_keys, scale)
                value_tile(k, sizes, w, block.n_rows, n_keys, rows)


@kernel(
    q=ptr(f32),
    k_cache=ptr(u8),
    v_cache=ptr(u8),
    pos=ptr(i32),
    seq=ptr(i32),
    cell_pos=ptr(i32),
    cell_seq=ptr(i32),
    out=ptr(f32),
    scratch=ptr(f32),
    n_tokens=dim(),
    n_kv=dim(),
)
def flash_attn(
    k: Kernel,
    q: Pointer,
    k_cache: Pointer,
    v_cache: Pointer,
    pos: Pointer,
    seq: Pointer,
    cell_pos: Pointer,
    cell_seq: Pointer,
    out: Pointer,
    scratch: Pointer,
    n_tokens: Value,
    n_kv: Value,
    *,
    kind: str,
    n_head: int,
    d_k: int,
    d_v: int,
    max_tokens: int,
    fmt_k: BlockFormat,
    fmt_v: BlockFormat,
    scale: float,
) -> None:
    """out = softmax(scale q k^T + mask) v over the first n_kv cells; see the module."""
    sizes = make_sizes(kind, n_head, d_k, d_v, max_tokens)
    w, cells = workspace(k, sizes, scratch), Cells(cell_pos, cell_seq, pos, seq)
    n_blocks = sizes.n_blocks(n_tokens)
    splits = plan_splits(k, sizes, scratch, n_blocks, n_tokens, n_kv)
    with k.tiles(n_blocks * splits.count) as item:
        # The last tokens see the most cells: the longest items go out first.
        index, split = n_blocks - 1 - item // splits.count, item % splits.count
        block = open_block(k, sizes, w, cells, lambda r: q.at(r * d_k), n_tokens, index)
        clear_state(k, sizes, w)
        start = split * splits.cells
        stop = k.minimum(start + splits.cells, n_kv)
        rows = cache_rows(k, sizes, k_cache, v_cache, block.first % n_head, fmt_k, fmt_v)
        attend_cells(k, sizes, w, cells, block, start, stop, rows, scale)
        close_block(k, sizes, w, block, out, splits, split)
    with k.when(splits.count > 1):
        k.barrier()
        merge_splits(k, sizes, out, splits)


def clear_state(k: Kernel, sizes: Sizes, w: Workspace) -> None:
    """Nothing seen yet."""
    rows = k.const(max(sizes.block_rows, LINE_WORDS), i64)
    clear(k, w.m, rows, FIRST_MAX)
    clear(k, w.l, rows)
    clear(k, w.o, k.const(sizes.block_rows * sizes.d_v, i64))


__all__ = ["ABSORBED", "STANDARD", "flash_attn", "flash_scratch_bytes"]
