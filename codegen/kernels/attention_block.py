"""What the attention kernels share: blocks of q rows, their state, the cells that they see.

A row of q is a (token, head) pair. A block's rows share the keys they look at: all heads of some
tokens when heads share a cache row (absorbed), some tokens of one head when they do not (standard).
Cache rows ("cells") are taken a tile at a time and folded into the rows' running maximum m, sum l
and output o: in f32 (attention_f32.py) or by products of 16-bit codes (attention_codes.py).
Source: online softmax, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.dtypes import b1, f32, i32, i64
from codegen.formats import BlockFormat
from codegen.kernels import tile
from codegen.kernels.blocks import BLOCK, load_block
from codegen.kernels.stream import L2
from codegen.values import Pointer, Value, Var
from codegen.vecmath import all_lanes, any_lane

if TYPE_CHECKING:
    from codegen.builder import Kernel

ABSORBED, STANDARD = "absorbed", "standard"
Turn = Callable[["Kernel", list[Value]], list[Value]]  # puts columns into another order
FEW = 4  # batches bounded by so many tokens mostly have one: blocks are made for that
TILE_KEYS = 48  # a multiple of every target's register tile
FIRST_MAX = -1e30  # not -infinity, so that no difference of infinities arises
HIDDEN = -2e30  # below every running maximum
NO_SEQUENCE = -2  # an empty cell has -1
LINE_WORDS = 16
INTEGERS = ("row_pos", "row_seq", "key_pos", "key_seq", "key_cell")


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
        tokens = 1 if self.max_tokens <= FEW else self.max_tokens
        longest = tokens * (self.n_head if self.kind == ABSORBED else 1)
        return next((n for n in (1, 16, 32) if longest <= n), 64)

    @property
    def regions(self) -> dict[str, int]:
        """Words of each array of a block's workspace."""
        return {
            "packed": self.block_rows * self.d_k,
            "slab": TILE_KEYS * max(self.key_slab, self.value_slab),
            **self.state_regions(TILE_KEYS),
        }

    def state_regions(self, tile_keys: int) -> dict[str, int]:
        """Those of `State`."""
        rows = self.block_rows
        return {
            "scores": tile_keys * rows,
            "o": rows * self.d_v,
            **dict.fromkeys(("m", "l", "keep", "row_pos", "row_seq"), max(rows, LINE_WORDS)),
            **dict.fromkeys(("key_pos", "key_seq", "key_cell"), tile_keys),
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
class State:
    """A block's arrays, f32 but for the last five (i32).

    scores [cell][row] | o [row][d_v] | m, l, keep [row] | position and sequence of each row, and of
    each cell of the tile; its cell.
    """

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


@dataclass(frozen=True)
class Workspace(State):
    """With what work in f32 needs: packed q^T (tile.pack_rows) | a slab [cell][column]."""

    packed: Pointer
    slab: Pointer


def workspace(k: Kernel, sizes: Sizes, scratch: Pointer) -> Workspace:
    """This thread's part of the scratch memory, as named arrays."""
    return Workspace(**thread_arrays(k, sizes, scratch))


def thread_arrays(k: Kernel, sizes: Sizes, scratch: Pointer) -> dict[str, Pointer]:
    """The arrays of `sizes.regions`, all f32 but for positions, sequences and cells."""
    at, arrays = scratch.at(k.thread * sizes.thread_words), {}
    for name, words in sizes.regions.items():
        arrays[name] = at.cast(i32) if name in INTEGERS else at
        at = at.at(-(-words // LINE_WORDS) * LINE_WORDS)
    return arrays


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


def open_block(
    k: Kernel,
    sizes: Sizes,
    w: State,
    cells: Cells,
    n_tokens: Value,
    index: Value,
) -> Block:
    """Block number `index` of the batch: fills row_pos and row_seq."""
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
    return block


@dataclass(frozen=True)
class Ahead:
    """Asks for the rows of the next tile while this one is multiplied, a little at each step: what
    is multiplied would wait behind requests that follow one another too fast. The first half is
    asked for while keys are multiplied, the second with the values."""

    start: Pointer
    n_bytes: int

    def step(self, half: int, i: Value, n_steps: int) -> None:
        """Step i of n_steps with keys (half 0) or values (half 1)."""
        k, share = self.start.k, -(-self.n_bytes // (2 * n_steps))
        line = self.start.bytes(half * (self.n_bytes // 2) + i * share)
        for at in range(0, share, k.target.cache_line):
            k.prefetch(line.bytes(at), L2)


@dataclass(frozen=True)
class Caches:
    """Addresses of a head's keys and values by cell; absorbed attention has one row for both."""

    key: Callable[[Value], Pointer]
    value: Callable[[Value], Pointer]
    fmt_k: BlockFormat
    fmt_v: BlockFormat


def visible_cells(
    k: Kernel, sizes: Sizes, w: State, cells: Cells, start: Value, stop: Value
) -> Value:
    """Lists in w the cells of start..stop that some row of the block sees; returns how many.

    The others are empty, of other sequences or in the future: their memory is never read.
    """
    lanes, count = k.target.lanes, k.var(k.const(0, i64))
    # The first row sees most of what any row sees, so that whole vectors can be listed at once.
    pos, seq = w.row_pos[0], w.row_seq[0]
    steps = k.vector(list(range(lanes)), i32)
    vectors_end = start + (stop - start) // lanes * lanes
    with k.loop(start, vectors_end, lanes) as first:
        key_pos, key_seq = (p.at(first).load(i32 * lanes) for p in (cells.cell_pos, cells.cell_seq))
        with k.either(all_lanes(key_seq.eq(seq) & (key_pos <= pos))) as (yes, no):
            with yes:
                n = count.get()
                w.key_pos.at(n).store(key_pos)
                w.key_seq.at(n).store(key_seq)
                w.key_cell.at(n).store(steps + k.splat(first.to(i32), lanes))
                count.set(n + lanes)
            with no, k.loop(first, first + lanes) as cell:
                list_visible(k, sizes, w, cells, cell, count)
    with k.loop(vectors_end, stop) as cell:
        list_visible(k, sizes, w, cells, cell, count)
    return count.get()


def list_visible(k: Kernel, sizes: Sizes, w: State, cells: Cells, cell: Value, count: Var) -> None:
    """Lists one cell if some row sees it."""
    lanes = k.target.lanes
    pos, seq, n = cells.cell_pos[cell], cells.cell_seq[cell], count.get()
    w.key_pos[n], w.key_seq[n], w.key_cell[n] = pos, seq, cell.to(i32)
    seen = k.const(0, b1 * lanes)
    for i in range(0, max(sizes.block_rows, LINE_WORDS), lanes):
        row_pos, row_seq = (p.at(i).load(i32 * lanes) for p in (w.row_pos, w.row_seq))
        seen = seen | (row_seq.eq(seq) & (row_pos >= pos))
    count.set(n + any_lane(seen).to(i64))


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


def move_row(
    k: Kernel, source: Pointer, to: Pointer, width: int, turn: Turn, count: int, factor: Any = 1.0
) -> None:
    """The same, `count` vectors at a time, their columns put into another order by `turn`."""
    lanes = k.target.lanes
    with k.loop(0, width, count * lanes) as i:
        parts = [source.at(i + j * lanes).load(f32 * lanes) * factor for j in range(count)]
        for j, v in enumerate(turn(k, parts)):
            to.at(i + j * lanes).store(v)


def clear(k: Kernel, to: Pointer, words: Value, value: float = 0.0) -> None:
    """Set `words` words, a multiple of 16, to one number."""
    with k.loop(0, words, k.target.lanes) as i:
        to.at(i).store(k.const(value, f32 * k.target.lanes))
