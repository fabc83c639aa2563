"""Micro-GEMMs over rows of 8-bit codes with one scale, as they lie in the cache.

What they meet, q and the weights, are 16-bit codes in two bytes, each of which takes part in a dot
product of its own, so that the codes of the cache need not be widened. Bytes are unsigned, as
targets with `unsigned_weights` want them: those of q are code + 32768, and 32768 times the sum of
the row, which is stored with it, is subtracted. Sums of a row or tile cannot overflow i32.

    packed[group][column quad][high, low][lane]     pack_queries: row = lanes * group + lane
    s[key][row] = scale[row] K q^T                  multiply_keys: quads of neighbouring columns
    o[row][column] = o keep + scale P V             add_values: quads of neighbouring keys
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i8, i32, u8
from codegen.kernels.code_tile import spread
from codegen.kernels.encode import inverse_of
from codegen.kernels.tile import round_up, row_bounds, transpose
from codegen.values import Pointer, Value, Var
from codegen.vecmath import round_to_int

if TYPE_CHECKING:
    from codegen.builder import Kernel

OFFSET = 32768
LARGEST_WEIGHT = 65535


@dataclass(frozen=True)
class Micro:
    """Register tiles, with two accumulators per number: `keys` x `vectors` of rows for scores,
    `rows` x 4 vectors of columns for o."""

    keys: int
    vectors: int
    rows: int


def micro(k: Kernel, block_rows: int) -> Micro:
    """16 accumulators, or 8 where there are 16 registers."""
    many = k.target.registers >= 32
    vectors = min(2 if many else 1, block_rows // k.target.lanes)
    return Micro((8 if many else 4) // vectors, vectors, 2 if many else 1)


def pack_queries(
    k: Kernel,
    packed: Pointer,
    scales: Pointer,
    row: Callable[[Value], Pointer],
    n_rows: Value,
    *,
    width: int,
    block_rows: int,
) -> None:
    """Bytes of rows of q, transposed, and a scale per row; lanes past `n_rows` repeat the last."""
    lanes = k.target.lanes
    group, inverses = micro(k, block_rows).vectors * lanes, k.stack(f32, lanes)
    with k.loop(0, round_up(n_rows, group), lanes) as first:
        sources = [row(k.minimum(first + i, n_rows - 1)) for i in range(lanes)]
        to = packed.at(first // group * (group * width // 2) + first % group)
        top, total = row_bounds(k, sources, 0, width)
        scale = top * (1 / (OFFSET - 1)) + total * 0.0  # which is NaN if a number is
        scales.at(first).store(scale)
        inverses.store(inverse_of(k, scale))
        with k.loop(0, width, 4 * lanes) as column:
            rows = []
            for source, inverse in zip(sources, spread(inverses, lanes), strict=True):
                parts = [source.at(column + j * lanes).load(f32 * lanes) for j in range(4)]
                rows.append(byte_quads(k, [round_to_int(k, v * inverse) + OFFSET for v in parts]))
            for term, quads in enumerate(zip(*rows, strict=True)):
                for i, v in enumerate(transpose(k, list(quads))):
                    to.at(((column // 4 + i) * 2 + term) * group).store(v)


def byte_quads(k: Kernel, codes: list[Value]) -> tuple[Value, Value]:
    """High and low bytes of four vectors of 16-bit codes in order, four bytes to a lane."""
    found = []
    for part in ([c >> 8 for c in codes], codes):
        a, b, c, d = (v.to(u8) for v in part)
        found.append(k.concat(k.concat(a, b), k.concat(c, d)).bits_as(i32 * codes[0].type.lanes))
    return found[0], found[1]


def weight_quads(k: Kernel, weights: list[Value], inverse: Value) -> tuple[Value, Value]:
    """High and low bytes of the codes of four vectors, side by side: byte i of a lane is of
    vector i."""
    a, b, c, d = (round_to_int(k, v * inverse) for v in weights)
    high = (a >> 8) | (b & 0xFF00) | ((c & 0xFF00) << 8) | ((d & 0xFF00) << 16)
    low = (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)
    return high, low


def multiply_keys(
    k: Kernel,
    s: Pointer,
    packed: Pointer,
    scale: Pointer,
    keys: Callable[[Value], tuple[Pointer, Value]],
    n_rows: Value,
    n_keys: Value,
    *,
    width: int,
    block_rows: int,
    ask: Callable[[Value, Value], None],
) -> None:
    """s[key][row] = scale[row] * sum over columns of keys[key][column] * q[row][column].

    `keys(key)` is the address of a row's codes, and their sum. Whole register tiles are computed:
    s has room for keys past `n_keys`, for which `keys` may give any row. `ask(key, quad)` is called
    in between, to ask for memory needed later.
    """
    m, lanes = micro(k, block_rows), k.target.lanes
    group = m.vectors * lanes
    with k.loop(0, n_keys, m.keys) as key:
        rows = [keys(key + i) for i in range(m.keys)]
        with k.loop(0, n_rows, group) as row:
            sums = [[k.var(k.zeros(i32 * lanes)) for _ in range(2 * m.vectors)] for _ in rows]
            q = packed.at(row * (width // 2))
            with k.loop(0, width // 4) as quad:
                at = q.at(quad * (2 * group))
                vectors = [at.at(v * lanes).load(i32 * lanes) for v in range(2 * m.vectors)]
                ask(key, quad)
                for (codes, _), acc in zip(rows, sums, strict=True):
                    add_quads(k, acc, vectors, codes.cast(i32).at(quad)[0])
            for v in range(m.vectors):
                factor = scale.at(row + v * lanes).load(f32 * lanes)
                for i, ((_, total), acc) in enumerate(zip(rows, sums, strict=True)):
                    high = acc[v].get() - total * (OFFSET // 256)
                    score = both_bytes(high, acc[m.vectors + v].get()) * factor
                    s.at((key + i) * block_rows + row + v * lanes).store(score)


def both_bytes(high: Value, low: Value) -> Value:
    """256 high + low in f32; both are exact there."""
    return high.to(f32) * 256.0 + low.to(f32)


def add_quads(k: Kernel, acc: list[Var], vectors: list[Value], codes: Value) -> None:
    """acc += the dot product of the unsigned bytes of each lane with four codes."""
    lanes = k.target.lanes
    spread = k.splat(codes, lanes).bits_as(i8 * (4 * lanes))
    for total, vector in zip(acc, vectors, strict=True):
        total.set(k.dot_i8(total.get(), vector.bits_as(u8 * (4 * lanes)), spread))


def add_values(
    k: Kernel,
    o: Pointer,
    weights: Pointer,
    values: Pointer,
    keep: Pointer,
    scale: Pointer,
    n_rows: Value,
    n_quads: Value,
    *,
    d_v: int,
    block_rows: int,
    ask: Callable[[Value], None],
) -> None:
    """o[row][column] = o * keep[row] + scale[row] * sum of weights[quad][row] * values[quad].

    For the four vectors of columns of `interleave`; rows of o are d_v long. Weights lie as
    [quad][high, low][row]. `ask(row)` is called in between, to ask for memory needed later.
    """
    m, lanes = micro(k, block_rows), k.target.lanes
    with k.loop(0, n_rows, m.rows) as row:
        ask(row)
        sums = [[k.var(k.zeros(i32 * lanes)) for _ in range(4)] for _ in range(2 * m.rows)]
        with k.loop(0, n_quads) as quad:
            v = values.at(quad * (4 * lanes))
            vectors = [v.at(j * lanes).load(i32 * lanes) for j in range(4)]
            for term in range(2):
                at = weights.at((quad * 2 + term) * block_rows + row)
                for i in range(m.rows):
                    add_weighted(k, sums[2 * i + term], vectors, at[i])
        for i in range(m.rows):
            factor, old = scale[row + i], keep[row + i]
            for j, (high, low) in enumerate(zip(sums[2 * i], sums[2 * i + 1], strict=True)):
                p = o.at((row + i) * d_v + j * lanes)
                total = both_bytes(high.get(), low.get()) * factor
                p.store(p.load(f32 * lanes) * old + total)


def add_weighted(k: Kernel, acc: list[Var], vectors: list[Value], weights: Value) -> None:
    """acc += the dot product of four unsigned weights with the codes of each lane."""
    lanes = k.target.lanes
    spread = k.splat(weights, lanes).bits_as(u8 * (4 * lanes))
    for total, vector in zip(acc, vectors, strict=True):
        total.set(k.dot_i8(total.get(), spread, vector.bits_as(i8 * (4 * lanes))))


def interleave(k: Kernel, rows: list[Value]) -> list[Value]:
    """Byte vectors of four neighbouring keys as quads, four i32 vectors.

    Quads stay inside 128-bit groups, which is cheap: vector j has columns 4 j .. 4 j + 3 of every
    16; `in_order` undoes it.
    """
    a, b, c, d = rows
    pairs = [(half(k, x, y, 1, h)) for h in (0, 1) for x, y in ((a, b), (c, d))]
    quads = [half(k, pairs[2 * h], pairs[2 * h + 1], 2, g) for h in (0, 1) for g in (0, 1)]
    return [quad.bits_as(i32 * (a.type.lanes // 4)) for quad in quads]


def half(k: Kernel, a: Value, b: Value, unit: int, which: int) -> Value:
    """The low or high half of every 16 bytes of a and b, taking turns by `unit` bytes."""
    n = a.type.lanes
    mask = []
    for start in range(8 * which, n, 16):
        for i in range(start, start + 8, unit):
            mask += [*range(i, i + unit), *range(n + i, n + i + unit)]
    return k.shuffle(a, b, mask)


def in_order(k: Kernel, parts: list[Value]) -> list[Value]:
    """Columns of the four vectors of `interleave`'s order, in order."""
    n = parts[0].type.lanes
    low, high = k.concat(parts[0], parts[1]), k.concat(parts[2], parts[3])
    # Column c is number c % 4 of four in vector c % 16 // 4, those of group c // 16.
    place = [c % 16 // 4 * n + c // 16 * 4 + c % 4 for c in range(4 * n)]
    return [k.shuffle(low, high, place[i : i + n]) for i in range(0, 4 * n, n)]
