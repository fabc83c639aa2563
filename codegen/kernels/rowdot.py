"""Matrix times few vectors: weight rows are streamed at memory speed, and each is decoded once.

Rows come in groups of as many as a register has lanes, and are read one by one: each has a register
of sums of its own, and these are added up for a whole group. Codes meet activations that were
brought into the order of a row's bytes before (spread.py). Rows that lie interleaved (-rtr) are
read as a group, lane = row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i8, i32, i64
from codegen.formats import BlockFormat
from codegen.kernels import repacked
from codegen.kernels.activations import load_start, scaled
from codegen.kernels.blocks import BLOCK, block_at, load_block
from codegen.kernels.interleave import COLUMNS, code_dwords, unpack_codes
from codegen.kernels.spread import (
    PARTS,
    PIECE,
    TOGETHER,
    Inputs,
    Take,
    blocks_per_step,
    each_step,
    meets_spread_rows,
    pieces,
    scales,
    steps,
)
from codegen.kernels.stream import FAR_BYTES, NEAR_BYTES, Stream, ask
from codegen.values import Pointer, Value
from codegen.vecmath import transpose_sum

if TYPE_CHECKING:
    from codegen.builder import Kernel

CHAINS = 2
DISTANCES = (FAR_BYTES, NEAR_BYTES)
LONG_ROWS, LONG_BYTES = 4, 16384  # of activations: LONG_ROWS share a walk through more than so many
Store = Callable[[Value, Value], None]  # (token, sums of some rows for it)


def few_dots(
    k: Kernel, fmt: BlockFormat, rows: Stream, take: Take, n_tokens: Value | int, store: Store
) -> None:
    """For each token t: store(t, the sums over j of row[j] * x[t][j], one lane per row).

    Lanes from n_rows on hold anything.
    """
    multiply = _float_dots
    if fmt.integer_dot:
        multiply = _spread_dots if meets_spread_rows(fmt) else _group_dots

    def together(first: Value, count: Value | int) -> None:
        sums = multiply(k, fmt, rows, take(fmt, first, count))
        _each(k, count, lambda t: store(first + t, sums(t)))

    zero = k.const(0, i64)
    if isinstance(n_tokens, int):
        for t in range(n_tokens):
            together(zero + t, 1)
        return
    with k.either(n_tokens.eq(1)) as (one, more):
        with one:
            together(zero, 1)
        with more, k.loop(0, n_tokens, TOGETHER) as first:
            together(first, k.minimum(n_tokens - first, TOGETHER))


def _each(k: Kernel, count: Value | int, do: Callable[[Value], None]) -> None:
    """do(0), do(1), ...: without a loop if there is just one."""
    if count == 1:
        do(k.const(0, i64))
    else:
        with k.loop(0, count) as t:
            do(t)


def _capacity(x: Inputs) -> int:
    """Tokens that there is room for."""
    return 1 if x.count == 1 else TOGETHER


# -- interleaved codes ----------------------------------------------------------------------------


def _group_dots(k: Kernel, fmt: BlockFormat, rows: Stream, x: Inputs) -> Callable[[Value], Value]:
    """Multiplies a group with all tokens; returns what gives the sums of one of them."""
    n, n_blocks = k.target.lanes, x.n_cols // BLOCK
    totals = k.stack(f32 * n, _capacity(x)).at(0, f32)
    _each(k, x.count, lambda t: totals.at(t * n).store(k.zeros(f32 * n)))
    step = n * fmt.block_bytes  # to the walk, a group's block is a row
    first = Stream(rows.first, n_blocks, rows.following)
    with k.loop(0, n_blocks) as b:
        far, near = (first.ahead(k, b, distance, step) for distance in DISTANCES)
        ask(k, far, near, k.const(0, i64), step)
        groups, scale = repacked.load_block(k, fmt, rows.first, b)

        def meet(t: Value) -> None:
            place, x_row = totals.at(t * n), x.row(t)
            dot = block_dot(k, groups, x_row, b, x.n_cols)
            place.store(place.load(f32 * n) + dot * scale)

        _each(k, x.count, meet)
    return lambda t: totals.at(t * n).load(f32 * n)


def block_dot(k: Kernel, groups: list[Value], x: Pointer, b: Value, n_cols: int) -> Value:
    """Each row's block b times the token's codes, exact, times the token's scale."""
    n, codes = k.target.lanes, x.bytes(b * BLOCK, i32)
    parts = [load_start(x, n_cols, b), *[k.zeros(i32 * n)] * (CHAINS - 1)]
    for g, weights in enumerate(groups):
        spread = k.splat(codes.bytes(COLUMNS * g).load(), n).bits_as(i8 * (COLUMNS * n))
        parts[g % CHAINS] = k.dot_i8(parts[g % CHAINS], weights, spread)
    dot = parts[0]
    for part in parts[1:]:
        dot = dot + part
    return scaled(dot, x, n_cols, b)


# -- row by row -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row, the rows to ask for meanwhile, and where its sums of token 0 lie."""

    at: Pointer
    far: Pointer
    near: Pointer
    totals: Pointer


