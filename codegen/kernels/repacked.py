"""Rows interleaved at load (-rtr): a register reads the same 4 codes of all rows of a group.

What interleave.py turns in registers each time lies turned in memory: a group's block (layout:
codegen/formats.py) holds its R scales, then dword 0 of every row's codes, dword 1, ... R is the
target's number of lanes, lane = row. The arithmetic is that of the file's layout, and so are the
results, bit by bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f16, f32, u8, u16, u32
from codegen.formats import BlockFormat
from codegen.kernel import kernel, ptr, value
from codegen.kernels.interleave import code_dwords, unpack_codes
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel


@kernel(y=ptr(u8), w=ptr(u8), n_groups=value(), n_blocks=value(), per_matrix=value(), pitch=value())
def interleave_rows(
    k: Kernel,
    y: Pointer,
    w: Pointer,
    n_groups: Value,
    n_blocks: Value,
    per_matrix: Value,
    pitch: Value,
    *,
    fmt: BlockFormat,
) -> None:
    """y = the rows of w, interleaved; `fmt` is that of y.

    Rows are `n_blocks` long. Matrices of `per_matrix` groups are `pitch` bytes apart in w, and
    dense in y.
    """
    n, row_bytes = fmt.interleaved, n_blocks * fmt.block_bytes
    with k.tiles(n_groups) as group:
        first = w.bytes(group // per_matrix * pitch).bytes(group % per_matrix * n * row_bytes)
        with k.loop(0, n_blocks) as b:
            scales, codes = _fields(fmt, y.bytes(group * n * row_bytes), b)
            for i in range(n):
                block = first.bytes(row_bytes * i).bytes(b * fmt.block_bytes)
                scales.cast(u16)[i] = block.bytes(fmt.field_offset("d"), u16).load()
                for j in range(code_dwords(fmt)):
                    codes[j * n + i] = block.bytes(fmt.field_offset("qs"), u32)[j]


def _fields(fmt: BlockFormat, group: Pointer, b: Value) -> tuple[Pointer, Pointer]:
    """Where block b of a group has its scales (f16) and its dwords of codes."""
    n = fmt.interleaved
    at = group.bytes(b * (n * fmt.block_bytes))
    return at.bytes(n * fmt.field_offset("d"), f16), at.bytes(n * fmt.field_offset("qs"), u32)


def load_block(k: Kernel, fmt: BlockFormat, group: Pointer, b: Value) -> tuple[list[Value], Value]:
    """(codes as `dot_i8` wants them, a vector per 4 columns; scales as f32) of a group's block."""
    n = fmt.interleaved
    scales, codes = _fields(fmt, group, b)
    dwords = [codes.at(j * n).load(u32 * n) for j in range(code_dwords(fmt))]
    return unpack_codes(k, fmt, dwords), scales.load(f16 * n).to(f32)
