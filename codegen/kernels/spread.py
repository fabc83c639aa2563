"""Activations in the order in which codes of a weight row meet them.

A register holds, of each of `lanes / 4` blocks of one row, 16 bytes of codes: lane 4 i + j has
dword j of block i. For that many blocks (a step) the activations are four registers:

    codes of columns 0..15 of each block | of columns 16..31 | what unsigned weights add too much,
    i32 per lane | d of each block in its four lanes, f32
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f16, f32, i8, i32, i64, u32
from codegen.formats import BlockFormat
from codegen.kernels.activations import scales_offset
from codegen.kernels.blocks import BLOCK
from codegen.values import Pointer, Value, Var
from codegen.vecmath import join

if TYPE_CHECKING:
    from codegen.builder import Kernel

PIECE = 16  # bytes of a block that lie side by side in a register
PARTS = 4  # registers of a step
UNROLLED = 4  # a short row has no loop
TOGETHER = 8  # tokens that share what it takes to decode


def blocks_per_step(k: Kernel) -> int:
    return k.target.lanes // 4


def steps(k: Kernel, n_cols: int) -> int:
    return -(-n_cols // (BLOCK * blocks_per_step(k)))


def meets_spread_rows(fmt: BlockFormat) -> bool:
    """Whether rows of a format are multiplied with activations in this order."""
    return fmt.integer_dot and not fmt.interleaved


@dataclass(frozen=True)
class Inputs:
    """Activation rows as a format's rows meet them: spread, a8 or f32."""

    first: Pointer
    count: Value | int  # 1 .. TOGETHER
    pitch: int
    n_cols: int

    def row(self, t: Value) -> Pointer:
        return self.first.bytes(t * self.pitch)


# (format, first token, number of tokens) -> their activations.
Take = Callable[[BlockFormat, Value, Value | int], Inputs]


@dataclass(frozen=True)
class Activations:
    """Rows of x, `pitch` bytes apart, and a thread's own spread copy of some of them."""

    k: Kernel
    n_cols: int
    pitch: int
    copy: Pointer
    key: Var

    def hold(self, key: Value, x: Pointer, count: Value | int) -> Held:
        """The rows at x; they are spread unless rows of the same key were the last ones."""
        with self.k.when(key.ne(self.key.get())):
            self.key.set(key)
            with self.k.loop(0, count) as t:
                spread(self.k, x.bytes(t * self.pitch), self.copy.bytes(t * self.size), self.n_cols)
        return Held(self, x)

    @property
    def size(self) -> int:
        """Bytes of a spread row."""
        return steps(self.k, self.n_cols) * PARTS * 4 * self.k.target.lanes


@dataclass(frozen=True)
class Held:
    """Rows that are there both as they were and spread."""

    rows: Activations
    x: Pointer

    def inputs(self, fmt: BlockFormat, first: Value, count: Value | int) -> Inputs:
        r = self.rows
        if meets_spread_rows(fmt):
            return Inputs(r.copy.bytes(first * r.size), count, r.size, r.n_cols)
        return Inputs(self.x.bytes(first * r.pitch), count, r.pitch, r.n_cols)


def activations(
    k: Kernel, fmts: tuple[BlockFormat, ...], n_cols: int, pitch: int, capacity: int = TOGETHER
) -> Activations:
    """Room for `capacity` spread rows, if one of the formats wants them."""
    n = k.target.lanes
    words = steps(k, n_cols) * PARTS * capacity if any(map(meets_spread_rows, fmts)) else 0
    copy = k.stack(i32 * n, max(1, words)).at(0, i32)
    nothing = k.var(k.const(-1 if words else 0, i64))
    return Activations(k, n_cols, pitch, copy, nothing)


def spread(k: Kernel, x: Pointer, to: Pointer, n_cols: int) -> None:
    """to = the a8 row x of n_cols values, spread."""
    n, each = k.target.lanes, blocks_per_step(k)
    n_blocks = n_cols // BLOCK
    bias = k.const(k.target.weight_bias, k.target.weight_type * (4 * n))

    def step(s: Value, count: int) -> None:
        at, extra = to.cast(i32).at(s * (PARTS * n)), k.zeros(i32 * n)
        for half in (0, 1):
            codes = pieces(k, x.bytes(s * (each * BLOCK)), PIECE * half, BLOCK, count)
            at.at(half * n).store(codes.bits_as(i32 * n))
            if k.target.weight_bias:
                extra = k.dot_i8(extra, bias, codes.bits_as(i8 * (4 * n)))
        if k.target.weight_bias:
            at.at(2 * n).store(-extra)
        d = x.bytes(scales_offset(n_cols), f32).at(s * each)
        fours = [k.splat(d[i] if i < count else k.const(0.0, f32), 4) for i in range(each)]
        at.at(3 * n).cast(f32).store(join(k, fours))

    each_step(k, n_blocks, step)


def each_step(k: Kernel, n_blocks: int, step: Callable[[Value, int], None]) -> None:
    """step(s, number of blocks) over a row; the last step may have fewer blocks."""
    each = blocks_per_step(k)
    whole, rest = divmod(n_blocks, each)
    if whole <= UNROLLED:
        for i in range(whole):
            step(k.const(i, i64), each)
    else:
        with k.loop(0, whole) as s:
            step(s, each)
    if rest:
        step(k.const(whole, i64), rest)


def pieces(k: Kernel, at: Pointer, offset: int, stride: int, count: int) -> Value:
    """16 bytes of each of `count` blocks that are `stride` bytes apart, as u32; zeros behind."""
    if count == blocks_per_step(k):
        return k.target.load_pieces(k, at, offset, stride)
    loaded = [at.bytes(offset + stride * i, u32).load(u32 * 4) for i in range(count)]
    return join(k, loaded + [k.zeros(u32 * 4)] * (blocks_per_step(k) - count))


def scales(k: Kernel, at: Pointer, stride: int, count: int) -> Value:
    """f16 at `count` places that are `stride` bytes apart, each in four lanes, as f32."""
    if count == blocks_per_step(k):
        return k.target.load_scales(k, at, stride)
    loaded = [k.splat(at.bytes(stride * i, f16).load().to(f32), 4) for i in range(count)]
    return join(k, loaded + [k.zeros(f32 * 4)] * (blocks_per_step(k) - count))