def _row_by_row(
    k: Kernel,
    rows: Stream,
    pitch: int,
    x: Inputs,
    dot: Callable[[list[Row]], None],
    together: int = 1,
) -> Pointer:
    """Calls dot for each row, or for some together; returns the sums: token t's of row i lie at
    (t * lanes + i) * lanes."""
    n = k.target.lanes
    parked = k.stack(f32 * n, n * _capacity(x)).at(0, f32)
    with k.loop(0, rows.n_rows, together) as first:
        found = []
        for j in range(together):
            # The last one again where a group has no more: its sums are not read.
            i = k.minimum(first + j, rows.n_rows - 1) if j else first
            far, near = (rows.ahead(k, i, max(d, together * pitch), pitch) for d in DISTANCES)
            found.append(Row(rows.first.bytes(i * pitch), far, near, parked.at((first + j) * n)))
        for row in found:
            _clear(k, row.totals, x.count)
        dot(found)
    return parked


def _clear(k: Kernel, totals: Pointer, count: Value | int) -> None:
    n = k.target.lanes
    _each(k, count, lambda t: totals.at(t * (n * n)).store(k.zeros(f32 * n)))


def _added_up(k: Kernel, parked: Pointer) -> Callable[[Value], Value]:
    n = k.target.lanes

    def sums(t: Value) -> Value:
        at = parked.at(t * (n * n))
        return transpose_sum(k, [at.at(i * n).load(f32 * n) for i in range(n)])

    return sums


def _spread_dots(k: Kernel, fmt: BlockFormat, rows: Stream, x: Inputs) -> Callable[[Value], Value]:
    """Codes: per step an exact integer dot in every lane, scaled and added in f32."""
    n, stride = k.target.lanes, fmt.block_bytes
    qs, halves, bias = fmt.field_offset("qs"), code_dwords(fmt) // 4, k.target.weight_bias

    def decode(row: Row, where: Value, count: int) -> tuple[list[Value], Value]:
        ask(k, row.far, row.near, where, count * stride)
        at = row.at.bytes(where)
        raw = [pieces(k, at, qs + PIECE * j, stride, count) for j in range(halves)]
        return unpack_codes(k, fmt, raw), scales(k, at.bytes(fmt.field_offset("d")), stride, count)

    def dot(together: list[Row]) -> None:
        def step(s: Value, count: int) -> None:
            where = s * (blocks_per_step(k) * stride)
            decoded = [decode(row, where, count) for row in together]

            def meet(t: Value) -> None:
                spread = x.row(t).cast(i32).at(s * (PARTS * n))
                start = spread.at(2 * n).load(i32 * n) if bias else k.zeros(i32 * n)
                parts = [spread.at(j * n).load(i32 * n) for j in range(len(decoded[0][0]))]
                d = spread.at(3 * n).cast(f32).load(f32 * n)
                for row, (codes, scale) in zip(together, decoded, strict=True):
                    acc = start
                    for c, part in zip(codes, parts, strict=True):
                        acc = k.dot_i8(acc, c, part.bits_as(i8 * (4 * n)))
                    place = row.totals.at(t * (n * n))
                    place.store(place.load(f32 * n) + acc.to(f32) * (scale * d))

            _each(k, x.count, meet)

        each_step(k, x.n_cols // BLOCK, step)

    together = LONG_ROWS if steps(k, x.n_cols) * PARTS * 4 * n > LONG_BYTES else 1
    return _added_up(k, _row_by_row(k, rows, fmt.row_bytes(x.n_cols), x, dot, together))


def _float_dots(k: Kernel, fmt: BlockFormat, rows: Stream, x: Inputs) -> Callable[[Value], Value]:
    """The same for rows that are decoded to f32."""

    def dot(together: list[Row]) -> None:
        for row in together:
            _row_dot(k, fmt, row, x)

    return _added_up(k, _row_by_row(k, rows, fmt.row_bytes(x.n_cols), x, dot))


def _row_dot(
    k: Kernel,
    fmt: BlockFormat,
    row: Row,
    x: Inputs,
) -> None:
    """totals[t * lanes^2:] = sums of row[j] * x[t][j], a register each, not yet added up."""
    n, n_blocks = k.target.lanes, x.n_cols // BLOCK
    size, block_bytes = max(8 * n, fmt.size) // BLOCK, fmt.block_bytes * BLOCK // fmt.size

    def part(b: Value, count: int) -> None:
        ask(k, row.far, row.near, b * block_bytes, count * block_bytes)
        blocks = block_at(fmt, row.at, b)  # from here on, numbers of blocks are known when building
        weights = [v for i in range(count) for v in load_block(k, fmt, blocks, i)]

        def meet(t: Value) -> None:
            place, at = row.totals.at(t * (n * n)), x.row(t).cast(f32).at(b * BLOCK)
            products = [w * at.at(i * n).load(f32 * n) for i, w in enumerate(weights)]
            place.store(place.load(f32 * n) + _add_up(products))

        _each(k, x.count, meet)

    whole = n_blocks // size * size
    with k.loop(0, whole, size) as b:
        part(b, size)
    if n_blocks - whole:
        part(k.const(whole, i64), n_blocks - whole)


def _add_up(values: list[Value]) -> Value:
    """Sum as a tree: a chain of additions would be waited for."""
    while len(values) > 1:
        pairs = zip(values[0::2], values[1::2], strict=False)
        values = [a + b for a, b in pairs] + values[len(values) & ~1 :]
    return values[0]
