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
from codegen.kernels import code_tile
from codegen.kernels.attention_block import (
    ABSORBED,
    LINE_WORDS,
    Ahead,
    Block,
    Caches,
    Sizes,
    copy_row,
    move_row,
    thread_arrays,
    touch,
)
from codegen.kernels.attention_weights import CodeState, Limits, softmax_tile
from codegen.kernels.blocks import BLOCK
from codegen.kernels.code_tile import LARGEST_CODE, Codes, micro
from codegen.kernels.codes import RowCodes, row_codes
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

TILE_KEYS = 64
KEY_GROUP = 16  # keys that are multiplied while they are in the L1 cache
# Between the parts of a tile's values there is room, or they would meet in a few sets of the L1.
PART_PAIRS = TILE_KEYS // 2 + 8


@dataclass(frozen=True)
class CodeSizes(Sizes):
    """With the codes of keys and values."""

    codes_k: Codes
    codes_v: Codes

    @property
    def tile_keys(self) -> int:
        return TILE_KEYS

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

    def space(self, k: Kernel, scratch: Pointer) -> CodeSpace:
        """This thread's part of the scratch memory, as named arrays."""
        arrays = thread_arrays(k, self, scratch)
        codes = {name: arrays[name].cast(i32) for name in ("packed", "values", "weights")}
        return CodeSpace(**arrays | codes | {"keys": arrays["keys"].cast(i16)})

    def pack(
        self, k: Kernel, w: CodeSpace, block: Block, q_row: Callable[[Value], Pointer]
    ) -> None:
        """Codes of the block's rows of q; `q_row(row)` is the address of one."""
        code_tile.pack_queries(
            k,
            w.packed,
            w.q_scale,
            lambda i: q_row(block.row(i)),
            block.n_rows,
            codes=self.codes_k,
            width=self.d_k,
            block_rows=self.block_rows,
        )

    def attend(
        self,
        k: Kernel,
        w: CodeSpace,
        block: Block,
        caches: Caches,
        n_keys: Value,
        next_cell: Value,
        scale: float,
    ) -> None:
        """Fold the listed cells into m, l and o of an open block."""
        self.fold(k, w, block.n_rows, n_keys, cached_codes(k, self, w, n_keys, caches), scale)

    def fold(
        self, k: Kernel, w: CodeSpace, n_rows: Value, n_keys: Value, rows: TileCodes, scale: float
    ) -> None:
        """The same, with codes from wherever they come."""
        score_tile(k, self, w, n_rows, n_keys, rows)
        weigh_tile(k, self, w, n_rows, n_keys, scale)
        value_tile(k, self, w, n_rows, n_keys, rows)

    def close_row(self, k: Kernel, o: Pointer, to: Pointer, factor: Value | float) -> None:
        """to = o * factor, its columns in order."""
        if self.codes_v.apart:
            copy_row(k, o, to, self.d_v, factor)
        else:
            move_row(k, o, to, self.d_v, code_tile.in_order, 2, factor)

    def reopen_row(self, k: Kernel, source: Pointer, o: Pointer) -> None:
        """o = source, its columns in the order of `code_tile.key_pairs`."""
        if self.codes_v.apart:
            copy_row(k, source, o, self.d_v)
        else:
            move_row(k, source, o, self.d_v, code_tile.out_of_order, 2)


@dataclass(frozen=True)
class CodeSpace(CodeState):
    """With the codes: packed q (code_tile.pack_queries) and its scales [slab][row] | keys of a
    group [key][column] | values and weights of a tile (code_tile.add_values)."""

    packed: Pointer
    q_scale: Pointer
    keys: Pointer
    values: Pointer
    weights: Pointer


@dataclass(frozen=True)
class TileCodes:
    """Where the codes of a tile's cells come from.

    `keys(first)` gives the address of the codes of KEY_GROUP keys from number `first` on, `pitch`
    codes apart, after it has made them and those of their values, and the scales. `values` are the
    tile's in pairs, as `add_values` takes them: the columns of a register tile, then the next, with
    room for `part_pairs` pairs of each. `ahead` asks for the next tile.
    """

    keys: Callable[[Value], Pointer]
    pitch: int
    values: Pointer
    part_pairs: int
    ahead: Ahead | None = None

    def ask(self, half: int, i: Value, n_steps: int) -> None:
        """As `Ahead.step`, if there is something to ask for."""
        if self.ahead:
            self.ahead.step(half, i, n_steps)


def cached_codes(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, n_keys: Value, caches: Caches
) -> TileCodes:
    """The listed cells, two at a time; the next two come to the L1 cache meanwhile."""
    d_k, d_v, row_bytes = sizes.d_k, sizes.d_v, caches.fmt_k.row_bytes(sizes.d_k)

    def keys(first: Value) -> Pointer:
        with k.loop(first, k.minimum(first + KEY_GROUP, n_keys), 2) as i:
            cells = [w.key_cell[j].to(i64) for j in (i, k.minimum(i + 1, n_keys - 1))]
            pair = [row_codes(k, caches.fmt_k, caches.key(cell), d_k) for cell in cells]
            touch(k, caches.key(cells[0] + 2), k.const(0, i64), 2 * d_k, row_bytes, d_k)
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

    start = caches.key(w.key_cell[0].to(i64) + TILE_KEYS)
    ahead = Ahead(start, TILE_KEYS * row_bytes)
    return TileCodes(keys, d_k, w.values, PART_PAIRS, ahead)


