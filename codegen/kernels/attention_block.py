"""What the attention kernels do to one block of q rows: scores, online softmax, weighted values.

A row of q is a (token, head) pair. A block's rows share the keys they look at: all heads of some
tokens when heads share a cache row (absorbed), some tokens of one head when they do not (standard).
Cache rows ("cells") are taken a tile at a time, decoded a slab at a time, and folded into the rows'
running maximum m, sum l and output o. Source: online softmax, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.dtypes import f32, i32, i64
from codegen.formats import BlockFormat
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
LINE_WORDS = 16

LoadColumns = Callable[[Value, Value], list[Value]]


@dataclass(frozen=True)
class Sizes:
    """What is fixed at build time: heads, widths of a row of k and v, most tokens of a batch."""

    kind: str
    n_head: int
    d_k: int
    d_v: int
    max_tokens: int
    key_slab: int
    value_slab: int

    @property
    def block_rows(self) -> int:
        """Rows of q per block; more reuse a decoded slab more, but have to stay in the L2."""
        longest = self.max_tokens * (self.n_head if self.kind == ABSORBED else 1)
        return next((n for n in (1, 16, 32) if longest <= n), 64)

    @property
    def regions(self) -> dict[str, int]:
        """Words of each array of a block's workspace."""
        rows = self.block_rows
        return {
            "packed": rows * self.d_k,
            "slab": TILE_KEYS * max(self.key_slab, self.value_slab),
            "scores": TILE_KEYS * rows,
            "o": rows * self.d_v,
            **dict.fromkeys(("m", "l", "keep", "row_pos", "row_seq"), max(rows, LINE_WORDS)),
            **dict.fromkeys(("key_pos", "key_seq", "key_cell"), TILE_KEYS),
        }

    @property
    def thread_words(self) -> int:
        return sum(-(-n // LINE_WORDS) * LINE_WORDS for n in self.regions.values())

    def n_blocks(self, n_tokens: Value) -> Value:
        """Blocks of a batch: over all rows, or over the tokens of each head."""
        rows = self.block_rows
        if self.kind == ABSORBED:
            return (n_tokens * self.n_head + (rows - 1)) // rows
        return (n_tokens + (rows - 1)) // rows * self.n_head


def make_sizes(kind: str, n_head: int, d_k: int, d_v: int, max_tokens: int) -> Sizes:
    """Sizes with slabs that divide the rows. Raises ValueError for an unknown kind."""
    if kind not in (ABSORBED, STANDARD):
        raise ValueError(f"attention kind {kind!r} is neither {ABSORBED!r} nor {STANDARD!r}")
    slabs = tile.slab_width(d_k), tile.slab_width(d_v)
    return Sizes(kind, n_head, d_k, d_v, max_tokens, *slabs)


@dataclass(frozen=True)
class Workspace:
    """A block's arrays, f32 but for the last five (i32).

    packed q^T (tile.pack_rows) | a slab [cell][column] | scores [cell][row] | o [row][d_v] |
    m, l, keep [row] | position and sequence of each row, and of each cell of the tile; its cell.
    """

    packed: Pointer
    slab: Pointer
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
        arrays[name] = at.cast(i32) if "_" in name else at
        at = at.at(-(-words // LINE_WORDS) * LINE_WORDS)
    return Workspace(**arrays)


@dataclass(frozen=True)
class Cells:
    """Position and sequence of every cache row, and of every token of the batch."""

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


def open_block(
    k: Kernel,
    sizes: Sizes,
    w: Workspace,
    cells: Cells,
    q_row: Callable[[Value], Pointer],
    n_tokens: Value,
    index: Value,
) -> Block:
    """Block number `index` of the batch: packs its rows of q and fills row_pos and row_seq.

    `q_row(row)` is the address of a row, counted over tokens and heads.
    """
    size = sizes.block_rows
    if sizes.kind == ABSORBED:
        first, step = index * size, 1
        n_rows = k.minimum(n_tokens * sizes.n_head - first, size)
    else:
        per_head, step = (n_tokens + (size - 1)) // size, sizes.n_head
        token = index % per_head * size
        first, n_rows = token * step + index // per_head, k.minimum(n_tokens - token, size)
    block = Block(first, step, n_rows)
    with k.loop(0, max(size, LINE_WORDS)) as i:
        token = block.row(k.minimum(i, n_rows - 1)) // sizes.n_head
        w.row_pos[i] = cells.pos[token]
        w.row_seq[i] = k.select(i < n_rows, cells.seq[token], NO_SEQUENCE)
    if size == 1:
        copy_row(k, q_row(first), w.packed, sizes.d_k)
    else:
        rows = (w.packed, lambda i: q_row(block.row(i)), n_rows)
        tile.pack_rows(k, *rows, width=sizes.d_k, block_rows=size)
    return block


def visible_cells(
    k: Kernel, sizes: Sizes, w: Workspace, cells: Cells, start: Value, stop: Value
) -> Value:
    """Lists in w the cells of start..stop that some row of the block sees; returns how many.

    The others are empty, of other sequences or in the future: their memory is never read.
    """
    lanes = k.target.lanes
    rows = [
        (w.row_pos.at(i).load(i32 * lanes), w.row_seq.at(i).load(i32 * lanes))
        for i in range(0, max(sizes.block_rows, LINE_WORDS), lanes)
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
            weight = k.select(score <= HIDDEN, 0.0, exp2(k, score - new))
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


def decode(k: Kernel, fmt: BlockFormat, row: Pointer, column: Value, width: int) -> list[Value]:
    """`width` values of a stored row, from `column` on, as f32; both are multiples of 32."""
    blocks = [load_block(k, fmt, row, column // BLOCK + i) for i in range(width // BLOCK)]
    return [vector for block in blocks for vector in block]


def touch(k: Kernel, row: Pointer, column: Value, count: int, n_bytes: int, n_columns: int) -> None:
    """Prefetch `count` of the `n_columns` equal parts of a row of `n_bytes`."""
    start = row.bytes(column * n_bytes // n_columns)
    for line in range(0, -(-count * n_bytes // n_columns), k.target.cache_line):
        k.prefetch(start.bytes(line))


def copy_row(k: Kernel, source: Pointer, to: Pointer, width: int, factor: Any = 1.0) -> None:
    """to = source * factor, f32."""
    lanes = k.target.lanes
    with k.loop(0, width, lanes) as i:
        to.at(i).store(source.at(i).load(f32 * lanes) * factor)


def clear(k: Kernel, to: Pointer, words: Value, value: float = 0.0) -> None:
    """Set `words` words, a multiple of 16, to one number."""
    with k.loop(0, words, k.target.lanes) as i:
        to.at(i).store(k.const(value, f32 * k.target.lanes))
