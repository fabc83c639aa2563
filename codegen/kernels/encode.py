"""Writing stored formats inside kernels: 32 f32 values become a block of a cache row.

The other direction of blocks.py, by the rules of mlacli/gguf/quants.py and equal to it bit for bit:
the inverse of the f32 scale multiplies the values before the scale itself is rounded to f16, 8-bit
codes round half to even, lower ones are trunc(x / d + offset + 1/2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from codegen.dtypes import f16, f32, i8, i32, u8, u32
from codegen.formats import BlockFormat
from codegen.kernels.blocks import BLOCK, block_at
from codegen.kernels.rows import tree
from codegen.values import Pointer, Value
from codegen.vecmath import round_to_int

if TYPE_CHECKING:
    from codegen.builder import Kernel

Load = Callable[[Any], list[Value]]
MAGNITUDE = 0x7FFFFFFF


def store_row(k: Kernel, fmt: BlockFormat, row: Pointer, n: int, load: Load) -> None:
    """Write n values to a row; `load(block)` gives 32 of them as f32 vectors in order.

    Formats that scale whole rows ask for every block twice.
    """
    if not fmt.header:
        with k.loop(0, n // BLOCK) as block:
            store_block(k, fmt, row, block, load(block))
        return
    top, total = k.var(k.const(0, i32)), k.var(k.const(0, i32))
    with k.loop(0, n // BLOCK) as block:
        top.set(k.maximum(top.get(), largest_bits(k, load(block))))
    d = top.get().bits_as(f32) / 127.0
    inverse = inverse_of(k, d)
    with k.loop(0, n // BLOCK) as block:
        total += store_codes(k, fmt, block_at(fmt, row, block), load(block), inverse)
    row.bytes(fmt.field_offset("d"), f32).store(d)
    row.bytes(fmt.field_offset("sum"), i32).store(total.get())


def store_block(k: Kernel, fmt: BlockFormat, row: Pointer, block: Any, values: list[Value]) -> None:
    """Write 32 values, f32 vectors in order, as block `block` of a row without a row header."""
    at = block_at(fmt, row, block)
    if not fmt.is_quantised:
        source, lanes = fmt.fields[0].type, values[0].type.lanes
        for i, v in enumerate(values):
            at.cast(source).at(i * lanes).store(v.to(source))
        return
    if fmt.table or fmt.offset:
        d = nibble_scale(k, fmt, values)
        store_nibbles(k, fmt, at, values, inverse_of(k, d))
    else:
        d = largest_bits(k, values).bits_as(f32) / 127.0
        store_codes(k, fmt, at, values, inverse_of(k, d))
    at.bytes(fmt.field_offset("d"), f16).store(d.to(f16))


def largest_bits(k: Kernel, values: list[Value]) -> Value:
    """max|x| as the bits of an f32 in an i32, where a NaN is larger than any number: the scale is
    then not a number either, and the fault stays visible instead of vanishing in a code."""
    return tree(k, [v.bits_as(i32 * v.type.lanes) & MAGNITUDE for v in values], "max")


def inverse_of(k: Kernel, d: Value) -> Value:
    """1 / d, or 0 where that is no finite number: such a block is all zeros (or d is NaN)."""
    inverse = 1.0 / d
    return k.select(k.absolute(inverse) < float("inf"), inverse, k.const(0, f32))


def eight_bit(k: Kernel, values: list[Value], inverse: Value) -> list[Value]:
    """round(x / d) as i32 vectors, -127 .. 127."""
    return [round_to_int(k, k.product(v, inverse)) for v in values]


def store_codes(
    k: Kernel, fmt: BlockFormat, at: Pointer, values: list[Value], inverse: Value
) -> Value:
    """Write 32 8-bit codes; returns their sum."""
    codes = eight_bit(k, values, inverse)
    qs = at.bytes(fmt.field_offset("qs"), i8)
    for i, code in enumerate(codes):
        qs.at(i * code.type.lanes).store(code.to(i8))
    return tree(k, codes, "add")


def nibble_scale(k: Kernel, fmt: BlockFormat, values: list[Value]) -> Value:
    """d = m / (the lowest code), m being the value of largest magnitude, the first of equals.

    Each lane that reaches the largest magnitude bids 2 * (31 - its place), plus 1 when negative;
    the highest bid is the first one's and tells the sign of m.
    """
    lanes, top = values[0].type.lanes, largest_bits(k, values)
    bids = []
    for i, v in enumerate(values):
        bits = v.bits_as(i32 * lanes)
        place = k.vector([2 * (BLOCK - 1 - i * lanes - j) for j in range(lanes)], i32)
        bid = place + (bits.bits_as(u32 * lanes) >> 31).to(i32)
        bids.append(k.select((bits & MAGNITUDE).eq(top), bid, k.const(-1, i32 * lanes)))
    sign = (tree(k, bids, "max") & 1) << 31
    return (top | sign).bits_as(f32) / float(fmt.table[0] if fmt.table else fmt.offset)


def store_nibbles(
    k: Kernel, fmt: BlockFormat, at: Pointer, values: list[Value], inverse: Value
) -> None:
    """Write the low four bits of 32 codes into qs, the bits above them into qh."""
    find = table_codes if fmt.table else offset_codes
    codes = [find(k, fmt, k.product(v, inverse)) for v in values]
    qs, lanes = at.bytes(fmt.field_offset("qs"), u8), codes[0].type.lanes
    half = len(codes) // 2
    for i, (low, high) in enumerate(zip(codes[:half], codes[half:], strict=True)):
        qs.at(i * lanes).store(((low & 15) | ((high & 15) << 4)).to(u8))
    if fmt.high_bits == 1:
        store_one_bit(k, at.bytes(fmt.field_offset("qh"), u8), codes)
    elif fmt.high_bits == 2:
        store_two_bits(k, at.bytes(fmt.field_offset("qh"), u8), codes)


def offset_codes(k: Kernel, fmt: BlockFormat, x: Value) -> Value:
    """trunc(x - offset + 1/2), at most the highest code; NaN, too, becomes a code in range."""
    highest = float(-2 * fmt.offset - 1)
    return k.maximum(k.minimum(x + (0.5 - fmt.offset), highest), 0.0).to(i32)


def table_codes(k: Kernel, fmt: BlockFormat, x: Value) -> Value:
    """Index of the nearest table value, of two as near the lower: the middles that x is above."""
    index = k.zeros(i32 * x.type.lanes)
    for low, high in zip(fmt.table[:-1], fmt.table[1:], strict=True):
        index = k.select(x > (low + high) / 2, index + 1, index)
    return index


def store_one_bit(k: Kernel, qh: Pointer, codes: list[Value]) -> None:
    """Bit j of a 32-bit word is bit 4 of code j."""
    lanes = codes[0].type.lanes
    parts = []
    for i, code in enumerate(codes):
        place = k.vector([i * lanes + j for j in range(lanes)], u32)
        parts.append(((code >> 4) & 1).to(u32) << place)
    qh.store(tree(k, parts, "add").bits_as(u8 * 4))


def store_two_bits(k: Kernel, qh: Pointer, codes: list[Value]) -> None:
    """Byte j holds bits 4 and 5 of codes j, j + 16, j + 8 and j + 24, from the lowest."""
    lanes = codes[0].type.lanes
    width = min(lanes, 8)

    def part(first: int) -> Value:
        code = codes[first // lanes]
        return code.lanes(first % lanes, first % lanes + width) >> 4

    for j in range(0, 8, width):
        byte = part(j) | (part(j + 16) << 2) | (part(j + 8) << 4) | (part(j + 24) << 6)
        qh.at(j).store(byte.to(u8))
