"""Micro-GEMMs over 16-bit codes in a thread's own scratch: what attention spends its time in.

Numbers are codes times a scale: of q one per row and slab of columns, of a key or value one per
cache row, of a weight one per row and tile. Products of codes are summed exactly, in pairs, in i32:
`Codes` says over how many columns and keys that cannot overflow. A pair fills a lane.

    packed[slab][group][column pair][term][lane]    pack_queries: row = lanes * group + lane
    s[key][row] += scale[row] K q^T                 multiply_keys: pairs of columns
    o[row][column] = o keep + scale P V             add_values: pairs of neighbouring keys
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i16, i32
from codegen.kernels.encode import inverse_of
from codegen.kernels.tile import round_up, row_bounds, transpose
from codegen.values import Pointer, Value, Var
from codegen.vecmath import round_to_int

if TYPE_CHECKING:
    from codegen.builder import Kernel

LARGEST_SUM = 2**31 - 1
LARGEST_CODE = 32767
SLAB_CODES = 10240  # a slab of a block's q stays in the L1 cache beside a few keys


@dataclass(frozen=True)
class Codes:
    """Codes of cached rows: magnitudes up to `largest`.

    `spread`: how large a code of q can be at least if all of its slab are alike; the smaller, the
    longer the slabs. q is `terms` codes, each one a fraction of the one before. A pair of columns
    are neighbours, which i16 vectors are made of as they come, or a vector's lanes `apart`, which
    is what two i32 vectors combine to.
    """

    largest: int
    spread: int
    terms: int = 1
    apart: bool = False

    @property
    def budget(self) -> int:
        """How much the magnitudes of what they meet may add up to."""
        return LARGEST_SUM // self.largest

    def slabs(self, width: int, block_rows: int) -> list[tuple[int, int]]:
        """(first column, width): equal parts of a row, multiples of 32."""
        most = max(32, min(self.budget // self.spread, SLAB_CODES // (block_rows * self.terms)))
        slab = next(n for n in range(32 * (most // 32), 0, -32) if width % n == 0)
        return [(first, slab) for first in range(0, width, slab)]

    def finer(self, width: int) -> int:
        """How often the next term's codes go into one of this term's, in a slab of this width."""
        return min(2 * LARGEST_CODE, 2 * self.budget // width) // 2 * 2 - 2

    def keys_per_sum(self, tile_keys: int) -> int:
        """Keys whose weighted values are added up in i32: so few that weights keep 12 bits."""
        n = tile_keys
        while n > 16 and self.budget // n < 4096:
            n //= 2
        return n


@dataclass(frozen=True)
class Micro:
    """Register tiles: `keys` x `vectors` of rows for scores, `rows` x `columns` (vectors) for o."""

    keys: int
    vectors: int
    rows: int
    columns: int


def micro(k: Kernel, block_rows: int, terms: int = 1, d_v: int = 32) -> Micro:
    """16 accumulators, or 8 where there are 16 registers: both hide what a dot product takes."""
    many, lanes = k.target.registers >= 32, k.target.lanes
    vectors = max(1, min(4 if many else 2, block_rows // lanes) // terms)
    columns = 4 if many and d_v // lanes % 4 == 0 else 2
    return Micro((16 if many else 8) // (vectors * terms), vectors, 4, columns)


def pair_up(low: Value, high: Value) -> Value:
    """Codes low[j] and high[j] side by side in i32 lane j."""
    return (low & 0xFFFF) | (high << 16)


def round_pairs(k: Kernel, low: Value, high: Value, inverse: Value) -> Value:
    """The same of numbers in units of 1 / inverse."""
    a, b = (round_to_int(k, v * inverse) for v in (low, high))
    return pair_up(a, b)


def column_pairs(codes: list[Value]) -> list[Value]:
    """Codes of a row in order (codes.RowCodes) as pairs of columns."""
    if codes[0].type.scalar == i32:
        return [pair_up(low, high) for low, high in zip(codes[::2], codes[1::2], strict=True)]
    return [v.bits_as(i32 * (v.type.lanes // 2)) for v in codes]


def key_pairs(k: Kernel, first: list[Value], second: list[Value]) -> list[Value]:
    """Codes of two rows in order as pairs of rows; i16 codes come in the order of `interleave`."""
    both = list(zip(first, second, strict=True))
    if first[0].type.scalar == i32:
        return [pair_up(a, b) for a, b in both]
    return [v for a, b in both for v in interleave(k, a, b)]


def query_pairs(
    k: Kernel, values: list[Value], inverse: Value, codes: Codes, width: int
) -> list[Value]:
    """round(values * inverse) and then, per term, what rounding left times `finer`, rounded: two
    f32 vectors in order become pairs of columns."""
    found, rest = [], [v * inverse for v in values]
    for _ in range(codes.terms):
        whole = [round_to_int(k, v) for v in rest]
        finer = float(codes.finer(width))
        rest = [(v - c.to(f32)) * finer for v, c in zip(rest, whole, strict=True)]
        if not codes.apart:
            whole = [k.concat(whole[0].to(i16), whole[1].to(i16))]
        found += column_pairs(whole)
    return found


def pack_queries(
    k: Kernel,
    packed: Pointer,
    scales: Pointer,
    row: Callable[[Value], Pointer],
    n_rows: Value,
    *,
    codes: Codes,
    width: int,
    block_rows: int,
) -> None:
    """Codes of rows of q, transposed, and their scales [slab][row].

    The magnitudes of a row's slab add up to no more than `codes.budget`. Lanes past `n_rows`
    repeat the last row.
    """
    lanes, slabs = k.target.lanes, codes.slabs(width, block_rows)
    vectors, slab = micro(k, block_rows, codes.terms).vectors, slabs[0][1]
    group, inverses = vectors * lanes, k.stack(f32, lanes)
    with k.loop(0, round_up(n_rows, group), lanes) as first:
        sources = [row(k.minimum(first + i, n_rows - 1)) for i in range(lanes)]
        place = first // group * (group * codes.terms * slab // 2) + first % group
        with k.loop(0, len(slabs)) as s:
            to = packed.at(s * (block_rows * codes.terms * slab // 2) + place)
            scale = query_scale(k, *row_bounds(k, sources, s * slab, slab), slab, codes)
            scales.at(s * block_rows + first).store(scale)
            inverses.store(inverse_of(k, scale))
            with k.loop(0, slab, 2 * lanes) as column:
                rows = []
                for source, inverse in zip(sources, spread(inverses, lanes), strict=True):
                    at = source.at(s * slab + column)
                    both = [at.at(j).load(f32 * lanes) for j in (0, lanes)]
                    rows.append(query_pairs(k, both, inverse, codes, slab))
                for term, pairs in enumerate(zip(*rows, strict=True)):
                    for i, v in enumerate(transpose(k, list(pairs))):
                        to.at(((column // 2 + i) * codes.terms + term) * group).store(v)


def query_scale(k: Kernel, top: Value, total: Value, width: int, codes: Codes) -> Value:
    """The least scale with which a slab's codes keep within the budget and i16; NaN if `total` is.

    Rounding adds at most half a code per column.
    """
    by_sum = total * (1.0001 / (codes.budget - width))
    return k.maximum(top * (1 / (LARGEST_CODE - 1)), by_sum)


def spread(numbers: Pointer, lanes: int) -> list[Value]:
    """`lanes` numbers from memory, each one in all lanes of a vector."""
    return [numbers.k.splat(numbers[i], lanes) for i in range(lanes)]


def multiply_keys(
    k: Kernel,
    s: Pointer,
    packed: Pointer,
    scale: Pointer,
    keys: Pointer,
    n_rows: Value,
    n_keys: Value,
    *,
    codes: Codes,
    width: int,
    pitch: int,
    block_rows: int,
    first: bool,
    ask: Callable[[Value, Value], None],
) -> None:
    """s[key][row] += scale[row] * sum over a slab's columns of keys[key][column] * q[row][column];
    of the `first` slab, s = that.

    `packed` and `keys`, whose rows are `pitch` codes apart, start at the slab's first column. Whole
    register tiles are computed: keys past `n_keys` give numbers that nobody reads. `ask(key, pair)`
    is called in between, to ask for memory needed later.
    """
    m, lanes = micro(k, block_rows, codes.terms), k.target.lanes
    group, n_vectors = m.vectors * lanes, m.vectors * codes.terms
    with k.loop(0, n_keys, m.keys) as key:
        with k.loop(0, n_rows, group) as row:
            sums = [[k.var(k.zeros(i32 * lanes)) for _ in range(n_vectors)] for _ in range(m.keys)]
            q, start = packed.at(row * (codes.terms * width // 2)), keys.at(key * pitch).cast(i32)
            # Not unrolled: LLVM would take the dot products of a chain apart to shorten it.
            with k.loop(0, width // 2) as pair:
                ask(key, pair)
                at = q.at(pair * (codes.terms * group))
                vectors = [at.at(v * lanes).load(i32 * lanes) for v in range(n_vectors)]
                for i, acc in enumerate(sums):
                    add_pairs(k, acc, vectors, start.at(i * (pitch // 2)).at(pair)[0])
            for v in range(m.vectors):
                factor = scale.at(row + v * lanes).load(f32 * lanes)
                for i, acc in enumerate(sums):
                    at = s.at((key + i) * block_rows + row + v * lanes)
                    score = sum_of_terms(acc[v :: m.vectors], codes.finer(width)) * factor
                    at.store(score if first else at.load(f32 * lanes) + score)


def sum_of_terms(terms: list[Var], finer: int) -> Value:
    """The first one + the next one / finer + ..."""
    total = terms[-1].get().to(f32)
    for term in terms[-2::-1]:
        total = term.get().to(f32) + total * (1.0 / finer)
    return total


def add_pairs(k: Kernel, acc: list[Var], vectors: list[Value], pair: Value) -> None:
    """acc += the dot product of each pair in `vectors` with `pair`."""
    lanes = k.target.lanes
    spread = k.splat(pair, lanes).bits_as(i16 * (2 * lanes))
    for total, vector in zip(acc, vectors, strict=True):
        total.set(k.target.dot_i16(k, total.get(), vector.bits_as(i16 * (2 * lanes)), spread))


def add_values(
    k: Kernel,
    o: Pointer,
    weights: Pointer,
    values: Pointer,
    keep: Pointer,
    scale: Pointer,
    n_rows: Value,
    n_pairs: Value,
    *,
    d_v: int,
    block_rows: int,
    pairs_per_sum: int,
    ask: Callable[[Value], None],
) -> None:
    """o[row][column] = o * keep[row] + scale[row] * sum of weights[pair][row] * values[pair].

    For the columns of one register tile, in the order of `key_pairs`; rows of o are d_v long.
    `ask(row)` is called in between, to ask for memory needed later.
    """
    m, lanes = micro(k, block_rows, d_v=d_v), k.target.lanes
    width = m.columns * lanes
    with k.loop(0, n_rows, m.rows) as row:
        ask(row)
        at = [o.at((row + i) * d_v) for i in range(m.rows)]
        factors = [k.splat(scale[row + i], lanes) for i in range(m.rows)]
        kept = [k.var(keep[row + i]) for i in range(m.rows)]
        with k.loop(0, n_pairs, pairs_per_sum) as start:
            sums = [[k.var(k.zeros(i32 * lanes)) for _ in range(m.columns)] for _ in at]
            with k.loop(start, k.minimum(start + pairs_per_sum, n_pairs)) as pair:
                v = values.at(pair * width)
                vectors = [v.at(j * lanes).load(i32 * lanes) for j in range(m.columns)]
                for i, acc in enumerate(sums):
                    add_pairs(k, acc, vectors, weights.at(pair * block_rows + row)[i])
            for place, acc, factor, old in zip(at, sums, factors, kept, strict=True):
                for j, total in enumerate(acc):
                    p = place.at(j * lanes)
                    p.store(p.load(f32 * lanes) * old.get() + total.get().to(f32) * factor)
                old.set(1.0)


def interleave(k: Kernel, a: Value, b: Value) -> tuple[Value, Value]:
    """i16 vectors of two neighbouring keys as pairs, two i32 vectors.

    Pairs stay inside 128-bit groups, which is cheap: the first vector has the first four columns
    of every eight, the second the others; `in_order` undoes it.
    """
    n, lanes = a.type.lanes, a.type.lanes // 2
    masks = [
        [place for g in range(first, n, 8) for i in range(g, g + 4) for place in (i, n + i)]
        for first in (0, 4)
    ]
    low, high = (k.shuffle(a, b, mask).bits_as(i32 * lanes) for mask in masks)
    return low, high


def in_order(k: Kernel, parts: list[Value]) -> list[Value]:
    """Columns of two vectors of `interleave`'s order, in order."""
    (low, high), n = parts, parts[0].type.lanes
    mask = [start + i for g in range(0, n, 4) for start in (g, n + g) for i in range(4)]
    return [k.shuffle(low, high, mask[:n]), k.shuffle(low, high, mask[n:])]


def out_of_order(k: Kernel, parts: list[Value]) -> list[Value]:
    """Columns in order, to two vectors of `interleave`'s order."""
    (first, second), n = parts, parts[0].type.lanes
    masks = [[g + i for g in range(start, 2 * n, 8) for i in range(4)] for start in (0, 4)]
    return [k.shuffle(first, second, mask) for mask in masks]
