"""Matrix times many vectors: a panel of weight rows is decoded once and meets many tokens.

A panel is two registers' worth of rows. Decoded, it lies in this thread's scratch so that one
register holds the same 4 codes (or the same value) of half its rows: lane = row. Tokens then come
in tiles; each activation is broadcast once for both halves, and a tile's sums stay in registers.

    codes  [block][4 columns at a time][half][lane][4]  i8 or u8, then  scales [block][half][lane]
    floats [column][half][lane]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from codegen.dtypes import bf16, f16, f32, i8, i32, i64, u16
from codegen.formats import BlockFormat
from codegen.kernels import repacked
from codegen.kernels.blocks import BLOCK, load_block
from codegen.kernels.interleave import COLUMNS, GROUPS, code_groups, interleave, turn
from codegen.kernels.rowdot import L2, Store
from codegen.targets.base import Target
from codegen.values import Pointer, Value, Var

if TYPE_CHECKING:
    from codegen.builder import Kernel

HALVES = 2
ASK_TILES = 4  # tiles of tokens during which the next panel is asked for


def panel_rows(target: Target) -> int:
    """Rows of a panel."""
    return HALVES * target.lanes


def panel_bytes(target: Target, fmt: BlockFormat, n_cols: int) -> int:
    """Scratch for one decoded panel: codes and scales, or plain f32."""
    n = panel_rows(target)
    return n_cols * n + n_cols // BLOCK * n * 4 if fmt.integer_dot else n_cols * n * 4


def token_tiles(target: Target, fmt: BlockFormat) -> tuple[int, ...]:
    """Tile sizes, largest first. Codes need two registers a sum: its integer and its f32 part."""
    per_half = target.registers // (2 * HALVES)
    return (per_half * 3 // 4, 2, 1) if fmt.integer_dot else (per_half, 2, 1)


# -- decoding -----------------------------------------------------------------------------------


def decode_panel(
    k: Kernel,
    fmt: BlockFormat,
    w: Pointer,
    row0: Value,
    panel: Pointer,
    *,
    n_rows: int,
    n_cols: int,
) -> None:
    """Decode rows row0 .. row0 + panel_rows - 1 of a weight matrix into `panel`.

    Rows behind the last are read as the last one; their sums are not stored.
    """
    n, pitch = k.target.lanes, fmt.row_bytes(n_cols)
    if fmt.interleaved:
        with k.loop(0, HALVES) as half:
            first = k.minimum(row0 + half * n, n_rows - n)  # n_rows: whole groups
            scales = panel.bytes(n_cols * panel_rows(k.target), f32).at(half * n)
            codes = panel.bytes(half * (4 * n), k.target.weight_type)
            group = w.bytes(first * pitch)
            repacked.decode_group(
                k, fmt, group, codes, scales, n_cols=n_cols, step=panel_rows(k.target)
            )
        return
    decode = _decode_floats
    if fmt.is_quantised:
        decode = _decode_codes if fmt.integer_dot else _decode_blocks
    with k.loop(0, HALVES) as half:
        rows = []
        for i in range(n):
            row = row0 + half * n + i
            if n_rows % panel_rows(k.target):
                row = k.minimum(row, n_rows - 1)
            rows.append(w.bytes(row * pitch))
        decode(k, fmt, rows, panel, half, n_cols)
    if fmt.integer_dot:
        _convert_scales(k, panel, n_cols)


def _decode_codes(
    k: Kernel, fmt: BlockFormat, rows: list[Pointer], panel: Pointer, half: Value, n_cols: int
) -> None:
    n, all_rows = k.target.lanes, panel_rows(k.target)
    copies = _scale_copies(k, panel, n_cols).at(half * n)
    with k.loop(0, n_cols // BLOCK) as b:
        blocks = [row.bytes(b * fmt.block_bytes) for row in rows]
        out = panel.bytes(b * (BLOCK * all_rows), k.target.weight_type).at(half * (COLUMNS * n))
        for g, codes in enumerate(code_groups(k, fmt, blocks)):
            out.at(g * (COLUMNS * all_rows)).store(codes)
        for i, block in enumerate(blocks):
            d = block.bytes(fmt.field_offset("d"), u16)
            copies.at(b * all_rows)[i] = d.load()


def _scale_copies(k: Kernel, panel: Pointer, n_cols: int) -> Pointer:
    """Where a panel's scales lie before they are f32: in the second half of the f32 ones' place.

    Copied one by one and converted later: inserting 16 bits into a register costs more than codes.
    """
    n, n_blocks = panel_rows(k.target), n_cols // BLOCK
    return panel.bytes(n_cols * n + n_blocks * n * 2, u16)


def _convert_scales(k: Kernel, panel: Pointer, n_cols: int) -> None:
    """f16 to f32; going up, no f32 reaches a copy that is still to be read."""
    n = panel_rows(k.target)
    copies, scales = _scale_copies(k, panel, n_cols), panel.bytes(n_cols * n, f32)
    with k.loop(0, n_cols // BLOCK) as b:
        halves = copies.at(b * n).load(u16 * n).bits_as(f16 * n)
        scales.at(b * n).store(halves.to(f32))


def _decode_floats(
    k: Kernel, fmt: BlockFormat, rows: list[Pointer], panel: Pointer, half: Value, n_cols: int
) -> None:
    n, source = k.target.lanes, fmt.fields[0].type
    per_chunk = 16 // source.nbytes
    out = panel.cast(f32).at(half * n)
    with k.loop(0, n_cols // per_chunk) as c:
        values = []
        for v in interleave(k, rows, c * 16):
            if source == f32:
                values.append(v.bits_as(f32 * n))
            else:
                halves = [(v & 0xFFFF).to(u16), (v >> 16).to(u16)]
                values += [h.bits_as(_stored(source, n)).to(f32) for h in halves]
        for i, value in enumerate(values):
            out.at((c * per_chunk + i) * panel_rows(k.target)).store(value)


def _decode_blocks(
    k: Kernel, fmt: BlockFormat, rows: list[Pointer], panel: Pointer, half: Value, n_cols: int
) -> None:
    """Formats that have no integer dot, as f32."""
    n, all_rows = k.target.lanes, panel_rows(k.target)
    out = panel.cast(f32).at(half * n)
    with k.loop(0, n_cols // BLOCK) as b:
        blocks = [load_block(k, fmt, row, b) for row in rows]
        for column in range(0, BLOCK, 4):
            part, lane = divmod(column, n)
            fours = [block[part].lanes(lane, lane + 4) for block in blocks]
            for j, value in enumerate(turn(k, fours)):
                out.at((b * BLOCK + column + j) * all_rows).store(value)


def _stored(source: Any, n: int) -> Any:
    return (bf16 if source == bf16 else f16) * n


# -- multiplying --------------------------------------------------------------------------------


def multiply_panel(
    k: Kernel,
    fmt: BlockFormat,
    panel: Pointer,
    x: Pointer,
    n_tokens: Any,
    store: Store,
    *,
    n_cols: int,
    x_pitch: int,
    following: Pointer | None = None,
) -> None:
    """For each token t: store(t, sum over columns of panel * x[t]); x rows are `x_pitch` bytes.

    While it multiplies, memory is asked for the rows of the next panel, at `following`.
    """
    done = k.var(k.const(0, i64))
    ask = _asker(k, fmt, following, n_cols)
    multiply = _multiply_codes if fmt.integer_dot else _multiply_floats
    for size in token_tiles(k.target, fmt):
        last = k.const(n_tokens, i64) - (size - 1)
        with k.loop(done.get(), last, size) as t:
            rows = [x.bytes((t + i) * x_pitch) for i in range(size)]
            totals = [[k.var(k.zeros(f32 * k.target.lanes)) for _ in range(HALVES)] for _ in rows]
            multiply(k, panel, rows, totals, n_cols, ask)
            for i, (first, second) in enumerate(totals):
                store(t + i, k.concat(first.get(), second.get()))
            done.set(t + size)


def _asker(
    k: Kernel, fmt: BlockFormat, following: Pointer | None, n_cols: int
) -> Callable[[], None]:
    """What asks for some more of the next panel's memory, all in all once."""
    if following is None:
        return lambda: None
    line, n_blocks = k.target.cache_line, n_cols // BLOCK
    n_bytes = panel_rows(k.target) * fmt.row_bytes(n_cols)
    step = -(-n_bytes // (ASK_TILES * n_blocks * line)) * line
    asked = k.var(k.const(0, i64))

    def ask() -> None:
        at = k.minimum(asked.get(), max(0, n_bytes - step))
        for offset in range(0, step, line):
            k.prefetch(following.bytes(at).bytes(offset), L2)
        asked.set(asked.get() + step)

    return ask


def _multiply_codes(
    k: Kernel,
    panel: Pointer,
    rows: list[Pointer],
    totals: list[list[Var]],
    n_cols: int,
    ask: Callable[[], None],
) -> None:
    """Per block an exact integer dot, then one scaled add in f32.

    Columns are the outer loop, so that all sums advance side by side and hide each other's latency.
    """
    n, n_blocks = k.target.lanes, n_cols // BLOCK
    weight_type = k.target.weight_type * (4 * n)
    panel_scales = panel.bytes(n_cols * (HALVES * n), f32)
    with k.loop(0, n_blocks) as b:
        ask()
        codes = panel.bytes(b * (BLOCK * HALVES * n), k.target.weight_type)
        accs = []
        for row in rows:
            start = k.zeros(i32 * n)
            if k.target.weight_bias:
                start = k.splat(row.bytes(n_cols + 4 * n_blocks, i32).at(b).load(), n)
            accs.append([start] * HALVES)
        for g in range(GROUPS):
            weights = [codes.at(4 * n * (HALVES * g + h)).load(weight_type) for h in range(HALVES)]
            for row, acc in zip(rows, accs, strict=True):
                four = row.bytes(4 * g).bytes(b * BLOCK, i32).load()
                spread = k.splat(four, n).bits_as(i8 * (4 * n))
                for h in range(HALVES):
                    acc[h] = k.dot_i8(acc[h], weights[h], spread)
        scales = [panel_scales.at((b * HALVES + h) * n).load(f32 * n) for h in range(HALVES)]
        for row, acc, total in zip(rows, accs, totals, strict=True):
            x_scale = row.bytes(n_cols, f32).at(b).load()
            for h in range(HALVES):
                total[h] += acc[h].to(f32) * (scales[h] * x_scale)


def _multiply_floats(
    k: Kernel,
    panel: Pointer,
    rows: list[Pointer],
    totals: list[list[Var]],
    n_cols: int,
    ask: Callable[[], None],
) -> None:
    n = k.target.lanes
    with k.loop(0, n_cols) as j:
        at = panel.cast(f32).at(j * (HALVES * n))
        weights = [at.at(h * n).load(f32 * n) for h in range(HALVES)]
        for row, total in zip(rows, totals, strict=True):
            spread = k.splat(row.cast(f32).at(j).load(), n)
            for h in range(HALVES):
                total[h] += weights[h] * spread
