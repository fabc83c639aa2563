"""Flash attention over cache rows that were expanded to keys and values per head, in chunks.

k[j, h] = [k_nope[j, h] | k_pe[j]]: k_nope and v come from kv_b times the latent part of row j, as
f32 in memory for one chunk of rows; k_pe is read from the cache row. The running state of every
(token, head) pair is kept between chunks: m and l in `state`, the sum not yet normalised in `out`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels import tile
from codegen.kernels.attention import attend_cells, clear_state
from codegen.kernels.attention_block import (
    STANDARD,
    Block,
    Cells,
    State,
    decode,
    open_block,
    touch,
)
from codegen.kernels.attention_f32 import Rows
from codegen.kernels.attention_splits import inverse
from codegen.kernels.attention_ways import ExactSizes
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel


@dataclass(frozen=True)
class Expanded:
    """Build-time sizes: heads, parts of a key, width of a value, most tokens of a batch."""

    n_head: int
    n_nope: int
    n_rope: int
    n_value: int
    n_lora: int
    max_tokens: int

    @property
    def way(self) -> ExactSizes:
        return ExactSizes(
            STANDARD,
            self.n_head,
            self.n_nope + self.n_rope,
            self.n_value,
            self.max_tokens,
            tile.slab_width(self.n_nope, self.n_rope),
            tile.slab_width(self.n_value),
        )


@dataclass(frozen=True)
class Chunk:
    """Cells start..stop: k_nope and v of row j and head h at (j - start) * n_head + h times pitch.

    `goes_on`: an earlier chunk left a state; `last`: the attention of the batch ends here.
    """

    k_nope: Pointer
    v: Pointer
    key_pitch: int
    value_pitch: int
    start: Value
    stop: Value
    goes_on: Value
    last: Value


def expanded_scratch_bytes(
    n_tokens_max: int, n_threads: int, *, n_head: int, n_nope: int, n_rope: int, n_value: int
) -> int:
    """Bytes of `scratch` that `attend_chunk` needs."""
    sizes = Expanded(n_head, n_nope, n_rope, n_value, 0, n_tokens_max).way
    return 4 * n_threads * sizes.thread_words


def expanded_state_bytes(n_tokens_max: int, *, n_head: int) -> int:
    """Bytes of `state`: m and l of every token and head."""
    return 4 * 2 * n_tokens_max * n_head


def chunk_rows(
    k: Kernel, expanded: Expanded, chunk: Chunk, cache: Pointer, fmt: BlockFormat, head: Value
) -> Rows:
    """Keys and values of one head, from the chunk and (k_pe) from the cache."""
    sizes, n_nope = expanded.way, expanded.n_nope
    lanes, n_lora = k.target.lanes, expanded.n_lora
    row_bytes = fmt.row_bytes(n_lora + expanded.n_rope)

    def at(base: Pointer, pitch: int, cell: Value) -> Pointer:
        return base.at(((cell - chunk.start) * sizes.n_head + head) * pitch)

    def key(cell: Value, column: Value) -> list[Value]:
        parts = [k.var(k.zeros(f32 * lanes)) for _ in range(sizes.key_slab // lanes)]
        with k.either(column < n_nope) as (nope, rope):
            with nope:
                start = at(chunk.k_nope, chunk.key_pitch, cell).at(column)
                for part, vector in zip(
                    parts, tile.load_vectors(start, lanes, len(parts)), strict=True
                ):
                    part.set(vector)
            with rope:
                row = cache.bytes(cell * row_bytes)
                vectors = decode(k, fmt, row, column - n_nope + n_lora, sizes.key_slab)
                for part, vector in zip(parts, vectors, strict=True):
                    part.set(vector)
        return [part.get() for part in parts]

    def value(cell: Value, column: Value) -> list[Value]:
        start = at(chunk.v, chunk.value_pitch, cell).at(column)
        return tile.load_vectors(start, lanes, sizes.value_slab // lanes)

    def prefetch(cell: Value, column: Value, count: int) -> None:
        for base, pitch, width in (
            (chunk.k_nope, chunk.key_pitch, n_nope),
            (chunk.v, chunk.value_pitch, sizes.d_v),
        ):
            touch(k, at(base, pitch, cell).cast(u8), column, count, 4 * width, sizes.d_k)

    return Rows(key, value, prefetch)


def attend_chunk(
    k: Kernel,
    expanded: Expanded,
    chunk: Chunk,
    cells: Cells,
    q: Pointer,
    cache: Pointer,
    out: Pointer,
    state: Pointer,
    scratch: Pointer,
    n_tokens: Value,
    *,
    fmt: BlockFormat,
    scale: float,
    counter: Pointer | None = None,
) -> None:
    """Fold a chunk into `out` and `state`; the last one leaves the normalised result in `out`.

    Called by all threads; `counter` is a zeroed tile counter (a new one when left out).
    """
    way = expanded.way
    w, n_blocks = way.space(k, scratch), way.n_blocks(n_tokens)
    with k.tiles(n_blocks, counter) as item:
        index = n_blocks - 1 - item  # the last tokens see the most: longest items first
        block = open_block(k, way, w, cells, n_tokens, index)
        way.pack(k, w, block, lambda r: q.at(r * way.d_k))
        clear_state(k, way, w)
        with k.when(chunk.goes_on):
            load_state(k, way, w, block, out, state)
        rows = chunk_rows(k, expanded, chunk, cache, fmt, block.first % way.n_head)

        def attend(n_keys: Value, last: Value, block: Block = block, rows: Rows = rows) -> None:
            way.fold(k, w, block.n_rows, n_keys, last, rows, scale)

        attend_cells(k, way, w, cells, chunk.start, chunk.stop, attend)
        with k.loop(0, block.n_rows) as i:
            row = block.row(i)
            state[row * 2], state[row * 2 + 1] = w.m[i], w.l[i]
            factor = k.select(chunk.last, inverse(k, w.l[i]), 1.0)
            way.close_row(k, w.o.at(i * way.d_v), out.at(row * way.d_v), factor)


def load_state(
    k: Kernel, way: ExactSizes, w: State, block: Block, out: Pointer, state: Pointer
) -> None:
    """What earlier chunks left."""
    with k.loop(0, block.n_rows) as i:
        row = block.row(i)
        w.m[i], w.l[i] = state[row * 2], state[row * 2 + 1]
        way.reopen_row(k, out.at(row * way.d_v), w.o.at(i * way.d_v))


@kernel(
    q=ptr(f32),
    k_nope=ptr(f32),
    v=ptr(f32),
    cache=ptr(u8),
    pos=ptr(i32),
    seq=ptr(i32),
    cell_pos=ptr(i32),
    cell_seq=ptr(i32),
    out=ptr(f32),
    state=ptr(f32),
    scratch=ptr(f32),
    start=dim(),
    stop=dim(),
    n_tokens=dim(),
    n_kv=dim(),
)
def flash_expanded_chunk(
    k: Kernel,
    q: Pointer,
    k_nope: Pointer,
    v: Pointer,
    cache: Pointer,
    pos: Pointer,
    seq: Pointer,
    cell_pos: Pointer,
    cell_seq: Pointer,
    out: Pointer,
    state: Pointer,
    scratch: Pointer,
    start: Value,
    stop: Value,
    n_tokens: Value,
    n_kv: Value,
    *,
    n_head: int,
    n_nope: int,
    n_rope: int,
    n_value: int,
    n_lora: int,
    max_tokens: int,
    fmt: BlockFormat,
    scale: float,
) -> None:
    """Attention of the batch to cells start..stop, k_nope [stop - start][n_head][n_nope] and v.

    Calls go on from one another: the first has start = 0, the last stop = n_kv.
    """
    expanded = Expanded(n_head, n_nope, n_rope, n_value, n_lora, max_tokens)
    chunk = Chunk(k_nope, v, n_nope, n_value, start, stop, start > 0, stop >= n_kv)
    cells = Cells(cell_pos, cell_seq, pos, seq)
    attend_chunk(
        k,
        expanded,
        chunk,
        cells,
        q,
        cache,
        out,
        state,
        scratch,
        n_tokens,
        fmt=fmt,
        scale=scale,
    )
