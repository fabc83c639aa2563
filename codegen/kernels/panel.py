"""Matrix times many vectors: a panel of weight rows is decoded once and meets many tokens.

A panel is a few registers' worth of rows, lane = row (layout: panel_decode.py). It is decoded part
by part, and each part stays in the first-level cache while all tokens meet it. Tokens come in
tiles; an activation is broadcast once for all rows, and a tile's sums stay in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f32, i8, i32, i64
from codegen.formats import BlockFormat
from codegen.kernels.activations import block_numbers, load_start, scaled
from codegen.kernels.blocks import BLOCK
from codegen.kernels.interleave import COLUMNS, GROUPS
from codegen.kernels.panel_decode import (
    TOKENS,
    Ask,
    Panel,
    Part,
    Rows,
    decode,
    panel_bytes,
    panel_rows,
    vectors,
)
from codegen.kernels.rowdot import Store
from codegen.kernels.stream import L1, L2
from codegen.targets.base import Target
from codegen.values import Pointer, Value, Var
from codegen.vecmath import join

if TYPE_CHECKING:
    from codegen.builder import Kernel

TILE_LINES = 2  # lines asked for per block of a tile; where a register of rows is decoded, one


def token_tiles(target: Target, fmt: BlockFormat) -> tuple[int, ...]:
    """Tile sizes, largest first: what was fastest with as many registers.

    Codes need two registers a sum, its integer and its f32 part.
    """
    many = target.registers > 16
    if fmt.integer_dot:
        return (4 if many else 3, 2, 1)
    return (6 if many else 4, 2, 1)


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
    panel, n_blocks = Panel(k, fmt, n_cols, scratch), n_cols // BLOCK
    ask = _ahead(panel, following, n_tokens)
    with k.loop(0, n_tokens, TOKENS) as first, k.loop(0, n_blocks, panel.size) as b:
        part = Part(b, k.minimum(n_blocks - b, panel.size))
        decode(panel, rows, part, ask)
        _multiply(panel, part, x, first, k.minimum(n_tokens - first, TOKENS), x_pitch, ask, store)


def _ahead(panel: Panel, following: Pointer | None, n_tokens: Value) -> Ask:
    """What asks for the next panel's memory, all in all once and evenly: more at a time would hold
    up what is read meanwhile. To be called for each block that is decoded or multiplied."""
    if following is None:
        return lambda _: None
    k, line, there = panel.k, panel.k.target.cache_line, following
    n_bytes = panel.n_rows * panel.fmt.row_bytes(panel.n_cols)
    tiles = n_tokens // token_tiles(k.target, panel.fmt)[0]
    times = (vectors(k.target) + tiles * TILE_LINES) * (panel.n_cols // BLOCK)
    n_lines = (n_bytes // line + times) // times
    asked = k.var(k.const(0, i64))

    def ask(share: int) -> None:
        with k.when(asked.get() < n_bytes), k.loop(0, n_lines * share):
            k.prefetch(there.bytes(asked.get()), L2)
            asked.set(asked.get() + line)

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
    k, n, columns = panel.k, panel.k.target.lanes, range(vectors(panel.k.target))
    multiply = _multiply_codes if panel.fmt.integer_dot else _multiply_floats
    done = k.var(k.const(0, i64))
    for size in token_tiles(k.target, panel.fmt):
        with k.loop(done.get(), n_tokens - (size - 1), size) as t:
            rows = [x.bytes((first + t + i) * x_pitch) for i in range(size)]
            sums = [[k.var(k.zeros(f32 * n)) for _ in columns] for _ in rows]
            with k.when(part.first > 0):
                for i, row_sums in enumerate(sums):
                    for v, waiting in enumerate(row_sums):
                        waiting.set(panel.totals(t + i).at(v * n).load(f32 * n))
            multiply(panel, part, rows, x_pitch, sums, ask)
            totals = [join(k, [v.get() for v in row_sums]) for row_sums in sums]
            with k.either(part.first + part.count < panel.n_cols // BLOCK) as (more, last):
                with more:
                    for i, total in enumerate(totals):
                        panel.totals(t + i).store(total)
                with last:
                    for i, total in enumerate(totals):
                        store(first + t + i, total)
            done.set(t + size)


def _multiply_codes(
    panel: Panel, part: Part, rows: list[Pointer], x_pitch: int, sums: list[list[Var]], ask: Ask
) -> None:
    """Per block an exact integer dot, then one scaled add in f32.

    Columns are the outer loop, so that all sums advance side by side and hide each other's latency.
    """
    k, n = panel.k, panel.k.target.lanes
    weight_type, columns = k.target.weight_type * (COLUMNS * n), range(vectors(k.target))
    for row in rows:  # what belongs to the next tile's codes; the codes are asked for below
        for at in block_numbers(row.bytes(x_pitch * len(rows)), panel.n_cols, part.first):
            k.prefetch(at, L1)
    with k.loop(0, part.count) as i:
        ask(TILE_LINES)
        b, codes, accs = part.first + i, panel.codes(i), []
        for row in rows:
            k.prefetch(row.bytes(x_pitch * len(rows)).bytes(b * BLOCK), L1)  # the next tile's
            accs.append([load_start(row, panel.n_cols, b) for _ in columns])
        for g in range(GROUPS):
            at = codes.at(COLUMNS * panel.n_rows * g)
            weights = [at.at(COLUMNS * n * v).load(weight_type) for v in columns]
            for row, acc in zip(rows, accs, strict=True):
                four = row.bytes(COLUMNS * g).bytes(b * BLOCK, i32).load()
                spread = k.splat(four, n).bits_as(i8 * (COLUMNS * n))
                for v in columns:
                    acc[v] = k.dot_i8(acc[v], weights[v], spread)
        scales = [panel.scales(i).at(v * n).load(f32 * n) for v in columns]
        for row, acc, total in zip(rows, accs, sums, strict=True):
            for v in columns:
                total[v] += scaled(acc[v], row, panel.n_cols, b) * scales[v]


def _multiply_floats(
    panel: Panel, part: Part, rows: list[Pointer], x_pitch: int, sums: list[list[Var]], ask: Ask
) -> None:
    k, n = panel.k, panel.k.target.lanes
    with k.loop(0, part.count) as i:
        ask(TILE_LINES)
        for row in rows:
            ahead = row.bytes(x_pitch * len(rows), f32).at((part.first + i) * BLOCK)
            for line in range(0, 4 * BLOCK, k.target.cache_line):
                k.prefetch(ahead.bytes(line), L1)
        with k.loop(i * BLOCK, (i + 1) * BLOCK) as j:
            at = panel.floats(j)
            weights = [at.at(v * n).load(f32 * n) for v in range(vectors(k.target))]
            for row, total in zip(rows, sums, strict=True):
                spread = k.splat(row.cast(f32).at(part.first * BLOCK + j).load(), n)
                for v, weight in enumerate(weights):
                    total[v] += weight * spread


__all__ = ["Rows", "multiply_rows", "panel_bytes", "panel_rows", "token_tiles"]
