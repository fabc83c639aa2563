"""Flash attention over cache rows: online softmax, products in 16-bit integers or in f32.

    out[t, h] = sum over j of w[j] v[j, h],  w = softmax over visible j of scale * q[t, h] . k[j, h]

Row j is visible to token t iff cell_seq[j] == seq[t] and cell_pos[j] <= pos[t]; a token that sees
no row gets zeros. Two kinds, chosen at build time:

    absorbed   k is one row per cell for all heads, v its first d_v values (a view)
    standard   k and v have a row per cell and head, in two caches of their own formats

q is [n_tokens][n_head][d_k], out [n_tokens][n_head][d_v]. A work item is a block of q rows and a
range of cells (attention_block.py); f32 caches and single rows are worked on in f32
(attention_f32.py), others by their codes (attention_codes.py). With few tokens the cells are split
so that all threads have work, and the parts are merged in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import CACHE_FORMATS, BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels import attention_codes as by_codes
from codegen.kernels import attention_f32 as in_f32
from codegen.kernels.attention_block import (
    ABSORBED,
    FIRST_MAX,
    LINE_WORDS,
    STANDARD,
    TILE_KEYS,
    Block,
    Cells,
    Sizes,
    State,
    Workspace,
    clear,
    copy_row,
    decode,
    make_sizes,
    open_block,
    touch,
    visible_cells,
    workspace,
)
from codegen.kernels.attention_codes import (
    Caches,
    CodeSizes,
    CodeSpace,
    code_sizes,
    code_space,
)
from codegen.kernels.attention_row import attend_row
from codegen.kernels.attention_splits import (
    MIN_SPLIT,
    Splits,
    inverse,
    merge_splits,
    partial_rows,
    plan_splits,
)
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

WORD = 4


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
    shape = (kind, n_head, d_k, d_v, n_tokens_max)
    sizes = make_sizes(*shape)
    splits = -(-n_kv_max // MIN_SPLIT)
    rows = min(partial_rows(sizes), n_tokens_max * n_head * splits) if splits > 1 else 0
    ways = [sizes, *(code_sizes(*shape, fmt, fmt) for fmt in CACHE_FORMATS.values())]
    words = max(way.thread_words for way in ways if way)
    return WORD * (n_threads * words + rows * (d_v + 2))


def close_block(
    k: Kernel, sizes: Sizes, w: State, block: Block, out: Pointer, splits: Splits, split: Value
) -> None:
    """Results of an item: to `out` when there is one split, else to `partial`."""
    d_v = sizes.d_v
    copy = by_codes.close_row if isinstance(sizes, CodeSizes) else copy_row
    with k.loop(0, block.n_rows) as i:
        row, o = block.row(i), w.o.at(i * d_v)
        with k.either(splits.count.eq(1)) as (yes, no):
            with yes:
                factor = inverse(k, w.l[i])
                copy(k, o, out.at(row * d_v), d_v, factor)
            with no:
                slot = split * splits.n_rows + row
                copy(k, o, splits.partial.at(slot * d_v), d_v)
                splits.limits[slot * 2] = w.m[i]
                splits.limits[slot * 2 + 1] = w.l[i]


def caches_of(
    sizes: Sizes, k_cache: Pointer, v_cache: Pointer, head: Value, fmt_k: BlockFormat,
    fmt_v: BlockFormat,
) -> Caches:  # fmt: skip
    """The caches as a head sees them."""

    def rows(cache: Pointer, n_bytes: int) -> Callable[[Value], Pointer]:
        if sizes.kind == ABSORBED:
            return lambda cell: cache.bytes(cell * n_bytes)
        return lambda cell: cache.bytes((cell * sizes.n_head + head) * n_bytes)

    keys = rows(k_cache, fmt_k.row_bytes(sizes.d_k))
    if sizes.kind == ABSORBED:
        return Caches(keys, keys, fmt_k, fmt_k)
    return Caches(keys, rows(v_cache, fmt_v.row_bytes(sizes.d_v)), fmt_k, fmt_v)


def decoded_rows(k: Kernel, sizes: Sizes, caches: Caches) -> in_f32.Rows:
    """Keys and values in f32."""
    d_k, d_v, absorbed = sizes.d_k, sizes.d_v, sizes.kind == ABSORBED

    def key(cell: Value, column: Value) -> list[Value]:
        return decode(k, caches.fmt_k, caches.key(cell), column, sizes.key_slab)

    def value(cell: Value, column: Value) -> list[Value]:
        return decode(k, caches.fmt_v, caches.value(cell), column, sizes.value_slab)

    def prefetch(cell: Value, column: Value, count: int) -> None:
        touch(k, caches.key(cell), column, count, caches.fmt_k.row_bytes(d_k), d_k)
        if not absorbed:
            touch(k, caches.value(cell), column, count, caches.fmt_v.row_bytes(d_v), d_k)

    return in_f32.Rows(key, value, prefetch)


def attend_cells(
    k: Kernel,
    sizes: Sizes,
    w: Workspace,
    cells: Cells,
    block: Block,
    start: Value,
    stop: Value,
    rows: in_f32.Rows,
    scale: float,
) -> None:
    """Fold cells start..stop into m, l and o of an open block, in f32."""
    with k.loop(start, stop, TILE_KEYS) as first:
        last = k.minimum(first + TILE_KEYS, stop)
        n_keys = visible_cells(k, sizes, w, cells, first, last)
        with k.when(n_keys > 0):
            if sizes.block_rows == 1:
                attend_row(k, sizes, w, n_keys, rows, scale)
            else:
                in_f32.score_tile(k, sizes, w, block.n_rows, n_keys, last, rows)
                in_f32.softmax_tile(k, sizes, w, block.n_rows, n_keys, scale)
                in_f32.value_tile(k, sizes, w, block.n_rows, n_keys, rows)


def attend_codes(
    k: Kernel,
    sizes: CodeSizes,
    w: CodeSpace,
    cells: Cells,
    block: Block,
    start: Value,
    stop: Value,
    caches: Caches,
    scale: float,
) -> None:
    """Fold cells start..stop into m, l and o of an open block, by codes."""
    with k.loop(start, stop, by_codes.TILE_KEYS) as first:
        last = k.minimum(first + by_codes.TILE_KEYS, stop)
        n_keys = visible_cells(k, sizes, w, cells, first, last)
        with k.when(n_keys > 0):
            rows = by_codes.cached_codes(k, sizes, w, n_keys, caches)
            by_codes.score_tile(k, sizes, w, block.n_rows, n_keys, rows)
            by_codes.softmax_tile(k, sizes, w, block.n_rows, n_keys, scale)
            by_codes.value_tile(k, sizes, w, block.n_rows, n_keys, rows)


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
    shape = (kind, n_head, d_k, d_v, max_tokens)
    codes = code_sizes(*shape, fmt_k, fmt_v)
    sizes = codes or make_sizes(*shape)
    cells, n_blocks = Cells(cell_pos, cell_seq, pos, seq), sizes.n_blocks(n_tokens)
    splits = plan_splits(k, sizes, scratch, n_blocks, n_tokens, n_kv)
    with k.tiles(n_blocks * splits.count) as item:
        # The last tokens see the most cells: the longest items go out first.
        index, split = n_blocks - 1 - item // splits.count, item % splits.count
        part = (split * splits.cells, k.minimum((split + 1) * splits.cells, n_kv))
        w = code_space(k, codes, scratch) if codes else workspace(k, sizes, scratch)
        block = open_block(k, sizes, w, cells, n_tokens, index)
        clear_state(k, sizes, w)
        caches = caches_of(sizes, k_cache, v_cache, block.first % n_head, fmt_k, fmt_v)
        if codes and isinstance(w, CodeSpace):
            by_codes.pack_codes(k, codes, w, block, lambda row: q.at(row * d_k))
            attend_codes(k, codes, w, cells, block, *part, caches, scale)
        elif isinstance(w, Workspace):
            in_f32.pack_block(k, sizes, w, block, lambda row: q.at(row * d_k))
            rows = decoded_rows(k, sizes, caches)
            attend_cells(k, sizes, w, cells, block, *part, rows, scale)
        close_block(k, sizes, w, block, out, splits, split)
    with k.when(splits.count > 1):
        k.barrier()
        merge_splits(k, sizes, out, splits)


def clear_state(k: Kernel, sizes: Sizes, w: State) -> None:
    """Nothing seen yet."""
    rows = k.const(max(sizes.block_rows, LINE_WORDS), i64)
    clear(k, w.m, rows, FIRST_MAX)
    clear(k, w.l, rows)
    clear(k, w.o, k.const(sizes.block_rows * sizes.d_v, i64))


__all__ = ["ABSORBED", "STANDARD", "flash_attn", "flash_scratch_bytes"]
