"""Flash attention over cache rows that were expanded to keys and values per head, in chunks.

k[j, h] = [k_nope[j, h] | k_pe[j]]: k_nope and v come from kv_b times the latent part of row j. One
chunk of rows is in memory at a time: as codes (expand_codes.py), or for f32 caches k_nope and v in
f32, with k_pe read from the cache row. The running state of every (token, head) pair is kept
between chunks: m and l in `state`, the sum not yet normalised in `out`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import F32, BlockFormat
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
from codegen.kernels.attention_codes import CodeSizes
from codegen.kernels.attention_f32 import Rows
from codegen.kernels.attention_splits import inverse
from codegen.kernels.attention_ways import ExactSizes
from codegen.kernels.codes import EXPANDED_CODES, codes_of
from codegen.kernels.expand_codes import CodeChunk
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
    def sizes(self) -> dict[str, Any]:
        """The fields of `Sizes`."""
        return {
            "kind": STANDARD,
            "n_head": self.n_head,
            "d_k": self.n_nope + self.n_rope,
            "d_v": self.n_value,
            "max_tokens": self.max_tokens,
            "key_slab": tile.slab_width(self.n_nope, self.n_rope),
            "value_slab": tile.slab_width(self.n_value),
        }

    @property
    def exact(self) -> ExactSizes:
        return ExactSizes(**self.sizes)

    def way(self, fmt: BlockFormat, weights: BlockFormat) -> ExactSizes | CodeSizes:
        """f32 for an f32 cache, and for rows of q that come singly. What comes of rows quantised to
        meet the weights is no better than a code of 12 bits, whatever the cache's format."""
        if fmt is F32 or self.exact.block_rows == 1:
            return self.exact
        rough = fmt.is_quantised or weights.integer_dot
        codes = EXPANDED_CODES if rough else codes_of(fmt)
        return CodeSizes(**self.sizes, codes_k=codes, codes_v=codes)


@dataclass(frozen=True)
class Span:
    """Cells start..stop. `goes_on`: an earlier chunk left a state; `last`: the attention of the
    batch ends here."""

    start: Value
    stop: Value
    goes_on: Value
    last: Value


@dataclass(frozen=True)
class Chunk:
    """k_nope and v of row j and head h at ((j - start) * n_head + h) * pitch, f32."""

    k_nope: Pointer
    v: Pointer
    key_pitch: int
    value_pitch: int
    start: Value


def expanded_state_bytes(n_tokens_max: int, *, n_head: int) -> int:
    """Bytes of `state`: m and l of every token and head."""
    return 4 * 2 * n_tokens_max * n_head


def chunk_rows(
    k: Kernel, expanded: Expanded, chunk: Chunk, cache: Pointer, fmt: BlockFormat, head: Value
) -> Rows:
    """Keys and values of one head, from the chunk and (k_pe) from the cache."""
    sizes, n_nope = expanded.exact, expanded.n_nope
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


# (number of cells listed, first cell, cell behind the last) of a tile
Fold = Callable[[Value, Value, Value], None]


def fold_rows(
    k: Kernel, expanded: Expanded, chunk: Chunk, cache: Pointer, fmt: BlockFormat, scale: float
) -> Callable[[Any, Block], Fold]:
    """How an open block takes in a tile of a chunk in f32."""
    way = expanded.exact

    def of_block(w: Any, block: Block) -> Fold:
        rows = chunk_rows(k, expanded, chunk, cache, fmt, block.first % way.n_head)

        def fold(n_keys: Value, _: Value, last: Value) -> None:
            way.fold(k, w, block.n_rows, n_keys, last, rows, scale)

        return fold

    return of_block


def fold_codes(
    k: Kernel, chunk: CodeChunk, memory: Pointer, cells: Cells, start: Value, scale: float
) -> Callable[[Any, Block], Fold]:
    """How an open block takes in a tile of a chunk that starts at cell `start`, by codes.

    Values lie in pairs of neighbouring cells: all cells of the tile take part, those that no row
    sees with a weight of 0.
    """
    way = chunk.way

    def of_block(w: Any, block: Block) -> Fold:
        def fold(n_keys: Value, first: Value, _: Value) -> None:
            last = w.key_cell[n_keys - 1].to(i64) + 1  # behind it there is nothing to see
            with k.when(n_keys < last - first), k.loop(first, last) as cell:
                w.key_pos[cell - first] = cells.cell_pos[cell]
                w.key_seq[cell - first] = cells.cell_seq[cell]
            head = block.first % way.n_head
            rows, key_scale, value_scale = chunk.tile(memory, head, first - start)
            with_scales = replace(w, key_scale=key_scale, value_scale=value_scale)
            way.fold(k, with_scales, block.n_rows, last - first, rows, scale)

        return fold

    return of_block


def attend_chunk(
    k: Kernel,
    way: ExactSizes | CodeSizes,
    span: Span,
    fold_of: Callable[[Any, Block], Fold],
    cells: Cells,
    q: Pointer,
    out: Pointer,
    state: Pointer,
    scratch: Pointer,
    n_tokens: Value,
    counter: Pointer | None = None,
) -> None:
    """Fold a chunk into `out` and `state`; the last one leaves the normalised result in `out`.

    Called by all threads; `counter` is a zeroed tile counter (a new one when left out).
    """
    w: Any = way.space(k, scratch)
    n_blocks = way.n_blocks(n_tokens)
    with k.tiles(n_blocks, counter) as item:
        index = n_blocks - 1 - item  # the last tokens see the most: longest items first
        block = open_block(k, way, w, cells, n_tokens, index)
        way.pack(k, w, block, lambda r: q.at(r * way.d_k))
        clear_state(k, way, w)
        with k.when(span.goes_on):
            load_state(k, way, w, block, out, state)
        attend_cells(k, way, w, cells, span.start, span.stop, fold_of(w, block))
        with k.loop(0, block.n_rows) as i:
            row = block.row(i)
            state[row * 2], state[row * 2 + 1] = w.m[i], w.l[i]
            factor = k.select(span.last, inverse(k, w.l[i]), 1.0)
            way.close_row(k, w.o.at(i * way.d_v), out.at(row * way.d_v), factor)


def load_state(
    k: Kernel, way: ExactSizes | CodeSizes, w: State, block: Block, out: Pointer, state: Pointer
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
    """Attention in f32 of the batch to cells start..stop, k_nope [stop - start][n_head][n_nope], v.

    Calls go on from one another: the first has start = 0, the last stop = n_kv.
    """
    expanded = Expanded(n_head, n_nope, n_rope, n_value, n_lora, max_tokens)
    cells = Cells(cell_pos, cell_seq, pos, seq)
    fold_of = fold_rows(k, expanded, Chunk(k_nope, v, n_nope, n_value, start), cache, fmt, scale)
    span = Span(start, stop, start > 0, stop >= n_kv)
    attend_chunk(k, expanded.exact, span, fold_of, cells, q, out, state, scratch, n_tokens)
