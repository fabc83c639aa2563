"""f32 micro-GEMMs over slabs in a thread's own scratch, shared by the attention kernels.

Rows of q lie across lanes: `packed` holds them transposed, in groups of one or two vectors, so
that a group times a row of keys needs no horizontal sum. A slab is a few dozen decoded cache rows,
cut to a few dozen columns so that it stays in the L1 cache; "keys" counts its rows.

    packed[group][column][lane]     pack_rows: row of q = group * lanes of a group + lane
    s[key][row] += K q^T            multiply_keys
    o[row][column] = o keep + s^T V add_values
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32
from codegen.values import Pointer, Value, Var
from codegen.vecmath import transpose_max, transpose_sum

if TYPE_CHECKING:
    from codegen.builder import Kernel

UNROLL = 4
Ahead = Callable[[Value, int], None]


def round_up(n: Value, step: int) -> Value:
    """The next multiple of `step`."""
    return (n + (step - 1)) // step * step


def slab_width(*widths: int) -> int:
    """Columns of a slab: 64 or 32, so that it divides all `widths`, which are multiples of 32.

    It also bounds how much is summed in one accumulator before that is added up: one long sum
    over 576 columns loses a digit.
    """
    return 32 if any(width % 64 for width in widths) else 64


def transpose(k: Kernel, rows: list[Value]) -> list[Value]:
    """n vectors of n lanes, rows to columns: swap the off-diagonal parts at each scale."""
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


def row_bounds(
    k: Kernel, rows: list[Pointer], start: Value | int, width: int
) -> tuple[Value, Value]:
    """(largest magnitudes, sums of magnitudes) of `width` columns of as many rows as lanes, one per
    lane. The sum of a row with a NaN is NaN."""
    lanes, at_once = k.target.lanes, max(1, k.target.lanes // 2)
    tops, totals = [], []
    for first in range(0, lanes, at_once):  # half of them: the sums stay in registers
        part = rows[first : first + at_once]
        both = [(k.var(k.zeros(f32 * lanes)), k.var(k.zeros(f32 * lanes))) for _ in part]
        with k.loop(0, width, lanes) as column:
            for row, (top, total) in zip(part, both, strict=True):
                v = k.absolute(row.at(start).at(column).load(f32 * lanes))
                top.set(k.maximum(v, top.get()))
                total += v
        tops += [top.get() for top, _ in both]
        totals += [total.get() for _, total in both]
    return transpose_max(k, tops), transpose_sum(k, totals)


@dataclass(frozen=True)
class Micro:
    """Register tiles: `keys` x `vectors` of rows for scores, `rows` x `columns` (vectors) for o."""

    keys: int
    vectors: int
    rows: int
    columns: int


def micro(k: Kernel, block_rows: int, width: int = 32) -> Micro:
    """Tiles that leave room for the operands, for blocks of q and slabs of `width` columns.

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
    block_rows: int,
) -> None:
    """Transpose rows of f32 into groups; lanes past `n_rows` repeat the last row."""
    lanes = k.target.lanes
    group = micro(k, block_rows).vectors * lanes
    with k.loop(0, round_up(n_rows, group), lanes) as first:
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
    q_width: int,
    block_rows: int,
    ahead: Ahead,
) -> None:
    """s[key][row] += sum over a slab's columns of keys[key][column] * q[row][column].

    `packed` starts at the slab's first column, of `q_width`. Whole register tiles are computed:
    keys past `n_keys` give numbers that nobody reads. `ahead(first, count)` is called between the
    multiplications, `first` going over the numbers of the slab, to ask for memory needed later.
    """
    m, lanes = micro(k, block_rows), k.target.lanes
    group = m.vectors * lanes
    with k.loop(0, n_keys, m.keys) as key:
        with k.loop(0, n_rows, group) as row:
            at = [
                [s.at((key + i) * block_rows + row + v * lanes) for v in range(m.vectors)]
                for i in range(m.keys)
            ]
            sums = [[k.var(k.zeros(f32 * lanes)) for _ in range(m.vectors)] for _ in at]
            q, slab = packed.at(row * q_width), keys.at(key * width)
            with k.loop(0, width, UNROLL) as column:
                ahead(key * width + column * m.keys, UNROLL * m.keys)
                for u in range(UNROLL):
                    vectors = load_vectors(q.at((column + u) * group), lanes, m.vectors)
                    for i, acc in enumerate(sums):
                        add_products(k, acc, vectors, slab.at(i * width + u).at(column)[0])
            for places, acc in zip(at, sums, strict=True):
                for place, total in zip(places, acc, strict=True):
                    place.store(place.load(f32 * lanes) + total.get())


def load_vectors(p: Pointer, lanes: int, count: int) -> list[Value]:
    return [p.at(v * lanes).load(f32 * lanes) for v in range(count)]


def add_products(k: Kernel, acc: list[Var], vectors: list[Value], factor: Value) -> None:
    """acc += vectors * factor."""
    spread = k.splat(factor, k.target.lanes)
    for total, vector in zip(acc, vectors, strict=True):
        total += vector * spread


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
    o_width: int,
    block_rows: int,
) -> None:
    """o[row][column] = o * keep[row] + sum over keys of s[key][row] * values[key][column].

    `o` starts at the slab's first column, of `o_width`. Rows are done four at a time.
    """
    m, lanes = micro(k, block_rows, width), k.target.lanes
    with k.loop(0, width, m.columns * lanes) as column:
        with k.loop(0, n_rows, m.rows) as row:
            at = [o.at((row + i) * o_width + column) for i in range(m.rows)]
            sums = []
            for i, start in enumerate(at):
                factor = k.splat(keep[row + i], lanes)
                sums.append([k.var(v * factor) for v in load_vectors(start, lanes, m.columns)])
            with k.loop(0, n_keys) as key:
                vectors = load_vectors(values.at(key * width + column), lanes, m.columns)
                weights = s.at(key * block_rows + row)
                for i, acc in enumerate(sums):
                    add_products(k, acc, vectors, weights[i])
            for start, acc in zip(at, sums, strict=True):
                for v, total in enumerate(acc):
                    start.at(v * lanes).store(total.get())
