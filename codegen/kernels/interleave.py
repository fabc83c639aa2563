"""Blocks of several weight rows turned so that a register holds the same columns of all of them.

Lane = row: a broadcast activation then meets all rows at once, and no sum runs across lanes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from codegen.dtypes import u8, u16, u32
from codegen.formats import BlockFormat
from codegen.kernels.blocks import BLOCK
from codegen.values import Pointer, Value
from codegen.vecmath import join, transpose4

if TYPE_CHECKING:
    from codegen.builder import Kernel

COLUMNS = 4  # columns of one integer dot product
GROUPS = BLOCK // COLUMNS


def interleave(k: Kernel, rows: list[Pointer], offset: Any) -> list[Value]:
    """16 bytes of every row -> 4 vectors of u32; vector j has dword j of row i in lane i."""
    return turn(k, [row.bytes(offset, u32).load(u32 * 4) for row in rows])


def turn(k: Kernel, fours: list[Value]) -> list[Value]:
    """4 lanes of every row -> 4 vectors; vector j has lane j of row i in lane i."""
    n = k.target.lanes
    return transpose4(k, [join(k, [fours[g + i] for g in range(0, n, 4)]) for i in range(4)])


def code_groups(k: Kernel, fmt: BlockFormat, blocks: list[Pointer]) -> list[Value]:
    """One block of every row -> a vector of codes per 4 columns, as `dot_i8` wants them."""
    at = fmt.field_offset("qs")
    dwords = [interleave(k, blocks, at + 16 * i) for i in range(code_dwords(fmt) // 4)]
    return unpack_codes(k, fmt, [v for four in dwords for v in four])


def copy_scales(k: Kernel, fmt: BlockFormat, blocks: list[Pointer], to: Pointer) -> None:
    """to[i] = the scale of row i's block as it is stored, in two bytes.

    Through memory, to be loaded as a vector some time later: inserting 16 bits into a register
    costs more than the codes do. In pairs: one store each would hold up everything else.
    """
    at = fmt.field_offset("d")
    pairs = zip(blocks[0::2], blocks[1::2], strict=True)
    for i, pair in enumerate(pairs):
        low, high = (block.bytes(at, u16).load().to(u32) for block in pair)
        to.cast(u32)[i] = low | (high << 16)


def code_dwords(fmt: BlockFormat) -> int:
    """Dwords of codes in a block."""
    return (fmt.block_bytes - fmt.field_offset("qs")) // 4


def unpack_codes(k: Kernel, fmt: BlockFormat, dwords: list[Value]) -> list[Value]:
    """The same from vectors that hold a dword of every row's codes: all of them, in order."""
    n, bias = k.target.lanes, k.target.weight_bias
    if fmt.table or fmt.offset:
        table = tuple(v + bias for v in (fmt.table or range(fmt.offset, fmt.offset + 16)))
        nibbles = [(v >> shift).bits_as(u8 * (4 * n)) for shift in (0, 4) for v in dwords]
        groups = [k.target.lookup_nibble(k, table, v) for v in nibbles]
    else:
        flip = 0x80808080 if bias else 0
        groups = [v ^ flip for v in dwords]
    return [v.bits_as(k.target.weight_type * (4 * n)) for v in groups]
