"""Cached rows as 16-bit codes with one scale per row, for products in integers.

    value[j] = scale * code[j],  |code| <= `largest` of `codes_of`

8-bit codes of a row with one scale are taken as they are; codes with a scale per block are brought
to the largest scale of the row, with twelve bits; floats become fixed-point numbers of 15 bits
under the largest exponent of the row, which is exact for all within a factor of 16 (f16) or 128
(bf16) of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import bf16, f16, f32, i8, i16, i32, u16
from codegen.formats import BlockFormat
from codegen.kernels.blocks import BLOCK, block_at, signed_codes
from codegen.kernels.code_tile import Codes
from codegen.kernels.rows import tree
from codegen.values import Pointer, Value
from codegen.vecmath import round_to_int

if TYPE_CHECKING:
    from codegen.builder import Kernel

ROW_CODES, BLOCK_CODES = Codes(127, spread=16384), Codes(4096, spread=4096)
# f16 is so exact that q needs more bits than fit beside these; of the bits of bf16 half are enough.
F16_CODES = Codes(32767, spread=512, terms=2, apart=True)
BF16_CODES = Codes(32767, spread=1024, apart=True)
EXPANDED_CODES = Codes(4096, spread=4096, apart=True)
HALF = 0x7FFF  # the bits of a 16-bit float but for its sign


@dataclass(frozen=True)
class RowCodes:
    """`block(i)`: codes 32 i .. 32 i + 31 of a row in order, i16 vectors of twice the lanes; i32
    vectors where pairs are `apart`."""

    scale: Value
    block: Callable[[Value], list[Value]]


def codes_of(fmt: BlockFormat) -> Codes:
    """What `row_codes` makes of this format. Raises ValueError for f32, which has no codes."""
    if fmt.header:
        return ROW_CODES
    if fmt.is_quantised:
        return BLOCK_CODES
    if fmt.fields[0].type not in (f16, bf16):
        raise ValueError(f"{fmt.name} rows are not read as codes")
    return F16_CODES if fmt.fields[0].type == f16 else BF16_CODES


def row_codes(k: Kernel, fmt: BlockFormat, row: Pointer, width: int) -> RowCodes:
    """Codes and scale of the row of `width` values at `row`."""
    make = from_bytes if fmt.header else from_blocks if fmt.is_quantised else from_floats
    return make(k, fmt, row, width)


def from_bytes(k: Kernel, fmt: BlockFormat, row: Pointer, width: int) -> RowCodes:
    """Rows with one scale."""
    n = 2 * k.target.lanes

    def block(i: Value) -> list[Value]:
        at = block_at(fmt, row, i).cast(i8)
        return [at.at(j).load(i8 * n).to(i16) for j in range(0, BLOCK, n)]

    return RowCodes(row.bytes(fmt.field_offset("d"), f32).load(), block)


def from_blocks(k: Kernel, fmt: BlockFormat, row: Pointer, width: int) -> RowCodes:
    """Rows with a scale per block: code * (d / the largest d), d being a 15-bit fraction."""
    n, shift = 2 * k.target.lanes, 14 - magnitude_bits(fmt)

    def d(i: Value) -> Pointer:
        return block_at(fmt, row, i).bytes(fmt.field_offset("d"), f16)

    top = k.var(k.const(0, i32))  # magnitudes of floats are in the order of their bits
    with k.loop(0, width // BLOCK) as i:
        top.set(k.maximum((d(i).cast(u16).load() & HALF).to(i32), top.get()))
    largest = top.get().to(u16).bits_as(f16).to(f32)
    inverse = k.select(largest > 0.0, 32767.0 / largest, 0.0)

    def block(i: Value) -> list[Value]:
        codes = signed_codes(k, fmt, block_at(fmt, row, i), min(n, 16))
        if n > codes[0].type.lanes:
            codes = [k.concat(a, b) for a, b in zip(codes[::2], codes[1::2], strict=True)]
        fraction = (d(i).load().to(f32) * inverse).to(i32).to(i16)
        return [half(k, high_product(k, code.to(i16) << shift, fraction)) for code in codes]

    return RowCodes(largest * (2.0 ** (17 - shift) / 32767), block)


def magnitude_bits(fmt: BlockFormat) -> int:
    """The least n for which no code of a block is beyond +-2^n."""
    largest = max(map(abs, fmt.table), default=-fmt.offset or 127)
    return (largest - 1).bit_length()


def high_product(k: Kernel, a: Value, b: Value) -> Value:
    """a * b / 2^16 of i16 vectors, rounded down; `b` is one number."""
    return ((a.to(i32) * k.const(b.to(i32), i32 * a.type.lanes)) >> 16).to(i16)


def half(k: Kernel, a: Value) -> Value:
    """a / 2 to the nearest."""
    return (a + 1) >> 1


def from_floats(k: Kernel, fmt: BlockFormat, row: Pointer, width: int) -> RowCodes:
    """16-bit floats: in units of 2^-14 of the power of two that the largest one's exponent says."""
    stored, lanes = fmt.fields[0].type, k.target.lanes
    mantissa, bias = (10, 15) if stored == f16 else (7, 127)
    n, tops = 2 * lanes, [k.var(k.zeros(u16 * (2 * lanes))) for _ in range(2)]
    with k.loop(0, width, BLOCK) as i:
        for j in range(0, BLOCK, n):
            magnitudes = row.cast(u16).at(i + j).load(u16 * n) & HALF
            most = tops[j // n % 2]
            most.set(k.maximum(magnitudes, most.get()))
    top = tree(k, [k.maximum(tops[0].get(), tops[1].get())], "max") >> mantissa
    unit = k.maximum(top.to(i32) + (127 - bias - 14), 1)  # an exponent of f32, as is its inverse
    inverse = ((254 - unit) << 23).bits_as(f32)

    def block(i: Value) -> list[Value]:
        at = row.cast(stored).at(i * BLOCK)
        values = [at.at(j).load(stored * lanes).to(f32) for j in range(0, BLOCK, lanes)]
        return [round_to_int(k, v * inverse) for v in values]

    is_finite = top < (HALF >> mantissa)
    return RowCodes(k.select(is_finite, (unit << 23).bits_as(f32), float("nan")), block)
