"""Maths over Values, written in the kernel language: the same code on every target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from codegen.dtypes import DType, f32, i32
from codegen.values import Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

LOG2_E = 1.4426950408889634
# Minimax coefficients of 2^x on [-1/2, 1/2], highest power first; relative error 2e-8.
_EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
_ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves the integer nearest (even) in the low bits
_FAR_BELOW = -64.0


def round_to_int(k: Kernel, x: Value) -> Value:
    """Nearest integer, ties to even, as i32; |x| < 2^22."""
    bits = (x + _ROUND).bits_as(i32 * x.type.lanes)
    return bits - 0x4B400000


def exp2(k: Kernel, x: Value) -> Value:
    """2^x in f32; below -126 it is 0 to the last bit that matters, above 127 it stays at 2^127.

    NaN stays NaN: minimum and maximum return their second operand when one is NaN.
    """
    x = k.maximum(-126.0, k.minimum(127.0, x))
    whole = (x + _ROUND) - _ROUND
    f = x - whole
    p = k.const(_EXP2[0], x.type)
    for c in _EXP2[1:]:
        p = p * f + c
    scale = (round_to_int(k, x) + 127) << 23
    return p * scale.bits_as(f32 * x.type.lanes)


def softmax_weight(k: Kernel, below: Value) -> Value:
    """2^below, and 0 from far below on: f32 sums would not show it, while products with it would be
    denormal numbers, each of which takes as long as a hundred others. NaN stays NaN."""
    return k.select(below < _FAR_BELOW, 0.0, exp2(k, below))


def any_lane(mask: Value) -> Value:
    """Whether a lane of a comparison's result is true."""
    return mask.bits_as(DType("u", mask.type.lanes)).ne(0)


def all_lanes(mask: Value) -> Value:
    """Whether all lanes of a comparison's result are true."""
    n = mask.type.lanes
    return mask.bits_as(DType("u", n)).eq(2**n - 1)


def sigmoid(k: Kernel, x: Value) -> Value:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exp2(k, x * -LOG2_E))


def silu(k: Kernel, x: Value) -> Value:
    """x * sigmoid(x)."""
    return x / (1.0 + exp2(k, x * -LOG2_E))


def transpose_sum(k: Kernel, accs: Sequence[Value]) -> Value:
    """[sum of lanes of accs[0], of accs[1], ...]: n vectors of n lanes into one vector."""
    return transpose_reduce(k, accs, lambda a, b: a + b)


def transpose_max(k: Kernel, accs: Sequence[Value]) -> Value:
    """[largest lane of accs[0], of accs[1], ...]."""
    return transpose_reduce(k, accs, k.maximum)


def transpose_reduce(
    k: Kernel, accs: Sequence[Value], combine: Callable[[Value, Value], Value]
) -> Value:
    """[all lanes of accs[0] combined, of accs[1], ...]: n vectors of n lanes into one vector.

    A butterfly: each round combines one half of every pair with the other, so that n - 1 steps do
    all n vectors.
    """
    n = accs[0].type.lanes
    vectors, width = list(accs), n
    while len(vectors) > 1:
        half = width // 2
        paired = []
        for a, b in zip(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :], strict=True):
            low, high = [], []
            for start in range(0, n, width):
                low += [start + i for i in range(half)] + [n + start + i for i in range(half)]
                high += [start + half + i for i in range(half)]
                high += [n + start + half + i for i in range(half)]
            paired.append(combine(k.shuffle(a, b, low), k.shuffle(a, b, high)))
        vectors, width = paired, half
    return k.shuffle(vectors[0], vectors[0], [_final_lane(i, n) for i in range(n)])


def _final_lane(source: int, n: int) -> int:
    """Where the butterfly leaves the sum of vector `source`: the second of a pair goes up half."""
    lane, count, width = 0, n, n
    while count > 1:
        count, width = count // 2, width // 2
        if source >= count:
            source, lane = source - count, lane + width
    return lane


def join(k: Kernel, pieces: list[Value]) -> Value:
    """Concatenate a power of two of vectors."""
    while len(pieces) > 1:
        pieces = [k.concat(a, b) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
    return pieces[0]


def transpose4(k: Kernel, rows: Sequence[Value]) -> list[Value]:
    """Dwords of four vectors: result[j] holds, per group of 4 lanes, dword j of the four inputs.

    Input i has, in its 128-bit group g, four dwords of row 4g + i; output j then has dword j of
    rows 0, 1, 2, ... in order: only shuffles inside 128-bit groups, the cheap ones everywhere.
    """
    n = rows[0].type.lanes
    a, b, c, d = rows

    def pick(x: Value, y: Value, from_x: tuple[int, int], from_y: tuple[int, int]) -> Value:
        mask = []
        for g in range(0, n, 4):
            mask += [g + from_x[0], n + g + from_y[0], g + from_x[1], n + g + from_y[1]]
        return k.shuffle(x, y, mask)

    def halves(x: Value, y: Value, start: int) -> Value:
        mask = []
        for g in range(0, n, 4):
            mask += [g + start, g + start + 1, n + g + start, n + g + start + 1]
        return k.shuffle(x, y, mask)

    ab_low, ab_high = pick(a, b, (0, 1), (0, 1)), pick(a, b, (2, 3), (2, 3))
    cd_low, cd_high = pick(c, d, (0, 1), (0, 1)), pick(c, d, (2, 3), (2, 3))
    return [
        halves(ab_low, cd_low, 0),
        halves(ab_low, cd_low, 2),
        halves(ab_high, cd_high, 0),
        halves(ab_high, cd_high, 2),
    ]
