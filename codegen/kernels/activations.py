"""Quantised activations ("a8"): what the integer matmuls multiply weights with.

One row per token (or per token and head): codes i8[n] | d f32[n / 32] | start i32[n / 32] | offset
f32[n / 32], padded to 64 bytes. For each block of 32 values d = max|x| / 127 with its last two bits
zero, and codes = round(x / d).

An integer sum that begins at `start` is made f32 and multiplied with d in one instruction. start is
the bits of the f32 number MAGIC = 1.5 * 2^23, less weight_bias * sum(codes), which the target's
unsigned weights add too much. MAGIC counts ones in its last bit: its bits + dot are MAGIC + dot.
With offset = -MAGIC * d, which is exact as d has 22 bits,

    dot * d = (MAGIC + dot) * d + offset,   rounded once; |dot| <= 32 * 127 * 128 < 2^22.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f32, i8, i32, u8, u32
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.blocks import BLOCK
from codegen.kernels.encode import eight_bit, inverse_of, largest_bits
from codegen.kernels.rows import row_tiles, tree, vectors
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

LINE = 64
MAGIC, MAGIC_BITS = 1.5 * 2.0**23, 0x4B400000
D_BITS = 0xFFFFFFFC


def row_bytes(n: int) -> int:
    """Bytes from one a8 row of n values to the next. Raises ValueError unless 32 divides n."""
    if n % BLOCK:
        raise ValueError(f"a row of {n} values is not a multiple of {BLOCK}")
    return -(-(n + 12 * (n // BLOCK)) // LINE) * LINE


def scales_offset(n: int) -> int:
    """Byte offset of d in a row of n values; start and offset follow."""
    return n


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
            store_codes(k, target, n, block, vectors(k, source.at(block * BLOCK), BLOCK))


def store_codes(k: Kernel, row: Pointer, n: int, block: Value, x: list[Value]) -> None:
    """Write 32 values as a block of a row of n."""
    d = largest_bits(k, x).bits_as(f32) / 127.0
    d = (d.bits_as(u32) & D_BITS).bits_as(f32)
    codes = eight_bit(k, x, inverse_of(k, d))
    for j, code in enumerate(codes):
        row.bytes(block * BLOCK + j * k.target.lanes, i8).store(code.to(i8))
    too_much = tree(k, codes, "add") * k.target.weight_bias
    at_d, at_start, at_offset = block_numbers(row, n, block)
    at_d.store(d)
    at_start.cast(i32).store(k.const(MAGIC_BITS, i32) - too_much)
    at_offset.store(d * -MAGIC)


def block_numbers(row: Pointer, n: int, block: Value) -> list[Pointer]:
    """Where d, start and offset of a block lie."""
    at = row.bytes(scales_offset(n), f32).at(block)
    return [at.at(i * (n // BLOCK)) for i in range(3)]


def load_start(row: Pointer, n: int, block: Value) -> Value:
    """What the integer sum of a block begins at, in every lane."""
    _, start, _ = block_numbers(row, n, block)
    return start.k.splat(start.cast(i32).load(), start.k.target.lanes)


def scaled(total: Value, row: Pointer, n: int, block: Value) -> Value:
    """dot * d of a block in f32, of integer sums that began at `load_start`."""
    k, lanes = total.k, total.type.lanes
    at_d, _, at_offset = block_numbers(row, n, block)
    d, offset = (k.splat(at.load(), lanes) for at in (at_d, at_offset))
    bits = total.bits_as(f32 * lanes)
    return k.fused(bits, d, offset) if k.target.fuses else (bits - MAGIC) * d
