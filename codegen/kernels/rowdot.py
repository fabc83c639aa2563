"""Matrix times few vectors: weight rows are streamed at memory speed, and each is decoded once.

Rows come in groups of as many as a register has lanes. Codes are turned so that lane = row
(interleave.py) and meet the activations at once; sums are added up in the same order as those of
panel.py, so that a token's result does not depend on how many there are. Float rows are read one
by one, each with a register of sums of its own, and these are added up for a whole group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.dtypes import f16, f32, i8, i32, i64, u16
from codegen.formats import BlockFormat
from codegen.kernels import repacked
from codegen.kernels.blocks import BLOCK, block_at, load_block
from codegen.kernels.interleave import COLUMNS, code_groups, copy_scales
from codegen.values import Pointer, Value
from codegen.vecmath import transpose_sum

if TYPE_CHECKING:
    from codegen.builder import Kernel

CHAINS = 2
TOGETHER = 8  # tokens that share what it takes to decode
AHEAD_BYTES = 16384  # how far memory is asked for before it is used
LEAD = 8  # codes: blocks between the copy of a scale and its use
# Asked for by software no memory is faster than the first-level cache has buffers for requests; by
# walking on in order, the prefetches make the hardware's own prefetcher of this level run ahead.
L2 = 2
Store = Callable[[Value, Value], None]  # (token, sums of some rows for it)
# Block -> (codes of all rows of a group, per 4 columns; their scales), lane = row.
BlockReader = Callable[[Value], tuple[list[Value], Value]]


@dataclass(frozen=True)
class Stream:
    """A group of rows, and the address of the group that is read after it."""

    first: Pointer
    n_rows: Value | int  # 1 .. lanes
    following: Pointer

    def at_most(self, k: Kernel, i: int) -> Value | int:
        """Row i, or the last one for those behind it."""
        return i if isinstance(self.n_rows, int) else k.minimum(i, self.n_rows - 1)


@contextmanager
def tiles_ahead(k: Kernel, n: Any) -> Iterator[tuple[Value, Value]]:
    """Tiles of range(n) as `k.tiles` hands them out, each with the one this thread has after it;
    behind the last tile that is the last one again. So what comes next can be asked for."""
    counter, n = k.counter(), k.const(n, i64)
    tile = k.var(k.fetch_add(counter, 1))
    with k.when((tile.get() < n) & k.cancelled().eq(0)):
        with k.repeat_while() as go_on:
            following = k.fetch_add(counter, 1)
            yield tile.get(), k.minimum(following, n - 1)
            tile.set(following)
            go_on((following < n) & k.cancelled().eq(0))


def group_size(k: Kernel, first: Value, n_rows: int) -> Value | int:
    """How many of a group's rows there are, from row `first` on."""
    n = k.target.lanes
    return k.minimum(n_rows - first, n) if n_rows % n else n


@dataclass(frozen=True)
class Inputs:
    """Activation rows: a8 for formats with an integer dot, else f32."""

    first: Pointer
    count: Value | int  # 1 .. TOGETHER
    pitch: int
    n_cols: int

    def row(self, t: Value) -> Pointer:
        return self.first.bytes(t * self.pitch)


def few_dots(
    k: Kernel,
    fmt: BlockFormat,
    rows: Stream,
    x: Pointer,
    n_tokens: Value | int,
    store: Store,
    n_cols: int,
    x_pitch: int,
) -> None:
    """For each token t: store(t, the sums over j of row[j] * x[t][j], one lane per row).

    Lanes from n_rows on hold anything.
    """
    multiply = _code_dots if fmt.integer_dot else _float_dots

    def together(first: Value, count: Value | int) -> None:
        sums = multiply(k, fmt, rows, Inputs(x.bytes(first * x_pitch), count, x_pitch, n_cols))
        _each(k, count, lambda t: store(first + t, sums(t)))

    if isinstance(n_tokens, int):
        for t in range(n_tokens):
            together(k.const(t, i64), 1)
        return
    with k.either(n_tokens.eq(1)) as (one, more):
        with one:
            together(k.const(0, i64), 1)
        with more, k.loop(0, n_tokens, TOGETHER) as first:
            together(first, k.minimum(n_tokens - first, TOGETHER))


def _each(k: Kernel, count: Value | int, do: Callable[[Value], None]) -> None:
    """do(0), do(1), ...: without a loop if there is just one."""
    if count == 1:
        do(k.const(0, i64))
    else:
        with k.loop(0, count) as t:
            do(t)


# -- codes ----------------------------------------------------------------------------------------


