"""Attention of a block of q rows over 8-bit rows with one scale, read as they lie in the cache.

As attention_codes.py, but only q and the weights are made codes, and no key is copied: q meets the
rows themselves, and the values of a tile are interleaved by fours (byte_tile.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i8, i32, i64, u8
from codegen.formats import Q8_KV
from codegen.kernels import byte_tile
from codegen.kernels.attention_block import (
    LINE_WORDS,
    Ahead,
    Block,
    Caches,
    Sizes,
    move_row,
    thread_arrays,
)
from codegen.kernels.attention_weights import CodeState, Limits, softmax_tile
from codegen.targets.base import Target
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

TILE_KEYS = 128
# Between the parts of a tile's values there is room, or they would meet in a few sets of the L1.
PART_QUADS = TILE_KEYS // 4 + 1
LIMITS = Limits(byte_tile.LARGEST_WEIGHT, TILE_KEYS, 2**31)  # no sum of a tile is near overflow


@dataclass(frozen=True)
class ByteSpace(CodeState):
    """With packed q (byte_tile.pack_queries) and its scales | values and weights of a tile
    (byte_tile.add_values)."""

    packed: Pointer
    q_scale: Pointer
    values: Pointer
    weights: Pointer


@dataclass(frozen=True)
class ByteSizes(Sizes):
    """Attention by bytes."""

    @property
    def tile_keys(self) -> int:
        return TILE_KEYS

    @property
    def regions(self) -> dict[str, int]:
        rows = self.block_rows
        return {
            "packed": rows * self.d_k // 2,
            "values": PART_QUADS * self.d_v,
            "weights": TILE_KEYS // 2 * rows,
            **dict.fromkeys(("key_scale", "value_scale"), TILE_KEYS),
            **dict.fromkeys(("weight_scale", "q_scale"), max(rows, LINE_WORDS)),
            **self.state_regions(TILE_KEYS + 3),
        }

    def space(self, k: Kernel, scratch: Pointer) -> ByteSpace:
        """This thread's part of the scratch memory, as named arrays."""
        arrays = thread_arrays(k, self, scratch)
        codes = {name: arrays[name].cast(i32) for name in ("packed", "values", "weights")}
        return ByteSpace(**arrays | codes)

    def pack(
        self, k: Kernel, w: ByteSpace, block: Block, q_row: Callable[[Value], Pointer]
    ) -> None:
        """Bytes of the block's rows of q; `q_row(row)` is the address of one."""
        byte_tile.pack_queries(
            k,
            w.packed,
            w.q_scale,
            lambda i: q_row(block.row(i)),
            block.n_rows,
            width=self.d_k,
            block_rows=self.block_rows,
        )

    def attend(
        self,
        k: Kernel,
        w: ByteSpace,
        block: Block,
        caches: Caches,
        n_keys: Value,
        next_cell: Value,
        scale: float,
    ) -> None:
        """Fold the listed cells into m, l and o of an open block."""
        start = caches.key(w.key_cell[0].to(i64) + TILE_KEYS)
        ahead = Ahead(start, TILE_KEYS * caches.fmt_k.row_bytes(self.d_k))
        score_tile(k, self, w, block.n_rows, n_keys, caches, ahead)
        weigh_tile(k, self, w, block.n_rows, n_keys, scale)
        value_tile(k, self, w, block.n_rows, n_keys, caches, ahead)

    def close_row(self, k: Kernel, o: Pointer, to: Pointer, factor: Value | float) -> None:
        """to = o * factor, its columns in order."""
        move_row(k, o, to, self.d_v, byte_tile.in_order, 4, factor)


def suits_bytes(target: Target, sizes: Sizes, caches: tuple[object, object]) -> bool:
    """Whether dot products of unsigned with signed bytes are at hand, and rows of whole vectors."""
    whole = all(width % (4 * target.lanes) == 0 for width in (sizes.d_k, sizes.d_v))
    return target.unsigned_weights and whole and caches == (Q8_KV, Q8_KV)


