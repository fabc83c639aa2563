"""Attention of a block of q rows by integer products: q, keys, weights and values as 16-bit codes.

    s[j] = scale_q scale_k[j] sum of q codes * k codes      in f32 from here on, up to the weights
    p'[j] = p[j] scale_v[j]                                 to codes, one scale per row and tile
    o = o keep + scale_p sum of p' codes * v codes

The sums are exact (codes.py, code_tile.py); what is added to the error is the rounding to codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i16, i32, i64
from codegen.formats import F32, BlockFormat
from codegen.kernels import code_tile
from codegen.kernels.attention_block import (
    ABSORBED,
    HIDDEN,
    LINE_WORDS,
    Block,
    Sizes,
    State,
    make_sizes,
    thread_arrays,
)
from codegen.kernels.blocks import BLOCK
from codegen.kernels.code_tile import LARGEST_CODE, Codes, micro
from codegen.kernels.codes import RowCodes, codes_of, row_codes
from codegen.kernels.encode import inverse_of
from codegen.kernels.stream import L2
from codegen.values import Pointer, Value
from codegen.vecmath import LOG2_E, exp2

if TYPE_CHECKING:
    from codegen.builder import Kernel

TILE_KEYS = 64
KEY_GROUP = 16  # keys that are multiplied while they are in the L1 cache
# Between the parts of a tile's values there is room, or they would meet in a few sets of the L1.
PART_PAIRS = TILE_KEYS // 2 + 8
CODES = ("packed", "values", "weights")


@dataclass(frozen=True)
class CodeSizes(Sizes):
    """With the codes of keys and values."""

    codes_k: Codes
    codes_v: Codes

    @property
    def slabs(self) -> list[tuple[int, int]]:
        return self.codes_k.slabs(self.d_k, self.block_rows)

    @property
    def regions(self) -> dict[str, int]:
        rows = self.block_rows
        return {
            "packed": rows * self.codes_k.terms * self.d_k // 2,
            "q_scale": len(self.slabs) * rows,
            "keys": KEY_GROUP * self.d_k // 2,
            "values": PART_PAIRS * self.d_v,
            "weights": TILE_KEYS // 2 * rows,
            **dict.fromkeys(("key_scale", "value_scale"), TILE_KEYS),
            "weight_scale": max(rows, LINE_WORDS),
            **self.state_regions(TILE_KEYS + 1),
        }


def code_sizes(
    kind: str, n_head: int, d_k: int, d_v: int, max_tokens: int, fmt_k: BlockFormat,
    fmt_v: BlockFormat,
) -> CodeSizes | None:  # fmt: skip
    """Sizes for attention by codes; None where f32 is the way: an f32 cache is asked for to be
    exact, and a single row of q shares nothing that would pay for making codes."""
    sizes = make_sizes(kind, n_head, d_k, d_v, max_tokens)
    if F32 in (fmt_k, fmt_v) or sizes.block_rows == 1:
        return None
    slabs = sizes.key_slab, sizes.value_slab
    codes = codes_of(fmt_k), codes_of(fmt_k if kind == ABSORBED else fmt_v)
    return CodeSizes(kind, n_head, d_k, d_v, max_tokens, *slabs, *codes)


@dataclass(frozen=True)
class CodeSpace(State):
    """With the codes: packed q (code_tile.pack_queries) and its scales [slab][row] | keys of a
    group [key][column] | values and weights of a tile (code_tile.add_values) | the scales of its
    keys and values, and of the weights [row]."""

    packed: Pointer
    q_scale: Pointer
    keys: Pointer
    values: Pointer
    weights: Pointer
    key_scale: Pointer
    value_scale: Pointer
    weight_scale: Pointer


def code_space(k: Kernel, sizes: CodeSizes, scratch: Pointer) -> CodeSpace:
    """This thread's part of the scratch memory, as named arrays."""
    arrays = thread_arrays(k, sizes, scratch)
    arrays |= {name: arrays[name].cast(i32) for name in CODES}
    return CodeSpace(**arrays | {"keys": arrays["keys"].cast(i16)})


def pack_codes(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, block: Block, q_row: Callable[[Value], Pointer]
) -> None:
    """Codes of the block's rows of q; `q_row(row)` is the address of one, over tokens and heads."""
    code_tile.pack_queries(
        k,
        w.packed,
        w.q_scale,
        lambda i: q_row(block.row(i)),
        block.n_rows,
        codes=sizes.codes_k,
        width=sizes.d_k,
        block_rows=sizes.block_rows,
    )


@dataclass(frozen=True)
class TileCodes:
    """Where the codes of a tile's cells come from.

    `keys(first)` gives the address of the codes of KEY_GROUP keys from number `first` on, `pitch`
    codes apart, after it has made them and those of their values, and the scales. `values` are the
    tile's in pairs, as `add_values` takes them: the columns of a register tile, then the next.
    """

    keys: Callable[[Value], Pointer]
    pitch: int
    values: Pointer


@dataclass(frozen=True)
class Caches:
    """The rows of a head's keys and values by cell; of absorbed attention both are one row."""

    key: Callable[[Value], Pointer]
    value: Callable[[Value], Pointer]
    fmt_k: BlockFormat
    fmt_v: BlockFormat


