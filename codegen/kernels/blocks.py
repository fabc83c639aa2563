"""Reading stored formats inside kernels: 32 consecutive values of a row, decoded.

The layouts come from codegen/formats.py as data; here is only how a register gets at them. Rows are
`Pointer`s to bytes (u8); block b of a row holds its values 32 b .. 32 b + 31 in every format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from codegen.dtypes import f16, f32, i8, i64, u8, u32
from codegen.formats import RUN, BlockFormat, Groups
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

BLOCK = 32


def block_at(fmt: BlockFormat, row: Pointer, block: Any) -> Pointer:
    """Address of 32 values, or of the super-block around them: behind the row's header."""
    if fmt.size > BLOCK:
        return row.bytes(block // (fmt.size // BLOCK) * fmt.block_bytes)
    step = fmt.block_bytes * (BLOCK // fmt.size)
    return row.bytes(fmt.header_bytes).bytes(block * step)


def load_block(k: Kernel, fmt: BlockFormat, row: Pointer, block: Any) -> list[Value]:
    """The 32 values of a block as f32 vectors of the target's lanes, in order."""
    at, n = block_at(fmt, row, block), k.target.lanes
    if not fmt.is_quantised:
        source = fmt.fields[0].type
        return [at.cast(source).at(i).load(source * n).to(f32) for i in range(0, BLOCK, n)]
    if fmt.groups:
        return load_run(k, fmt, fmt.groups, at, k.const(block, i64) % (fmt.size // BLOCK))
    scale = k.const(row_scale(k, fmt, row, at), f32 * n)
    parts = signed_codes(k, fmt, at, n)
    return [part.to(f32) * scale for part in parts]


def row_scale(k: Kernel, fmt: BlockFormat, row: Pointer, block: Pointer) -> Value:
    """d of the block, or of its row for formats that scale whole rows."""
    if fmt.header:
        return row.bytes(fmt.field_offset("d"), f32).load()
    return block.bytes(fmt.field_offset("d"), f16).load().to(f32)


def load_run(k: Kernel, fmt: BlockFormat, groups: Groups, at: Pointer, run: Value) -> list[Value]:
    """Run `run` of the super-block at `at`: 32 values as f32 vectors of the target's lanes.

    Exact: d, a scale and a code together fit 24 bits, only the minimum's subtraction rounds.
    """
    start, shift = groups.low_place(run)
    qs = at.bytes(fmt.field_offset("qs"), u8).at(start)
    codes = (qs.load(u8 * RUN) >> shift.to(u8)) & 15
    if fmt.high_bits:
        start, shift = groups.high_place(run, fmt.high_bits)
        high = at.bytes(fmt.field_offset("qh"), u8).at(start).load(u8 * RUN) >> shift.to(u8)
        codes = codes | ((high & ((1 << fmt.high_bits) - 1)) << 4)
    if fmt.offset:
        codes = (codes + (fmt.offset & 255)).bits_as(i8 * RUN)
    scales, minimum = group_scales(k, fmt, groups, at, run)
    values, n = [], k.target.lanes
    for i in range(0, RUN, n):
        value = codes.lanes(i, i + n).to(f32) * scales[i // groups.size]
        values.append(value if minimum is None else value - minimum)
    return values


def group_scales(
    k: Kernel, fmt: BlockFormat, groups: Groups, at: Pointer, run: Value
) -> tuple[list[Value], Value | None]:
    """d * scale for each group of a run; with a `dmin`, there is one group and its minimum.

    All of the super-block are unpacked at once, and one picked through the stack: where the runs
    are known when building, LLVM keeps them in registers and unpacks only once.
    """
    table, per_run = k.stack(f32, 16), RUN // groups.size
    packed, d = at.bytes(fmt.field_offset("scales"), u8), row_scale(k, fmt, at, at)
    if not fmt.has("dmin"):
        table.store(packed.cast(i8).load(i8 * 16).to(f32) * d)
        return [table[run * per_run + i] for i in range(per_run)], None
    dmin = at.bytes(fmt.field_offset("dmin"), f16).load().to(f32)
    table.store(six_bits(k, packed).to(f32) * k.concat(k.splat(d, 8), k.splat(dmin, 8)))
    return [table[run]], table[run + 8]


def six_bits(k: Kernel, packed: Pointer) -> Value:
    """8 scales and 8 minima out of 12 bytes, as a u8 vector; four bytes at a time."""
    first, second, third = (packed.cast(u32)[i] for i in range(3))
    words = (
        first & 0x3F3F3F3F,
        (third & 0x0F0F0F0F) | ((first >> 2) & 0x30303030),
        second & 0x3F3F3F3F,
        ((third >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030),
    )
    joined = k.undefined(u32 * 4)
    for i, word in enumerate(words):
        joined = k.insert(joined, word, i)
    return joined.bits_as(u8 * 16)


def signed_codes(k: Kernel, fmt: BlockFormat, block: Pointer, n: int) -> list[Value]:
    """The 32 codes as i8 vectors of n lanes, in order."""
    at = block.bytes(fmt.field_offset("qs"), u8)
    if not fmt.table and not fmt.offset:
        return [at.cast(i8).at(i).load(i8 * n) for i in range(0, BLOCK, n)]
    low, high = nibbles(k, at, n)
    codes = low + high
    if fmt.high_bits:
        bits = high_bits(k, fmt, block, n)
        codes = [c | b for c, b in zip(codes, bits, strict=True)]
    if fmt.table:
        return [lookup(k, fmt.table, c).bits_as(i8 * n) for c in codes]
    return [(c + (fmt.offset & 255)).bits_as(i8 * n) for c in codes]


def nibbles(k: Kernel, qs: Pointer, n: int) -> tuple[list[Value], list[Value]]:
    """Low and high halves of 16 bytes, as u8 vectors of n lanes."""
    packed = [qs.at(i).load(u8 * min(n, 16)) for i in range(0, 16, n)]
    return [p & 15 for p in packed], [p >> 4 for p in packed]


def lookup(k: Kernel, table: tuple[int, ...], index: Value) -> Value:
    """table[index] per byte; short vectors are widened to what the hook takes."""
    n = index.type.lanes
    if n >= 16:
        return k.target.lookup16(k, table, index)
    wide = k.shuffle(index, index, [i % n for i in range(16)])
    return k.target.lookup16(k, table, wide).lanes(0, n)


def high_bits(k: Kernel, fmt: BlockFormat, block: Pointer, n: int) -> list[Value]:
    """The bits above the nibble, already shifted into place, as u8 vectors in value order.

    One bit (q5_0): bit j of the 32-bit word qh belongs to value j. Two bits (q6_0): byte j % 8 of
    qh, shifted right by 4 for j >= 8, has two bits for value j and the next two for j + 16.
    """
    at = block.bytes(fmt.field_offset("qh"), u8)
    if fmt.high_bits == 1:
        word = [at[j // 8] for j in range(0, BLOCK, 8)]
        parts = []
        for start in range(0, BLOCK, n):
            lanes = [k.splat(word[(start + j) // 8], min(n, 8)) for j in range(0, n, 8)]
            spread = lanes[0] if len(lanes) == 1 else k.concat(lanes[0], lanes[1])
            shift = k.vector([(start + j) % 8 for j in range(n)], u8)
            parts.append(((spread >> shift) & 1) << 4)
        return parts
    eight = at.load(u8 * 8)
    parts = []
    for start in range(0, BLOCK, n):
        spread = k.shuffle(eight, eight, [(start + j) % 8 for j in range(n)])
        upper = 2 if start >= 16 else 0
        shift = k.vector([(4 if (start + j) % 16 >= 8 else 0) + upper for j in range(n)], u8)
        parts.append(((spread >> shift) & 3) << 4)
    return parts