def score_tile(
    k: Kernel, sizes: ByteSizes, w: ByteSpace, n_rows: Value, n_keys: Value, caches: Caches,
    ahead: Ahead,
) -> None:  # fmt: skip
    """scores[cell][row] = k[cell] . q[row] / scale_k[cell] for the listed cells."""
    d, total, codes = (caches.fmt_k.field_offset(name) for name in ("d", "sum", "qs"))

    def key(number: Value) -> tuple[Pointer, Value]:
        number = k.minimum(number, n_keys - 1)
        cell = w.key_cell[number].to(i64)
        row = caches.key(cell)
        w.key_scale[number] = row.bytes(d, f32).load()
        w.value_scale[number] = caches.value(cell).bytes(d, f32).load()
        return row.bytes(caches.fmt_k.header_bytes + codes, u8), row.bytes(total, i32).load()

    group, n_quads = byte_tile.micro(k, sizes.block_rows).keys, sizes.d_k // 4

    def ask(number: Value, quad: Value) -> None:
        ahead.step(0, number // group * n_quads + quad, TILE_KEYS // group * n_quads)

    byte_tile.multiply_keys(
        k, w.scores, w.packed, w.q_scale, key, n_rows, n_keys,
        width=sizes.d_k, block_rows=sizes.block_rows, ask=ask,
    )  # fmt: skip


def weigh_tile(
    k: Kernel, sizes: ByteSizes, w: ByteSpace, n_rows: Value, n_keys: Value, scale: float
) -> None:
    """Scores of a tile to bytes of weights, four keys' side by side."""
    lanes, size = k.target.lanes, sizes.block_rows

    def store(row: Value, inverse: Value) -> None:
        scores = w.scores.at(row)
        for i in range(3):  # there may be no keys that make the last four whole
            scores.at((n_keys + i) * size).store(k.zeros(f32 * lanes))
        with k.loop(0, n_keys, 4) as key:
            four = [scores.at((key + i) * size).load(f32 * lanes) for i in range(4)]
            to = w.weights.at(key // 2 * size + row)
            for i, v in enumerate(byte_tile.weight_quads(k, four, inverse)):
                to.at(i * size).store(v)

    softmax_tile(k, w, size, n_rows, n_keys, scale=scale, limits=LIMITS, store=store)


def value_tile(
    k: Kernel, sizes: ByteSizes, w: ByteSpace, n_rows: Value, n_keys: Value, caches: Caches,
    ahead: Ahead,
) -> None:  # fmt: skip
    """o = o * keep + weights^T v for the listed cells."""
    width, rows_per_step = 4 * k.target.lanes, byte_tile.micro(k, sizes.block_rows).rows
    steps = sizes.block_rows // rows_per_step
    interleave_values(k, sizes, w, n_keys, caches)
    with k.loop(0, sizes.d_v, width) as column:

        def ask(row: Value, column: Value = column) -> None:
            step = column // width * steps + row // rows_per_step
            ahead.step(1, step, sizes.d_v // width * steps)

        byte_tile.add_values(
            k, w.o.at(column), w.weights, w.values.at(column * PART_QUADS), w.keep,
            w.weight_scale, n_rows, (n_keys + 3) // 4,
            d_v=sizes.d_v, block_rows=sizes.block_rows, ask=ask,
        )  # fmt: skip


def interleave_values(
    k: Kernel, sizes: ByteSizes, w: ByteSpace, n_keys: Value, caches: Caches
) -> None:
    """Values of the listed cells to w.values: of a register tile's columns all quads, then the
    next columns."""
    step = 4 * k.target.lanes
    start = caches.fmt_v.header_bytes + caches.fmt_v.field_offset("qs")
    with k.loop(0, n_keys, 4) as key:
        numbers = [k.minimum(key + i, n_keys - 1) for i in range(4)]
        rows = [caches.value(w.key_cell[n].to(i64)).bytes(start, i8) for n in numbers]
        with k.loop(0, sizes.d_v, step) as column:
            to = w.values.at(column * PART_QUADS + key * k.target.lanes)
            four = [row.at(column).load(i8 * step) for row in rows]
            for i, v in enumerate(byte_tile.interleave(k, four)):
                to.at(i * k.target.lanes).store(v)
