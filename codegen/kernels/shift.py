"""Moving cached rows to other positions: the rotated part of a row is rotated further.

Rotations add up, so that a row stored for position p becomes the one for p - n when its k_pe is
turned by -n: what a context shift does with the rows that it keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.blocks import BLOCK, load_block
from codegen.kernels.encode import store_block, store_row
from codegen.kernels.layers import rotate, rotation
from codegen.kernels.rows import row_tiles, store_vectors, vectors
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel


@kernel(cache=ptr(u8), rope=ptr(f32), cells=ptr(i32), n_cells=dim())
def shift_rows(
    k: Kernel,
    cache: Pointer,
    rope: Pointer,
    cells: Pointer,
    n_cells: Value,
    *,
    n_heads: int,
    n_before: int,
    n_rope: int,
    fmt: BlockFormat,
) -> None:
    """The last n_rope of the n_before + n_rope values of each head of rows cells[i] are rotated by
    the table of cosines and sines at `rope`. A row with one scale for all gets a new one."""
    width = n_before + n_rope
    row, turn = k.stack(f32, width), rotation(k, rope, n_rope)
    with row_tiles(k, n_cells * n_heads, width) as index:
        place = cells[index // n_heads].to(i64) * n_heads + index % n_heads
        at = cache.bytes(place * fmt.row_bytes(width))
        first = 0 if fmt.header else n_before // BLOCK
        for block in range(first, width // BLOCK):
            values = load_block(k, fmt, at, k.const(block, i64))
            store_vectors(row.at(block * BLOCK), values)
        part = row.at(n_before)
        store_vectors(part, rotate(k, vectors(k, part, n_rope), turn))
        if fmt.header:
            store_row(k, fmt, at, width, lambda i: vectors(k, row.at(i * BLOCK), BLOCK))
        else:
            for block in range(first, width // BLOCK):
                values = vectors(k, row.at(block * BLOCK), BLOCK)
                store_block(k, fmt, at, k.const(block, i64), values)
