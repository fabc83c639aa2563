"""Matrix times few vectors: one weight row after another, streamed at memory speed.

The dot of a quantised row runs over chunks of up to 8 blocks: the chunk's scales are gathered into
one vector and multiplied by the activations' scales there, so that each integer dot costs one
conversion, one lane spread and one multiply-add.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f16, f32, i8, i32, i64, u8, u16, u32, u64
from codegen.formats import BlockFormat
from codegen.kernels.blocks import BLOCK, load_block
from codegen.values import Pointer, Value, Var

if TYPE_CHECKING:
    from codegen.builder import Kernel

CHUNK = 8  # blocks whose scales are gathered together
PREFETCH_BYTES = 2048


def row_dot(k: Kernel, fmt: BlockFormat, row: Pointer, x: Pointer, n_cols: int) -> Value:
    """sum_j row[j] * x[j] as an f32 scalar.

    `row` points to a weight row in `fmt`; `x` to f32 values for float formats, else to an a8 row.
    """
    if not fmt.is_quantised:
        return _float_dot(k, fmt, row, x, n_cols)
    n_blocks = n_cols // BLOCK
    acc = k.var(k.zeros(f32 * k.target.lanes))
    whole = n_blocks // CHUNK * CHUNK
    if whole:
        with k.loop(0, whole, CHUNK) as b:
            chunk = row.bytes(b * fmt.block_bytes)
            for line in range(0, CHUNK * fmt.block_bytes, k.target.cache_line):
                k.prefetch(chunk.bytes(PREFETCH_BYTES + line))
            _chunk_dot(k, fmt, chunk, _Codes(x, b, n_blocks), CHUNK, acc)
    if n_blocks - whole:
        chunk = row.bytes(whole * fmt.block_bytes)
        _chunk_dot(
            k, fmt, chunk, _Codes(x, k.const(whole, i64), n_blocks), n_blocks - whole, acc
        )
    return acc.get().sum()


def _float_dot(k: Kernel, fmt: BlockFormat, row: Pointer, x: Pointer, n_cols: int) -> Value:
    n = k.target.lanes
    parts = BLOCK // n
    accs = [k.var(k.zeros(f32 * n)) for _ in range(parts)]
    with k.loop(0, n_cols // BLOCK) as b:
        k.prefetch(row.bytes(b * (BLOCK * fmt.block_bytes) + PREFETCH_BYTES))
        values = load_block(k, fmt, row, b)
        codes = x.cast(f32).at(b * BLOCK)
        for i, (acc, w) in enumerate(zip(accs, values, strict=True)):
            acc += w * codes.at(i * n).load(f32 * n)
    total = accs[0].get()
    for acc in accs[1:]:
        total = total + acc.get()
    return total.sum()


class _Codes:
    """Where a chunk's activations are: codes, scales and sums of an a8 row, from block `b` on."""

    def __init__(self, row: Pointer, b: Value, n_blocks: int) -> None:
        self.codes = row.bytes(b * BLOCK, i8)
        self.scales = row.bytes(n_blocks * BLOCK, f32).at(b)
        self.sums = row.bytes(n_blocks * (BLOCK + 4), i32).at(b)


