"""Flash attention over cache rows: online softmax, all work in f32.

    out[t, h] = sum over j of w[j] v[j, h],  w = softmax over visible j of scale * q[t, h] . k[j, h]

Row j is visible to token t iff cell_seq[j] == seq[t] and cell_pos[j] <= pos[t]; a token that sees
no row gets zeros. Two kinds, chosen at build time:

    absorbed   k is one row per cell for all heads, v its first d_v values (a view)
    standard   k and v have a row per cell and head, in two caches of their own formats

q is [n_tokens][n_head][d_k], out [n_tokens][n_head][d_v]; "row" r below counts (token, head) pairs:
token r // n_head. A work item takes a block of rows and a range of cells, decodes the cells that
any row of the block may see, a tile at a time, and folds each tile into its running maximum m,
sum l and output o. Source: online softmax, Milakov and Gimelshein (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import DType, f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels import tile
from codegen.kernels.blocks import BLOCK, load_block
from codegen.values import Pointer, Value
from codegen.vecmath import LOG2_E, any_lane, exp2

if TYPE_CHECKING:
    from codegen.builder import Kernel

ABSORBED, STANDARD = "absorbed", "standard"
TILE_KEYS = 48  # a multiple of every target's register tile
FIRST_MAX = -1e30  # not -infinity, so that no difference of infinities arises
HIDDEN = -2e30  # below every running maximum
NO_SEQUENCE = -2  # an empty cell has -1
MIN_SPLIT = 4 * TILE_KEYS  # cells per split at least: packing q again must stay cheap
MAX_ITEMS = 128
WORD = 4
LINE = 16  # words per cache line

LoadRow = Callable[[Value, Pointer, Pointer], None]


@dataclass(frozen=True)
class Sizes:
    """What is fixed at build time: heads, widths of a row of k and v, most tokens of a batch."""

    kind: str
    n_head: int
    d_k: int
    d_v: int
    max_tokens: int

    @property
    def block_rows(self) -> int:
        """Rows of q that an item works on; more reuse a decoded tile more but leave the L2."""
        longest = self.max_tokens * (self.n_head if self.kind == ABSORBED else 1)
        return 16 if longest <= 16 else 32

    @property
    def regions(self) -> dict[str, int]:
        """Words of each array of an item's workspace; see Workspace."""
        rows, values = self.block_rows, TILE_KEYS * self.d_v
        return {
            "packed": rows * self.d_k,
            "keys": TILE_KEYS * self.d_k,
            "values": 0 if self.kind == ABSORBED else values,
            "scores": TILE_KEYS * rows,
            "o": rows * self.d_v,
            **dict.fromkeys(("m", "l", "keep", "row_pos", "row_seq"), rows),
            **dict.fromkeys(("key_pos", "key_seq", "key_cell"), TILE_KEYS),
        }

    @property
    def thread_words(self) -> int:
        return sum(-(-n // LINE) * LINE for n in self.regions.values())

    @property
    def partial_rows(self) -> int:
        """Rows times splits at most: what bounds the memory of unmerged results."""
        return max(1024, 32 * self.n_head)


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
    sizes = Sizes(kind, n_head, d_k, d_v, n_tokens_max)
    splits = -(-n_kv_max // MIN_SPLIT)
    rows = min(sizes.partial_rows, n_tokens_max * n_head * splits) if splits > 1 else 0
    return WORD * (n_threads * sizes.thread_words + rows * (d_v + 2))


@dataclass(frozen=True)
class Workspace:
    """An item's arrays, all f32 but the last five (i32).

    packed q^T (tile.pack_rows) | keys, values [cell][d] decoded | scores [cell][row] | o [row][d_v]
    | m, l, keep [row] | position and sequence per row and per cell of the tile, and its cell.
    """

    packed: Pointer
    keys: Pointer
    values: Pointer
    scores: Pointer
    o: Pointer
    m: Pointer
    l: Pointer  # noqa: E741 - the paper's name
    keep: Pointer
    row_pos: Pointer
    row_seq: Pointer
    key_pos: Pointer
    key_seq: Pointer
    key_cell: Pointer


def workspace(k: Kernel, sizes: Sizes, scratch: Pointer) -> Workspace:
    """This thread's part of the scratch memory, as named arrays."""
    at, arrays = scratch.at(k.thread * sizes.thread_words), {}
    for name, words in sizes.regions.items():
        arrays[name] = at if "_" not in name else at.cast(i32)
        at = at.at(-(-words // LINE) * LINE)
    if sizes.kind == ABSORBED:
        arrays["values"] = arrays["keys"]
    return Workspace(**arrays)


@dataclass(frozen=True)
class Cells:
    """Position and sequence of every cache row and of every token of the batch."""

    cell_pos: Pointer
    cell_seq: Pointer
    pos: Pointer
    seq: Pointer


@dataclass(frozen=True)
class Block:
    """Rows first, first + step, ... of q."""

    first: Value
    step: int
    n_rows: Value

    def row(self, i: Value) -> Value:
        return self.first + i * self.step


def open_block(
    k: Kernel, sizes: Sizes, w: Workspace, cells: Cells, n_tokens: Value, index: Value
) -> Block:
    """Block number `index` of the batch; fills the workspace's row_pos and row_seq."""
    size = sizes.block_rows
    if sizes.kind == ABSORBED:
        first, step = index * size, 1
        n_rows = k.minimum(n_tokens * sizes.n_head - first, size)
    else:
        per_head, step = (n_tokens + (size - 1)) // size, sizes.n_head
        token = index % per_head * size
        first, n_rows = token * step + index // per_head, k.minimum(n_tokens - token, size)
    with k.loop(0, size) as i:
        token = (first + k.minimum(i, n_rows - 1) * step) // sizes.n_head
        w.row_pos[i] = cells.pos[token]
        w.row_seq[i] = k.select(i < n_rows, cells.seq[token], NO_SEQUENCE)
    return Block(first, step, n_rows)


def visible_cells(
    k: Kernel, sizes: Sizes, w: Workspace, cells: Cells, start: Value, stop: Value
) -> Value:
    """Lists in w the cells of start..stop that some row of the block sees; returns how many.

    The others are empty, of other sequences or in the future: their memory is never read.
    """
    lanes = k.target.lanes
    rows = [
        (w.row_pos.at(i).load(i32 * lanes), w.row_seq.at(i).load(i32 * lanes))
        for i in range(0, sizes.block_rows, lanes)
    ]
    count = k.var(k.const(0, i64))
    with k.loop(start, stop) as cell:
        pos, seq, n = cells.cell_pos[cell], cells.cell_seq[cell], count.get()
        w.key_pos[n], w.key_seq[n], w.key_cell[n] = pos, seq, cell.to(i32)
        seen = rows[0][1].eq(seq) & (rows[0][0] >= pos)
        for row_pos, row_seq in rows[1:]:
            seen = seen | (row_seq.eq(seq) & (row_pos >= pos))
        count.set(n + any_lane(seen).to(i64))
    return count.get()


def softmax_tile(
    k: Kernel, w: Workspace, n_rows: Value, n_keys: Value, *, rows: int, scale: float
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
            at = w.scores.at(key * rows + row)
            seen = seq.eq(w.key_seq[key]) & (pos >= w.key_pos[key])
            score = k.select(seen, at.load(f32 * lanes) * (scale * LOG2_E), HIDDEN)
            at.store(score)
            top.set(k.maximum(score, top.get()))
        new = top.get()
        keep = exp2(k, old - new)
        total = k.var(w.l.at(row).load(f32 * lanes) * keep)
        with k.loop(0, n_keys) as key:
            at = w.scores.at(key * rows + row)
            score = at.load(f32 * lanes)
            weight = k.select(score <= HIDDEN, 0.0, exp2(k, score - new))
            at.store(weight)
            total += weight
        w.m.at(row).store(new)
        w.l.at(row).store(total.get())
        w.keep.at(row).store(keep)


def attend_cells(
    k: Kernel,
    sizes: Sizes,
    w: Workspace,
    cells: Cells,
    block: Block,
    start: Value,
    stop: Value,
    load_row: LoadRow,
    *,
    scale: float,
) -> None:
    """Fold cells start..stop into m, l and o of the workspace; q lies packed in it.

    `load_row(cell, key, value)` decodes one cell to where its row of k (and of v) is wanted.
    """
    rows, n_rows = sizes.block_rows, block.n_rows
    pitch = sizes.d_k if sizes.kind == ABSORBED else sizes.d_v
    with k.loop(start, stop, TILE_KEYS) as first:
        last = k.minimum(first + TILE_KEYS, stop)
        n_keys = visible_cells(k, sizes, w, cells, first, last)
        with k.when(n_keys > 0):
            with k.loop(0, n_keys) as i:
                cell = w.key_cell[i].to(i64)
                load_row(cell, w.keys.at(i * sizes.d_k), w.values.at(i * pitch))
            tile.multiply_keys(
                k, w.scores, w.packed, w.keys, n_rows, n_keys, width=sizes.d_k, block_rows=rows
            )
            softmax_tile(k, w, n_rows, n_keys, rows=rows, scale=scale)
            tile.add_values(
                k,
                w.o,
                w.scores,
                w.values,
                w.keep,
                n_rows,
                n_keys,
                width=sizes.d_v,
                pitch=pitch,
                block_rows=rows,
            )


def decode(k: Kernel, fmt: BlockFormat, row: Pointer, to: Pointer, width: int) -> None:
    """A stored row of `width` values to f32."""
    with k.loop(0, width // BLOCK) as block:
        for i, v in enumerate(load_block(k, fmt, row, block)):
            to.at(block * BLOCK + i * k.target.lanes).store(v)


def copy_row(k: Kernel, source: Pointer, to: Pointer, width: int, factor: Value) -> None:
    """to = source * factor, f32."""
    lanes = k.target.lanes
    with k.loop(0, width, lanes) as i:
        to.at(i).store(source.at(i).load(f32 * lanes) * factor)


def clear(k: Kernel, to: Pointer, words: Value, value: float = 0.0, type_: DType = f32) -> None:
    """Set `words` words, a multiple of 16, to one number."""
    with k.loop(0, words, k.target.lanes) as i:
        to.at(i).store(k.const(value, type_ * k.target.lanes))


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
    partial_rows, items = (k.const(n, i64) for n in (sizes.partial_rows, MAX_ITEMS))
    most = k.minimum(partial_rows // n_rows, items // n_blocks)
    wanted = k.maximum(k.minimum(most, (n_kv + (MIN_SPLIT - 1)) // MIN_SPLIT), 1)
    cells = tile.round_up(k, (n_kv + wanted - 1) // wanted, TILE_KEYS)
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
                copy_row(k, o, splits.partial.at(slot * d_v), d_v, k.const(1.0, f32))
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


def row_loader(
    k: Kernel,
    sizes: Sizes,
    k_cache: Pointer,
    v_cache: Pointer,
    head: Value,
    fmt_k: BlockFormat,
    fmt_v: BlockFormat,
) -> LoadRow:
    """How a cell's rows of k and v get from the caches to a tile."""
    key_bytes, value_bytes = fmt_k.row_bytes(sizes.d_k), fmt_v.row_bytes(sizes.d_v)

    def absorbed(cell: Value, key: Pointer, _: Pointer) -> None:
        decode(k, fmt_k, k_cache.bytes(cell * key_bytes), key, sizes.d_k)

    def standard(cell: Value, key: Pointer, value: Pointer) -> None:
        row = cell * sizes.n_head + head
        decode(k, fmt_k, k_cache.bytes(row * key_bytes), key, sizes.d_k)
        decode(k, fmt_v, v_cache.bytes(row * value_bytes), value, sizes.d_v)

    return absorbed if sizes.kind == ABSORBED else standard


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
    sizes = Sizes(kind, n_head, d_k, d_v, max_tokens)
    w, cells = workspace(k, sizes, scratch), Cells(cell_pos, cell_seq, pos, seq)
    rows = sizes.block_rows
    if kind == ABSORBED:
        n_blocks = (n_tokens * n_head + (rows - 1)) // rows
    else:
        n_blocks = (n_tokens + (rows - 1)) // rows * n_head
    splits = plan_splits(k, sizes, scratch, n_blocks, n_tokens, n_kv)
    with k.tiles(n_blocks * splits.count) as item:
        # The last tokens see the most cells: the longest items go out first.
        index, split = n_blocks - 1 - item // splits.count, item % splits.count
        block = open_block(k, sizes, w, cells, n_tokens, index)
        start_block(k, sizes, w, block, q)
        start = split * splits.cells
        stop = k.minimum(start + splits.cells, n_kv)
        load_row = row_loader(k, sizes, k_cache, v_cache, block.first % n_head, fmt_k, fmt_v)
        attend_cells(k, sizes, w, cells, block, start, stop, load_row, scale=scale)
        close_block(k, sizes, w, block, out, splits, split)
    with k.when(splits.count > 1):
        k.barrier()
        merge_splits(k, sizes, out, splits)


def start_block(k: Kernel, sizes: Sizes, w: Workspace, block: Block, q: Pointer) -> None:
    """Pack the block's rows of q and clear its running state."""
    vectors = tile.micro(k, sizes.block_rows).vectors
    tile.pack_rows(
        k,
        w.packed,
        lambda i: q.at(block.row(i) * sizes.d_k),
        block.n_rows,
        width=sizes.d_k,
        vectors=vectors,
    )
    size = k.const(sizes.block_rows, i64)
    clear(k, w.m, size, FIRST_MAX)
    clear(k, w.l, size)
    clear(k, w.o, size * sizes.d_v)
