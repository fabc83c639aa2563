"""Flash attention over cache rows: online softmax, products in 16-bit integers or in f32.

    out[t, h] = sum over j of w[j] v[j, h],  w = softmax over visible j of scale * q[t, h] . k[j, h]

Row j is visible to token t iff cell_seq[j] == seq[t] and cell_pos[j] <= pos[t]; a token that sees
no row gets zeros. Two kinds, chosen at build time:

    absorbed   k is one row per cell for all heads, v its first d_v values (a view)
    standard   k and v have a row per cell and head, in two caches of their own formats

q is [n_tokens][n_head][d_k], out [n_tokens][n_head][d_v]. A work item is a block of q rows and a
range of cells (attention_block.py), which is worked on in one of several ways (attention_ways.py).
With few tokens the cells are split so that all threads have work, and the parts are merged in order
(attention_splits.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.attention_block import (
    ABSORBED,
    FIRST_MAX,
    LINE_WORDS,
    STANDARD,
    Block,
    Caches,
    Cells,
    Sizes,
    State,
    clear,
    make_sizes,
    open_block,
    visible_cells,
)
from codegen.kernels.attention_splits import (
    MIN_SPLIT,
    Splits,
    inverse,
    merge_splits,
    partial_rows,
    plan_splits,
)
from codegen.kernels.attention_ways import Way, caches_of, choose_way, most_words
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

WORD = 4


@functools.cache
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
    """Bytes of `scratch` that `flash_attn` needs for batches and caches up to these sizes, whatever
    the cache's format."""
    sizes = make_sizes(kind, n_head, d_k, d_v, n_tokens_max)
    splits = -(-n_kv_max // MIN_SPLIT)
    rows = min(partial_rows(sizes), n_tokens_max * n_head * splits) if splits > 1 else 0
    return WORD * (n_threads * most_words(sizes) + rows * (d_v + 2))


def close_block(
    k: Kernel, way: Way, w: State, block: Block, out: Pointer, splits: Splits, split: Value
) -> None:
    """Results of an item: to `out` when there is one split, else to `partial`."""
    d_v = way.d_v
    with k.loop(0, block.n_rows) as i:
        row, o = block.row(i), w.o.at(i * d_v)
        with k.either(splits.count.eq(1)) as (yes, no):
            with yes:
                way.close_row(k, o, out.at(row * d_v), inverse(k, w.l[i]))
            with no:
                slot = split * splits.n_rows + row
                way.close_row(k, o, splits.partial.at(slot * d_v), 1.0)
                splits.limits[slot * 2] = w.m[i]
                splits.limits[slot * 2 + 1] = w.l[i]


def attend_cells(
    k: Kernel,
    way: Way,
    w: State,
    cells: Cells,
    start: Value,
    stop: Value,
    attend: Callable[[Value, Value, Value], None],
) -> None:
    """Fold cells start..stop into m, l and o of an open block: `attend(n_keys, first, last)` does
    that with the cells that are listed in w, those of first..last that some row sees."""
    with k.loop(start, stop, way.tile_keys) as first:
        last = k.minimum(first + way.tile_keys, stop)
        n_keys = visible_cells(k, way, w, cells, first, last)
        with k.when(n_keys > 0):
            attend(n_keys, first, last)


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
    way = choose_way(k.target, make_sizes(kind, n_head, d_k, d_v, max_tokens), fmt_k, fmt_v)
    cells, n_blocks = Cells(cell_pos, cell_seq, pos, seq), way.n_blocks(n_tokens)
    splits = plan_splits(k, way, scratch, n_blocks, n_tokens, n_kv)
    w: Any = way.space(k, scratch)
    packed = k.var(k.const(-1, i64))
    with k.tiles(n_blocks * splits.count) as item:
        # The last tokens see the most cells: the longest items go out first.
        index, split = n_blocks - 1 - item // splits.count, item % splits.count
        start = split * splits.cells
        stop = k.minimum(start + splits.cells, n_kv)
        block = open_block(k, way, w, cells, n_tokens, index)
        with k.when(packed.get().ne(index)):  # one split after another of the same rows
            way.pack(k, w, block, lambda row: q.at(row * d_k))
            packed.set(index)
        clear_state(k, way, w)
        caches = caches_of(way, k_cache, v_cache, block.first % n_head, fmt_k, fmt_v)

        def attend(
            n_keys: Value, _: Value, last: Value, block: Block = block, c: Caches = caches
        ) -> None:
            way.attend(k, w, block, c, n_keys, last, scale)

        attend_cells(k, way, w, cells, start, stop, attend)
        close_block(k, way, w, block, out, splits, split)
    with k.when(splits.count > 1):
        k.barrier()
        merge_splits(k, way, out, splits)


def clear_state(k: Kernel, sizes: Sizes, w: State) -> None:
    """Nothing seen yet."""
    rows = k.const(max(sizes.block_rows, LINE_WORDS), i64)
    clear(k, w.m, rows, FIRST_MAX)
    clear(k, w.l, rows)
    clear(k, w.o, k.const(sizes.block_rows * sizes.d_v, i64))


__all__ = ["ABSORBED", "STANDARD", "flash_attn", "flash_scratch_bytes"]
