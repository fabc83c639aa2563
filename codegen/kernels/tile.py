"""f32 micro-GEMMs over tiles in a thread's own scratch, shared by the attention kernels.

The long dimension of queries lies across lanes: `packed` holds rows of q transposed, in groups of
a few vectors, so that products of a group with a row of keys need no horizontal sums.

    packed[group][column][lane]     pack_rows: row of q = group * group_rows + lane
    s[key][row]                     multiply_keys: s = K q^T
    o[row][column]                  add_values: o = o * keep[row] + sum over keys of s * v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32
from codegen.values import Pointer, Value, Var

if TYPE_CHECKING:
    from codegen.builder import Kernel

PARTS = (96, 64, 32)


def round_up(k: Kernel, n: Value, step: int) -> Value:
    """The next multiple of `step`."""
    return (n + (step - 1)) // step * step


def transpose(k: Kernel, rows: list[Value]) -> list[Value]:
    """n vectors of n lanes, rows to columns: swap the off-diagonal halves at each scale."""
    n, distance = len(rows), len(rows) // 2
    out = list(rows)
    while distance:
        low = [i if not i & distance else n + i - distance for i in range(n)]
        high = [i + distance if not i & distance else n + i for i in range(n)]
        for i in (i for i in range(n) if not i & distance):
            a, b = out[i], out[i + distance]
            out[i], out[i + distance] = k.shuffle(a, b, low), k.shuffle(a, b, high)
        distance //= 2
    return out


@dataclass(frozen=True)
class Micro:
    """Register tiles of a target: `keys` x `vectors` of scores, `rows` x `columns` of outputs."""

    keys: int
    vectors: int
    rows: int
    columns: int


def micro(k: Kernel, block_rows: int, width: int = 0) -> Micro:
    """Tiles that leave room for the operands; `width` is that of the outputs.

    With 32 registers 16 accumulators saturate two FMA units; with 16 there are 12 (scores) and 8.
    """
    many = k.target.registers >= 32
    vectors = min(2, block_rows // k.target.lanes)
    columns = 4 if many and width // k.target.lanes % 4 == 0 else 2
    return Micro((16 if many else 12) // vectors, vectors, 4, columns)


def pack_rows(
    k: Kernel,
    packed: Pointer,
    row: Callable[[Value], Pointer],
    n_rows: Value,
    *,
    width: int,
    vectors: int,
) -> None:
    """Transpose rows of f32 into groups; lanes past `n_rows` repeat the last row."""
    lanes = k.target.lanes
    group = vectors * lanes
    with k.loop(0, round_up(k, n_rows, group), lanes) as first:
        sources = [row(k.minimum(first + i, n_rows - 1)) for i in range(lanes)]
        to = packed.at(first // group * (group * width) + first % group)
        with k.loop(0, width, lanes) as column:
            loaded = [p.at(column).load(f32 * lanes) for p in sources]
            for i, v in enumerate(transpose(k, loaded)):
                to.at((column + i) * group).store(v)


def multiply_keys(
    k: Kernel,
    s: Pointer,
    packed: Pointer,
    keys: Pointer,
    n_rows: Value,
    n_keys: Value,
    *,
    width: int,
    block_rows: int,
) -> None:
    """s[key][row] = sum over columns of keys[key][column] * q[row][column].

    Whole register tiles are computed: keys past `n_keys` give numbers that nobody reads.
    """
    m, lanes = micro(k, block_rows), k.target.lanes
    group, part = m.vectors * lanes, part_width(width)
    with k.loop(0, n_keys, m.keys) as key:
        with k.loop(0, n_rows, group) as row:
            totals = s.at(key * block_rows + row)
            for i in range(0, m.keys * block_rows, block_rows):
                for v in range(0, group, lanes):
                    totals.at(i + v).store(k.zeros(f32 * lanes))
            with k.loop(0, width, part) as first:
                sums = key_sums(
                    k,
                    packed.at(row * width + first * group),
                    keys.at(key * width + first),
                    m,
                    width=width,
                    part=part,
                )
                for i, acc in enumerate(sums):
                    for v, total in enumerate(acc):
                        at = totals.at(i * block_rows + v * lanes)
                        at.store(at.load(f32 * lanes) + total.get())


def part_width(width: int) -> int:
    """Columns summed in one accumulator before it is added up: long plain sums lose digits."""
    return next(n for n in PARTS if width % n == 0)


def key_sums(
    k: Kernel, q: Pointer, keys: Pointer, m: Micro, *, width: int, part: int
) -> list[list[Var]]:
    """[key][vector of rows] sums over `part` columns, a register tile."""
    lanes, unroll = k.target.lanes, 4
    group = m.vectors * lanes
    sums = [[k.var(k.zeros(f32 * lanes)) for _ in range(m.vectors)] for _ in range(m.keys)]
    with k.loop(0, part, unroll) as column:
        for u in range(unroll):
            at = q.at((column + u) * group)
            vectors = [at.at(v * lanes).load(f32 * lanes) for v in range(m.vectors)]
            for i, acc in enumerate(sums):
                value = k.splat(keys.at(i * width + u).at(column)[0], lanes)
                for total, vector in zip(acc, vectors, strict=True):
                    total += vector * value
    return sums


def add_values(
    k: Kernel,
    o: Pointer,
    s: Pointer,
    values: Pointer,
    keep: Pointer,
    n_rows: Value,
    n_keys: Value,
    *,
    width: int,
    pitch: int,
    block_rows: int,
) -> None:
    """o[row][column] = o * keep[row] + sum over keys of s[key][row] * values[key][column]."""
    m, lanes = micro(k, block_rows, width), k.target.lanes
    panel = m.columns * lanes
    with k.loop(0, width, panel) as column:
        with k.loop(0, n_rows, m.rows) as row:
            at = [o.at((row + i) * width + column) for i in range(m.rows)]
            sums = []
            for i, start in enumerate(at):
                factor = k.splat(keep[row + i], lanes)
                sums.append(
                    [
                        k.var(start.at(v * lanes).load(f32 * lanes) * factor)
                        for v in range(m.columns)
                    ]
                )
            with k.loop(0, n_keys) as key:
                source = values.at(key * pitch + column)
                vectors = [source.at(v * lanes).load(f32 * lanes) for v in range(m.columns)]
                weights = s.at(key * block_rows + row)
                for i, acc in enumerate(sums):
                    weight = k.splat(weights[i], lanes)
                    for total, vector in zip(acc, vectors, strict=True):
                        total += vector * weight
            for start, acc in zip(at, sums, strict=True):
                for v, total in enumerate(acc):
                    start.at(v * lanes).store(total.get())