def cached_codes(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, n_keys: Value, caches: Caches
) -> TileCodes:
    """The listed cells, two at a time."""
    d_k, d_v = sizes.d_k, sizes.d_v

    def keys(first: Value) -> Pointer:
        with k.loop(first, k.minimum(first + KEY_GROUP, n_keys), 2) as i:
            cells = [w.key_cell[j].to(i64) for j in (i, k.minimum(i + 1, n_keys - 1))]
            for cell in cells:
                ask_for_rows(k, sizes, caches, cell + TILE_KEYS)
            pair = [row_codes(k, caches.fmt_k, caches.key(cell), d_k) for cell in cells]
            to = w.keys.at((i - first) * d_k)
            store_scales(w.key_scale.at(i), pair)
            if sizes.kind == ABSORBED:
                store_pair(k, sizes, w, pair, 0, d_v, i, to)
                store_keys(k, sizes, pair, d_v, d_k, to)
            else:
                store_keys(k, sizes, pair, 0, d_k, to)
                pair = [row_codes(k, caches.fmt_v, caches.value(cell), d_v) for cell in cells]
                store_pair(k, sizes, w, pair, 0, d_v, i)
            store_scales(w.value_scale.at(i), pair)
        return w.keys

    return TileCodes(keys, d_k, w.values)


def ask_for_rows(k: Kernel, sizes: CodeSizes, caches: Caches, cell: Value) -> None:
    """Ask for a later cell's memory: most often it is seen, too."""
    rows = [(caches.key(cell), caches.fmt_k.row_bytes(sizes.d_k))]
    if sizes.kind != ABSORBED:
        rows.append((caches.value(cell), caches.fmt_v.row_bytes(sizes.d_v)))
    for row, n_bytes in rows:
        for line in range(0, n_bytes, k.target.cache_line):
            k.prefetch(row.bytes(line), L2)


def store_scales(to: Pointer, rows: list[RowCodes]) -> None:
    for i, row in enumerate(rows):
        to[i] = row.scale