def _code_dots(k: Kernel, fmt: BlockFormat, rows: Stream, x: Inputs) -> Callable[[Value], Value]:
    """Multiplies a group with all tokens; returns what gives the sums of one of them."""
    n, n_blocks = k.target.lanes, x.n_cols // BLOCK
    totals = k.stack(f32 * n, 1 if x.count == 1 else TOGETHER).at(0, f32)
    _each(k, x.count, lambda t: totals.at(t * n).store(k.zeros(f32 * n)))
    step = n * fmt.block_bytes
    further = max(0, AHEAD_BYTES // (n_blocks * step) - 1)  # small groups: not the next one
    ahead = rows.following.bytes(further * n_blocks * step)

    def meet(b: Value, groups: list[Value], scale: Value) -> None:
        for line in range(0, step, k.target.cache_line):
            k.prefetch(ahead.bytes(b * step).bytes(line), L2)

        def token(t: Value) -> None:
            place, x_row = totals.at(t * n), x.row(t)
            dot, x_scale = block_dot(k, groups, x_row, b, n_blocks)
            place.store(place.load(f32 * n) + dot.to(f32) * (scale * x_scale))

        _each(k, x.count, token)

    if fmt.interleaved:
        with k.loop(0, n_blocks) as b:
            meet(b, *repacked.load_block(k, fmt, rows.first, b))
    else:
        _turn_blocks(k, fmt, rows, n_blocks, meet)
    return lambda t: totals.at(t * n).load(f32 * n)


def _turn_blocks(
    k: Kernel,
    fmt: BlockFormat,
    rows: Stream,
    n_blocks: int,
    meet: Callable[[Value, list[Value], Value], None],
) -> None:
    """meet(b, codes, scales) for each block of rows that lie one after another, as in the file."""
    n, pitch = k.target.lanes, n_blocks * fmt.block_bytes
    scales = k.stack(u16 * n, n_blocks).at(0, u16)
    starts = [rows.first.bytes(rows.at_most(k, i) * pitch) for i in range(n)]
    lead = min(LEAD, n_blocks)

    def blocks(b: Value) -> list[Pointer]:
        return [row.bytes(b * fmt.block_bytes) for row in starts]

    def turn(b: Value) -> None:
        scale = scales.at(b * n).load(u16 * n).bits_as(f16 * n).to(f32)
        meet(b, code_groups(k, fmt, blocks(b)), scale)

    with k.loop(0, lead) as b:
        copy_scales(k, fmt, blocks(b), scales.at(b * n))
    with k.loop(0, n_blocks - lead) as b:
        copy_scales(k, fmt, blocks(b + lead), scales.at((b + lead) * n))
        turn(b)
    with k.loop(n_blocks - lead, n_blocks) as b:
        turn(b)


def block_dot(
    k: Kernel, groups: list[Value], x: Pointer, b: Value, n_blocks: int
) -> tuple[Value, Value]:
    """(exact dot of each row's block b with the token's, the token's scale)."""
    n, codes = k.target.lanes, x.bytes(b * BLOCK, i32)
    parts = [k.zeros(i32 * n)] * CHAINS
    if k.target.weight_bias:
        parts[0] = k.splat(x.bytes(n_blocks * (BLOCK + 4), i32).at(b).load(), n)
    for g, weights in enumerate(groups):
        spread = k.splat(codes.bytes(COLUMNS * g).load(), n).bits_as(i8 * (COLUMNS * n))
        parts[g % CHAINS] = k.dot_i8(parts[g % CHAINS], weights, spread)
    dot = parts[0]
    for part in parts[1:]:
        dot = dot + part
    return dot, x.bytes(n_blocks * BLOCK, f32).at(b).load()


# -- floats ---------------------------------------------------------------------------------------


def _float_dots(k: Kernel, fmt: BlockFormat, rows: Stream, x: Inputs) -> Callable[[Value], Value]:
    """The same for rows that are decoded to f32."""
    n, pitch = k.target.lanes, fmt.row_bytes(x.n_cols)
    parked = k.stack(f32 * n, n * (1 if x.count == 1 else TOGETHER)).at(0, f32)
    ahead_rows = min(n, -(-AHEAD_BYTES // pitch))
    with k.loop(0, rows.n_rows) as i:
        behind = i + ahead_rows - rows.n_rows
        within = rows.first.bytes((i + ahead_rows) * pitch)
        ahead = k.select_pointer(behind < 0, within, rows.following.bytes(behind * pitch))
        _row_dot(k, fmt, rows.first.bytes(i * pitch), ahead, x, parked.at(i * n))

    def sums(t: Value) -> Value:
        at = parked.at(t * (n * n))
        return transpose_sum(k, [at.at(i * n).load(f32 * n) for i in range(n)])

    return sums


def _row_dot(
    k: Kernel, fmt: BlockFormat, row: Pointer, ahead: Pointer, x: Inputs, totals: Pointer
) -> None:
    """totals[t * lanes^2:] = sums of row[j] * x[t][j], a register each, not yet added up."""
    n, n_blocks = k.target.lanes, x.n_cols // BLOCK
    size, block_bytes = max(8 * n, fmt.size) // BLOCK, fmt.block_bytes * BLOCK // fmt.size
    _each(k, x.count, lambda t: totals.at(t * (n * n)).store(k.zeros(f32 * n)))

    def part(b: Value, count: int) -> None:
        for line in range(0, count * block_bytes, k.target.cache_line):
            k.prefetch(ahead.bytes(b * block_bytes).bytes(line), L2)
        blocks = block_at(fmt, row, b)  # from here on, numbers of blocks are known when building
        weights = [v for i in range(count) for v in load_block(k, fmt, blocks, i)]

        def meet(t: Value) -> None:
            place, at = totals.at(t * (n * n)), x.row(t).cast(f32).at(b * BLOCK)
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
