"""Quantised activations ("a8"): what the integer matmuls multiply weights with.

One row per token (or per token and head): codes i8[n] | d f32[n / 32] | s i32[n / 32], padded to 64
bytes. For each block of 32 values d = max|x| / 127, codes = round(x / d), and s is what the
target's unsigned weights add too much: -weight_bias * sum(codes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f32, i8, i32, u8
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.blocks import BLOCK
from codegen.kernels.encode import eight_bit, inverse_of, largest_bits
from codegen.kernels.rows import row_tiles, tree, vectors
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

LINE = 64


def row_bytes(n: int) -> int:
    """Bytes from one a8 row of n values to the next. Raises ValueError unless 32 divides n."""
    if n % BLOCK:
        raise ValueError(f"a row of {n} values is not a multiple of {BLOCK}")
    return -(-(n + 8 * (n // BLOCK)) // LINE) * LINE


def scales_offset(n: int) -> int:
    """Byte offset of d in a row of n values; s follows at `sums_offset`."""
    return n


def sums_offset(n: int) -> int:
    return n + 4 * (n // BLOCK)


@kernel(y=ptr(u8), x=ptr(f32), n_tokens=dim())
def quantize(
    k: Kernel,
    y: Pointer,
    x: Pointer,
    n_tokens: Value,
    *,
    n: int,
    rows_per_token: int = 1,
    token_stride: int = 0,
    row_stride: int = 0,
    offset: int = 0,
) -> None:
    """Row t * rows_per_token + i of y = a8 of the n values at x[t * token_stride + i * row_stride +
    offset]; strides in values, 0 means dense rows."""
    row_stride = row_stride or n
    token_stride = token_stride or rows_per_token * row_stride
    with row_tiles(k, n_tokens * rows_per_token, n) as row:
        token, i = row // rows_per_token, row % rows_per_token
        source = x.at(token * token_stride + i * row_stride + offset)
        target = y.bytes(row * row_bytes(n))
        with k.loop(0, n // BLOCK) as block:
            d, codes, total = quantize_block(k, vectors(k, source.at(block * BLOCK), BLOCK))
            for j, code in enumerate(codes):
                target.bytes(block * BLOCK + j * k.target.lanes, i8).store(code.to(i8))
            target.bytes(scales_offset(n), f32)[block] = d
            target.bytes(sums_offset(n), i32)[block] = total * -k.target.weight_bias


def quantize_block(k: Kernel, x: list[Value]) -> tuple[Value, list[Value], Value]:
    """(d, codes as i32 vectors, sum of the codes) of 32 values."""
    d = largest_bits(k, x).bits_as(f32) / 127.0
    codes = eight_bit(k, x, inverse_of(k, d))
    return d, codes, tree(k, codes, "add")