def store_keys(
    k: Kernel, sizes: CodeSizes, rows: list[RowCodes], first: int, last: int, keys: Pointer
) -> None:
    """Columns first..last of rows' codes, one row behind the other."""
    with k.loop(first // BLOCK, last // BLOCK) as block:
        for i, row in enumerate(rows):
            for j, v in enumerate(row.block(block)):
                keys.at(i * sizes.d_k + block * BLOCK).at(j * 2 * k.target.lanes).store(v)


def store_pair(
    k: Kernel,
    sizes: CodeSizes,
    w: CodeSpace,
    rows: list[RowCodes],
    first: int,
    last: int,
    number: Value,
    keys: Pointer | None = None,
) -> None:
    """Columns first..last of the codes of values `number` and `number` + 1, interleaved; also to
    `keys`, one row behind the other, where they are keys, too."""
    lanes, width = k.target.lanes, part_width(k, sizes)
    with k.loop(first, last, max(width, BLOCK)) as column:
        for step in range(0, max(width, BLOCK), BLOCK):
            both = zip(*(row.block((column + step) // BLOCK) for row in rows), strict=True)
            for j, pair in enumerate(both):
                at = step + j * 2 * lanes
                if keys is not None:
                    for i, v in enumerate(pair):
                        keys.at(column + (i * sizes.d_k + at)).store(v)
                to = w.values.at((column + at // width * width) * PART_PAIRS + at % width)
                for i, v in enumerate(code_tile.interleave(k, *pair)):
                    to.at(number * (width // 2) + i * lanes).store(v)


def part_width(k: Kernel, sizes: CodeSizes) -> int:
    """Columns of values that a register tile of `add_values` takes."""
    return micro(k, sizes.block_rows, d_v=sizes.d_v).columns * k.target.lanes


def score_tile(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, n_rows: Value, n_keys: Value, rows: TileCodes
) -> None:
    """scores[cell][row] = k[cell] . q[row] / scale_k[cell] for the listed cells."""
    size, slabs, codes = sizes.block_rows, sizes.slabs, sizes.codes_k
    width = slabs[0][1]
    with k.loop(0, n_keys, KEY_GROUP) as first:
        keys, scores = rows.keys(first), w.scores.at(first * size)
        n_group = k.minimum(n_keys - first, KEY_GROUP)

        def add_slab(slab: Value | int, is_first: bool, keys: Pointer = keys) -> None:
            code_tile.multiply_keys(
                k, scores, w.packed.at(slab * (size * codes.terms * width // 2)),
                w.q_scale.at(slab * size), keys.at(slab * width), n_rows, n_group, codes=codes,
                width=width, pitch=rows.pitch, block_rows=size, first=is_first,
            )  # fmt: skip

        add_slab(0, True)
        if len(slabs) > 1:
            with k.loop(1, len(slabs)) as slab:
                add_slab(slab, False)


def softmax_tile(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, n_rows: Value, n_keys: Value, scale: float
) -> None:
    """Scores of a tile to codes of weights: p = 2^(s - m'), l' = l * keep + sum of p.

    m' = max(m, s), keep = 2^(m - m'), s in log2 units. A hidden cell weighs exactly 0; NaN stays.
    """
    lanes, size = k.target.lanes, sizes.block_rows
    with k.loop(0, n_rows, lanes) as row:
        scores = w.scores.at(row)
        old = w.m.at(row).load(f32 * lanes)
        new = highest_score(k, sizes, w, row, n_keys, scale)
        keep = exp2(k, old - new)
        total, bound = folded_weights(k, sizes, w, row, n_keys, new)
        w.m.at(row).store(new)
        w.l.at(row).store(w.l.at(row).load(f32 * lanes) * keep + total)
        w.keep.at(row).store(keep)
        w.weight_scale.at(row).store(bound)
        inverse = inverse_of(k, bound)
        scores.at(n_keys * size).store(k.zeros(f32 * lanes))  # the odd one's partner
        with k.loop(0, n_keys, 2) as key:
            both = [scores.at((key + i) * size).load(f32 * lanes) for i in range(2)]
            w.weights.at(key // 2 * size + row).store(
                code_tile.round_pairs(k, both[0], both[1], inverse)
            )


def highest_score(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, row: Value, n_keys: Value, scale: float
) -> Value:
    """m' of a vector of rows; their scores become log2 units, those of cells not seen HIDDEN."""
    lanes = k.target.lanes
    pos, seq = (p.at(row).load(i32 * lanes) for p in (w.row_pos, w.row_seq))
    top = k.var(w.m.at(row).load(f32 * lanes))
    with k.loop(0, n_keys) as key:
        at = w.scores.at(key * sizes.block_rows + row)
        seen = seq.eq(w.key_seq[key]) & (pos >= w.key_pos[key])
        score = at.load(f32 * lanes) * (w.key_scale[key] * (scale * LOG2_E))
        score = k.select(seen, score, HIDDEN)
        at.store(score)
        top.set(k.maximum(score, top.get()))
    return top.get()


def folded_weights(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, row: Value, n_keys: Value, top: Value
) -> tuple[Value, Value]:
    """(sum of p, scale of the codes) of a vector of rows; scores become p' = p scale_v.

    The scale is the least with which codes keep to i16 and, over the keys of a sum, to the budget.
    """
    lanes, codes, zeros = k.target.lanes, sizes.codes_v, k.zeros(f32 * k.target.lanes)
    n_sum = codes.keys_per_sum(TILE_KEYS)
    total, folded_total, largest, heaviest = (k.var(zeros) for _ in range(4))
    with k.loop(0, n_keys, n_sum) as start:
        part = k.var(zeros)
        with k.loop(start, k.minimum(start + n_sum, n_keys)) as key:
            at = w.scores.at(key * sizes.block_rows + row)
            score = at.load(f32 * lanes)
            hidden = score <= HIDDEN
            weight = k.select(hidden, 0.0, exp2(k, score - top))
            folded = k.select(hidden, 0.0, weight * w.value_scale[key])
            at.store(folded)
            total += weight
            part += folded
            largest.set(k.maximum(folded, largest.get()))
        heaviest.set(k.maximum(part.get(), heaviest.get()))
        folded_total += part.get()
    by_sum = heaviest.get() * (1.0001 / (codes.budget - n_sum))
    bound = k.maximum(largest.get() * (1 / (LARGEST_CODE - 1)), by_sum)
    return total.get(), bound + folded_total.get() * 0.0  # which is NaN if a weight is


def value_tile(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, n_rows: Value, n_keys: Value, rows: TileCodes
) -> None:
    """o = o * keep + weights^T v for the listed cells."""
    with k.loop(0, sizes.d_v, part_width(k, sizes)) as column:
        code_tile.add_values(
            k, w.o.at(column), w.weights, rows.values.at(column * PART_PAIRS), w.keep,
            w.weight_scale, n_rows, (n_keys + 1) // 2, d_v=sizes.d_v, block_rows=sizes.block_rows,
            pairs_per_sum=sizes.codes_v.keys_per_sum(TILE_KEYS) // 2,
        )  # fmt: skip


def close_row(k: Kernel, o: Pointer, to: Pointer, width: int, factor: Value | float = 1.0) -> None:
    """to = o * factor, its columns in order."""
    move_row(k, o, to, width, code_tile.in_order, factor)


def reopen_row(k: Kernel, source: Pointer, o: Pointer, width: int) -> None:
    """o = source, its columns in the order of interleaved values."""
    move_row(k, source, o, width, code_tile.out_of_order, 1.0)


def move_row(
    k: Kernel,
    source: Pointer,
    to: Pointer,
    width: int,
    turn: Callable[[Kernel, Value, Value], tuple[Value, Value]],
    factor: Value | float,
) -> None:
    lanes = k.target.lanes
    with k.loop(0, width, 2 * lanes) as i:
        both = [source.at(i + j).load(f32 * lanes) * factor for j in (0, lanes)]
        for j, v in enumerate(turn(k, *both)):
            to.at(i + j * lanes).store(v)
