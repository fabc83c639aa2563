"""Codes of expanded keys and values: one chunk of cache rows, made once for all tokens.

    k[j, h] = [w_uk[h] c_kv[j] | k_pe[j]],   v[j, h] = v_b[h] c_kv[j]

The products come as f32 in a thread's own memory, some cache rows of one head at a time, and leave
it as 16-bit codes with a scale per row (code_tile.py), keys by rows and values in pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i16, i32, i64
from codegen.formats import BlockFormat
from codegen.kernels.attention_codes import (
    TILE_KEYS,
    CodeSizes,
    TileCodes,
    part_width,
    store_columns,
)
from codegen.kernels.blocks import BLOCK, load_block
from codegen.kernels.code_tile import key_pairs
from codegen.kernels.encode import MAGNITUDE, inverse_of
from codegen.kernels.expand import Part, expand_panel, latent_pitch
from codegen.kernels.panel_decode import panel_rows
from codegen.kernels.rows import vectors
from codegen.values import Pointer, Value
from codegen.vecmath import round_to_int

if TYPE_CHECKING:
    from codegen.builder import Kernel

STAGE_ROWS = 512  # whose keys or values of one head lie in f32: they stay in the L2 cache


@dataclass(frozen=True)
class CodeChunk:
    """Room for the codes of `n_rows` cache rows, a multiple of a tile, in one piece of memory."""

    way: CodeSizes
    n_rows: int

    @property
    def regions(self) -> dict[str, int]:
        """Bytes: keys [head][row][d_k] and values [head][tile][part][pair][column], i16, then the
        scales [head][row] of both."""
        rows = self.way.n_head * self.n_rows
        return {
            "keys": 2 * rows * self.way.d_k,
            "values": 2 * rows * self.way.d_v,
            **dict.fromkeys(("key_scale", "value_scale"), 4 * rows),
        }

    @property
    def nbytes(self) -> int:
        return sum(self.regions.values())

    def arrays(self, memory: Pointer) -> dict[str, Pointer]:
        """The regions, each of its type."""
        types = {"keys": i16, "values": i32, "key_scale": f32, "value_scale": f32}
        found, at = {}, 0
        for name, nbytes in self.regions.items():
            found[name] = memory.bytes(at, types[name])
            at += nbytes
        return found

    def tile(self, memory: Pointer, head: Value, row: Value) -> tuple[TileCodes, Pointer, Pointer]:
        """The codes of the tile that starts with `row` of a head, the scales of keys and values."""
        at, place = self.arrays(memory), head * self.n_rows + row
        keys = at["keys"].at(place * self.way.d_k)
        values = at["values"].at(place * (self.way.d_v // 2))
        codes = TileCodes(
            lambda first: keys.at(first * self.way.d_k), self.way.d_k, values, TILE_KEYS // 2
        )
        return codes, at["key_scale"].at(place), at["value_scale"].at(place)


def stage_bytes(part_rows: int) -> int:
    """Bytes of a thread's own memory for products of up to `part_rows` values."""
    return 4 * STAGE_ROWS * part_rows


def expand_codes(
    k: Kernel,
    chunk: CodeChunk,
    memory: Pointer,
    weights: tuple[Pointer, Pointer],
    rows: Pointer,
    cache: Pointer,
    n_rows: Value,
    panel: Pointer,
    stage: Pointer,
    counter: Pointer,
    *,
    parts: tuple[Part, Part],
    fmt: BlockFormat,
) -> None:
    """Fills a chunk: `rows` are the latent parts of its n_rows cache rows, `cache` those rows."""
    n_stages = (n_rows + (STAGE_ROWS - 1)) // STAGE_ROWS
    at, d_k = chunk.arrays(memory), chunk.way.d_k
    n_lora, n_nope = parts[0].n_lora, parts[0].n_rows
    row_bytes = fmt.row_bytes(n_lora + d_k - n_nope)
    with k.tiles(n_stages * chunk.way.n_head, counter) as item:
        head, first = item // n_stages, item % n_stages * STAGE_ROWS
        count = k.minimum(n_rows - first, STAGE_ROWS)
        place = head * chunk.n_rows + first

        def expand(w: Pointer, part: Part, head: Value = head, first: Value = first,
                   count: Value = count) -> None:  # fmt: skip
            latent = rows.bytes(first * latent_pitch(part.fmt, part.n_lora))
            with k.loop(0, part.n_rows, panel_rows(k.target)) as row:
                expand_panel(
                    k, stage, w, latent, count, panel, head, row, part=part, out_row=part.n_rows
                )

        expand(weights[0], parts[0])
        with k.loop(0, count) as i:
            rope = cache.bytes((first + i) * row_bytes)
            key = vectors(k, stage.at(i * n_nope), n_nope)
            for block in range(n_lora // BLOCK, (n_lora + d_k - n_nope) // BLOCK):
                key += load_block(k, fmt, rope, k.const(block, i64))
            scale, codes = coded(k, key, chunk.way.codes_k.largest)
            at["key_scale"][place + i] = scale
            store_columns(at["keys"].at((place + i) * d_k), codes)
        expand(weights[1], parts[1])
        with k.loop(0, count, 2) as i:
            store_values(k, chunk, at, stage, place, i, count)


def coded(k: Kernel, values: list[Value], largest: int) -> tuple[Value, list[Value]]:
    """(scale, codes) of a row, i32 vectors in order."""
    bits = [v.bits_as(i32 * v.type.lanes) & MAGNITUDE for v in values]
    top = bits[0]
    for other in bits[1:]:
        top = k.maximum(other, top)
    scale = top.max().bits_as(f32) * (1 / largest)
    inverse = inverse_of(k, scale)
    return scale, [round_to_int(k, v * inverse) for v in values]


def store_values(
    k: Kernel,
    chunk: CodeChunk,
    at: dict[str, Pointer],
    stage: Pointer,
    place: Value,
    i: Value,
    count: Value,
) -> None:
    """Codes of the values i and i + 1 of a stage that starts at `place`; past the last one there is
    anything, and it will weigh nothing."""
    way, lanes = chunk.way, k.target.lanes
    width = part_width(k, way)
    pair = []
    for j in range(2):
        value = vectors(k, stage.at(k.minimum(i + j, count - 1) * way.d_v), way.d_v)
        scale, codes = coded(k, value, way.codes_v.largest)
        at["value_scale"][place + i + j] = scale
        pair.append(codes)
    row = place + i
    tile = at["values"].at(row // TILE_KEYS * (TILE_KEYS // 2 * way.d_v))
    for number, v in enumerate(key_pairs(k, *pair)):
        column = number * lanes
        part = tile.at(column // width * width * (TILE_KEYS // 2) + column % width)
        part.at(row % TILE_KEYS // 2 * width).store(v)