def store_scales(to: Pointer, rows: list[RowCodes]) -> None:
    for i, row in enumerate(rows):
        to[i] = row.scale


def store_keys(
    k: Kernel, sizes: CodeSizes, rows: list[RowCodes], first: int, last: int, keys: Pointer
) -> None:
    """Columns first..last of rows' codes, one row behind the other."""
    with k.loop(first // BLOCK, last // BLOCK) as block:
        for i, row in enumerate(rows):
            store_columns(keys.at(i * sizes.d_k + block * BLOCK), row.block(block))


def store_columns(to: Pointer, codes: list[Value]) -> None:
    """Codes of neighbouring columns of a row, as pairs."""
    for i, v in enumerate(code_tile.column_pairs(codes)):
        to.cast(i32).at(i * v.type.lanes).store(v)


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
            both = [row.block((column + step) // BLOCK) for row in rows]
            if keys is not None:
                for i, codes in enumerate(both):
                    store_columns(keys.at(column + (i * sizes.d_k + step)), codes)
            for i, v in enumerate(code_tile.key_pairs(k, *both)):
                at = step + i * lanes
                to = w.values.at((column + at // width * width) * PART_PAIRS + at % width)
                to.at(number * (width // 2)).store(v)


def part_width(k: Kernel, sizes: CodeSizes) -> int:
    """Columns of values that a register tile of `add_values` takes."""
    return micro(k, sizes.block_rows, d_v=sizes.d_v).columns * k.target.lanes


def score_tile(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, n_rows: Value, n_keys: Value, rows: TileCodes
) -> None:
    """scores[cell][row] = k[cell] . q[row] / scale_k[cell] for the listed cells."""
    size, slabs, codes = sizes.block_rows, sizes.slabs, sizes.codes_k
    width, n_pairs = slabs[0][1], sizes.d_k // 2
    group = micro(k, size, codes.terms).keys
    with k.loop(0, n_keys, KEY_GROUP) as first:
        keys, scores = rows.keys(first), w.scores.at(first * size)
        n_group = k.minimum(n_keys - first, KEY_GROUP)

        def add_slab(
            slab: Value | int, is_first: bool, keys: Pointer = keys, first: Value = first
        ) -> None:
            def ask(key: Value, pair: Value) -> None:
                step = (first + key) // group * n_pairs + slab * (width // 2) + pair
                rows.ask(0, step, TILE_KEYS // group * n_pairs)

            code_tile.multiply_keys(
                k, scores, w.packed.at(slab * (size * codes.terms * width // 2)),
                w.q_scale.at(slab * size), keys.at(slab * width), n_rows, n_group, codes=codes,
                width=width, pitch=rows.pitch, block_rows=size, first=is_first, ask=ask,
            )  # fmt: skip

        add_slab(0, True)
        if len(slabs) > 1:
            with k.loop(1, len(slabs)) as slab:
                add_slab(slab, False)


def weigh_tile(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, n_rows: Value, n_keys: Value, scale: float
) -> None:
    """Scores of a tile to codes of weights, two keys' side by side."""
    lanes, size, codes = k.target.lanes, sizes.block_rows, sizes.codes_v

    def store(row: Value, inverse: Value) -> None:
        scores = w.scores.at(row)
        scores.at(n_keys * size).store(k.zeros(f32 * lanes))  # the odd one's partner
        with k.loop(0, n_keys, 2) as key:
            low, high = (scores.at((key + i) * size).load(f32 * lanes) for i in range(2))
            pairs = code_tile.round_pairs(k, low, high, inverse)
            w.weights.at(key // 2 * size + row).store(pairs)

    limits = Limits(LARGEST_CODE, codes.keys_per_sum(TILE_KEYS), codes.budget)
    softmax_tile(k, w, size, n_rows, n_keys, scale=scale, limits=limits, store=store)


def value_tile(
    k: Kernel, sizes: CodeSizes, w: CodeSpace, n_rows: Value, n_keys: Value, rows: TileCodes
) -> None:
    """o = o * keep + weights^T v for the listed cells."""
    width, rows_per_step = part_width(k, sizes), micro(k, sizes.block_rows).rows
    steps = sizes.block_rows // rows_per_step
    with k.loop(0, sizes.d_v, width) as column:

        def ask(row: Value, column: Value = column) -> None:
            step = column // width * steps + row // rows_per_step
            rows.ask(1, step, sizes.d_v // width * steps)

        code_tile.add_values(
            k, w.o.at(column), w.weights, rows.values.at(column * rows.part_pairs), w.keep,
            w.weight_scale, n_rows, (n_keys + 1) // 2, d_v=sizes.d_v, block_rows=sizes.block_rows,
            pairs_per_sum=sizes.codes_v.keys_per_sum(TILE_KEYS) // 2, ask=ask,
        )  # fmt: skip
