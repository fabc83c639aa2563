"""Matrix times many vectors: a panel of weight rows is decoded once and meets many tokens.

A panel is two registers' worth of rows, lane = row (layout: panel_decode.py). It is decoded part by
part, and each part stays in the first-level cache while all tokens meet it. Tokens come in tiles;
an activation is broadcast once for both halves of the rows, and a tile's sums stay in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f32, i8, i32, i64
from codegen.formats import BlockFormat
from codegen.kernels.blocks import BLOCK
from codegen.kernels.interleave import COLUMNS, GROUPS
from codegen.kernels.panel_decode import (
    HALVES,
    TOKENS,
    Ask,
    Panel,
    Part,
    Rows,
    decode,
    panel_bytes,
    panel_rows,
    part_blocks,
)
from codegen.kernels.rowdot import Store
from codegen.kernels.stream import L2
from codegen.targets.base import Target
from codegen.values import Pointer, Value, Var

if TYPE_CHECKING:
    from codegen.builder import Kernel

# Decoding goes over each block twice, once per half, and asks for a quarter of the next panel;
# tiles of tokens ask for a sixth each. All at once would hold up what is read meanwhile.
DECODE_SHARES, TILE_SHARES = 8, 6


def token_tiles(target: Target, fmt: BlockFormat) -> tuple[int, ...]:
    """Tile sizes, largest first. Codes need two registers a sum: its integer and its f32 part."""
    per_half = target.registers // (2 * HALVES)
    return (per_half * 3 // 4, 2, 1) if fmt.integer_dot else (per_half, 2, 1)


def multiply_rows(
    k: Kernel,
    fmt: BlockFormat,
    rows: Rows,
    x: Pointer,
    n_tokens: Value,
    store: Store,
    scratch: Pointer,
    *,
    n_cols: int,
    x_pitch: int,
    following: Pointer | None = None,
) -> None:
    """For each token t: store(t, sums over columns of each of the panel's rows * x[t]).

    x rows are `x_pitch` bytes; `scratch` has panel_bytes. While it multiplies, memory is asked for
    the rows of the next panel, at `following`. The sums of rows behind the matrix's last are noise.
    """
    panel, n_blocks, size = (
        Panel(k, fmt, n_cols, scratch),
        n_cols // BLOCK,
        part_blocks(k.target, fmt),
    )
    asker = _Asker(panel, following)
    in_decode, ask = asker.per_block(DECODE_SHARES), asker.per_block(TILE_SHARES)
    if n_blocks <= size:
        zero = k.const(0, i64)
        part = Part(zero, k.const(n_blocks, i64), zero)
        decode(panel, rows, part, in_decode)
        _multiply(panel, part, x, zero, n_tokens, x_pitch, ask, store)
        return
    # The first tokens meet the parts as they are decoded. If there are no others, parts are needed
    # once and take each other's place; the others meet the whole panel.
    few = n_tokens <= TOKENS
    with k.loop(0, k.select(few, k.const(1, i64), 2)) as turn:
        decoding = turn.eq(0)
        count = k.select(decoding, k.minimum(n_tokens, TOKENS), n_tokens - TOKENS)
        step = k.select(decoding, k.const(size, i64), n_blocks)
        with k.loop(0, n_blocks, step) as b:
            part = Part(b, k.minimum(n_blocks - b, step), k.select(few, k.const(0, i64), b))
            with k.when(decoding):
                decode(panel, rows, part, in_decode)
            _multiply(panel, part, x, turn * TOKENS, count, x_pitch, ask, store)


class _Asker:
    """Asks for the next panel's memory, some lines at a time, all in all once."""

    def __init__(self, panel: Panel, following: Pointer | None) -> None:
        self.k, self.following = panel.k, following
        self.n_bytes = panel.n_rows * panel.fmt.row_bytes(panel.n_cols)
        self.n_blocks = panel.n_cols // BLOCK
        self.asked = panel.k.var(panel.k.const(0, i64))

    def per_block(self, shares: int) -> Ask:
        """What to call for each block of columns, so that `shares` passes over them ask for all."""
        k, line = self.k, self.k.target.cache_line
        step = max(1, round(self.n_bytes / (shares * self.n_blocks * line))) * line

        def ask() -> None:
            if self.following is None:
                return
            at = k.minimum(self.asked.get(), max(0, self.n_bytes - step))
            for offset in range(0, step, line):
                k.prefetch(self.following.bytes(at).bytes(offset), L2)
            self.asked.set(self.asked.get() + step)

        return ask


def _multiply(
    panel: Panel,
    part: Part,
    x: Pointer,
    first: Value,
    n_tokens: Value,
    x_pitch: int,
    ask: Ask,
    store: Store,
) -> None:
    """A part meets tokens first .. first + n_tokens - 1; the last part stores their sums."""
    k, n = panel.k, panel.k.target.lanes
    multiply = _multiply_codes if panel.fmt.integer_dot else _multiply_floats
    done = k.var(k.const(0, i64))
    for size in token_tiles(k.target, panel.fmt):
        with k.loop(done.get(), n_tokens - (size - 1), size) as t:
            rows = [x.bytes((first + t + i) * x_pitch) for i in range(size)]
            sums = [[k.var(k.zeros(f32 * n)) for _ in range(HALVES)] for _ in rows]
            with k.when(part.first > 0):
                for i, pair in enumerate(sums):
                    for h, waiting in enumerate(pair):
                        waiting.set(panel.totals(t + i).at(h * n).load(f32 * n))
            multiply(panel, part, rows, sums, ask)
            totals = [k.concat(a.get(), b.get()) for a, b in sums]
            with k.either(part.first + part.count < panel.n_cols // BLOCK) as (more, last):
                with more:
                    for i, total in enumerate(totals):
                        panel.totals(t + i).store(total)
                with last:
                    for i, total in enumerate(totals):
                        store(first + t + i, total)
            done.set(t + size)


def _multiply_codes(
    panel: Panel, part: Part, rows: list[Pointer], sums: list[list[Var]], ask: Ask
) -> None:
    """Per block an exact integer dot, then one scaled add in f32.

    Columns are the outer loop, so that all sums advance side by side and hide each other's latency.
    """
    k, n, n_blocks = panel.k, panel.k.target.lanes, panel.n_cols // BLOCK
    weight_type = k.target.weight_type * (COLUMNS * n)
    with k.loop(0, part.count) as i:
        ask()
        b, codes, scale = part.first + i, panel.codes(part.to + i), panel.scales(part.to + i)
        accs = []
        for row in rows:
            start = k.zeros(i32 * n)
            if k.target.weight_bias:
                start = k.splat(row.bytes(panel.n_cols + 4 * n_blocks, i32).at(b).load(), n)
            accs.append([start] * HALVES)
        for g in range(GROUPS):
            at = codes.at(COLUMNS * HALVES * n * g)
            weights = [at.at(COLUMNS * n * h).load(weight_type) for h in range(HALVES)]
            for row, acc in zip(rows, accs, strict=True):
                four = row.bytes(COLUMNS * g).bytes(b * BLOCK, i32).load()
                spread = k.splat(four, n).bits_as(i8 * (COLUMNS * n))
                for h in range(HALVES):
                    acc[h] = k.dot_i8(acc[h], weights[h], spread)
        scales = [scale.at(h * n).load(f32 * n) for h in range(HALVES)]
        for row, acc, total in zip(rows, accs, sums, strict=True):
            x_scale = row.bytes(panel.n_cols, f32).at(b).load()
            for h in range(HALVES):
                total[h] += acc[h].to(f32) * (scales[h] * x_scale)


def _multiply_floats(
    panel: Panel, part: Part, rows: list[Pointer], sums: list[list[Var]], ask: Ask
) -> None:
    k, n = panel.k, panel.k.target.lanes
    starts = [row.cast(f32).at(part.first * BLOCK) for row in rows]
    with k.loop(0, part.count * BLOCK) as j:
        at = panel.floats(part.to).at(j * panel.n_rows)
        weights = [at.at(h * n).load(f32 * n) for h in range(HALVES)]
        for start, total in zip(starts, sums, strict=True):
            spread = k.splat(start.at(j).load(), n)
            for h in range(HALVES):
                total[h] += weights[h] * spread


__all__ = ["Rows", "multiply_rows", "panel_bytes", "panel_rows", "token_tiles"]