def _chunk_dot(
    k: Kernel, fmt: BlockFormat, chunk: Pointer, x: _Codes, n_blocks: int, acc: Var
) -> None:
    """acc += sum over the chunk's blocks of d_w * d_x * dot(codes, codes)."""
    n, width = k.target.lanes, 4 * k.target.lanes
    scales = _gather_scales(k, fmt, chunk, n_blocks) * _load_up_to(k, x.scales, n_blocks)
    for first in range(0, n_blocks * BLOCK, width):
        codes = x.codes.at(first).load(i8 * width)
        weights = weight_codes(k, fmt, chunk, first, width, n_blocks)
        dot = k.dot_i8(k.zeros(i32 * n), weights, codes)
        # Lane j of the dot belongs to the block of code first + 4 j; behind the end: scale 0.
        blocks = [min((first + 4 * j) // BLOCK, n_blocks) for j in range(n)]
        acc += dot.to(f32) * _spread(k, scales, blocks, n_blocks)
    if k.target.weight_bias:
        sums = _load_up_to(k, x.sums, n_blocks).to(f32) * scales
        for start in range(0, CHUNK, min(n, CHUNK)):
            part = sums.lanes(start, start + min(n, CHUNK))
            if n > CHUNK:
                part = k.concat(part, k.zeros(part.type))
            acc += part


def _spread(k: Kernel, scales: Value, blocks: list[int], n_blocks: int) -> Value:
    zero = k.zeros(scales.type)
    picked = [CHUNK if block >= n_blocks else block for block in blocks]
    return k.shuffle(scales, zero, picked)


def _gather_scales(k: Kernel, fmt: BlockFormat, chunk: Pointer, n_blocks: int) -> Value:
    """d of the chunk's blocks as f32, zero behind the last; joined in integer registers."""
    at = fmt.field_offset("d")
    words = []
    for start in range(0, CHUNK, 4):
        word = k.const(0, u64)
        for i in range(start, min(start + 4, n_blocks)):
            half = chunk.bytes(i * fmt.block_bytes + at, u16).load().to(u64)
            word = word | (half << (16 * (i - start)))
        words.append(word)
    both = k.zeros(u64 * 2)
    for i, word in enumerate(words):
        both = k.insert(both, word, i)
    return both.bits_as(f16 * CHUNK).to(f32)


def _load_up_to(k: Kernel, p: Pointer, n_blocks: int) -> Value:
    if n_blocks == CHUNK:
        return p.load(p.elem * CHUNK)
    return k.load_part(p, p.elem * CHUNK, k.const(n_blocks, i64))


def weight_codes(
    k: Kernel, fmt: BlockFormat, chunk: Pointer, first: int, width: int, n_blocks: int
) -> Value:
    """Codes first .. first + width - 1 of a chunk, as dot_i8 wants them; 0 behind the end."""
    bias = k.target.weight_bias
    if fmt.table or fmt.offset:
        index = _nibble_index(k, fmt, chunk, first, width, n_blocks)
        codes = k.target.lookup16(k, code_table(fmt, bias), index)
    else:
        pieces = []
        for start in range(first, first + width, min(BLOCK, width)):
            block, inside = divmod(start, BLOCK)
            at = chunk.bytes(block * fmt.block_bytes + fmt.field_offset("qs") + inside, u8)
            size = min(BLOCK, width)
            pieces.append(at.load(u8 * size) if block < n_blocks else k.zeros(u8 * size))
        codes = join(k, pieces)
        if bias:
            codes = codes ^ 0x80
    return codes.bits_as(k.target.weight_type * width)


def code_table(fmt: BlockFormat, bias: int) -> tuple[int, ...]:
    """The 16 values of a 4-bit format, plus the bias the target's dot product wants."""
    return tuple(v + bias for v in (fmt.table or range(fmt.offset, fmt.offset + 16)))


def _nibble_index(
    k: Kernel, fmt: BlockFormat, chunk: Pointer, first: int, width: int, n_blocks: int
) -> Value:
    """4-bit indices in value order: 16 low nibbles of a block, then its 16 high ones."""
    pieces, shifts = [], []
    for start in range(first, first + width, 16):
        block, inside = divmod(start, BLOCK)
        at = chunk.bytes(block * fmt.block_bytes + fmt.field_offset("qs"), u8)
        pieces.append(at.load(u8 * 16) if block < n_blocks else k.zeros(u8 * 16))
        shifts += [4 if inside else 0] * 4
    packed = join(k, pieces).bits_as(u32 * (width // 4))
    return (packed >> k.vector(shifts, u32)).bits_as(u8 * width) & 15


def join(k: Kernel, pieces: list[Value]) -> Value:
    """Concatenate a power of two of vectors."""
    while len(pieces) > 1:
        pieces = [k.concat(a, b) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
    return pieces[0]


