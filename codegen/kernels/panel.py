"""Matrix times many vectors: a panel of weight rows is decoded once and meets many tokens.

A panel is `lanes` rows. Decoded, it lies in this thread's scratch so that one register holds the
same 4 codes (or the same value) of all its rows: lane = row. Tokens then come in tiles; each
activation is broadcast against the panel, and the sums of a tile stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from codegen.dtypes import bf16, f16, f32, i8, i32, i64, u8, u16, u32
from codegen.formats import BlockFormat
from codegen.kernels.blocks import BLOCK
from codegen.kernels.rowdot import code_table, join
from codegen.targets.base import Target
from codegen.values import Pointer, Value
from codegen.vecmath import transpose4

if TYPE_CHECKING:
    from codegen.builder import Kernel

Store = Callable[[Value, Value], None]  # (token, sums of the panel's rows for it)


def panel_bytes(target: Target, fmt: BlockFormat, n_cols: int) -> int:
    """Scratch for one decoded panel: codes and scales, or plain f32."""
    if not fmt.is_quantised:
        return n_cols * target.lanes * 4
    return n_cols * target.lanes + n_cols // BLOCK * target.lanes * 4


def token_tiles(target: Target) -> tuple[int, ...]:
    """Tile sizes, largest first: half the registers hold sums, the rest weights and partials."""
    return (target.registers // 2, 4, 1)


def decode_panel(
    k: Kernel, fmt: BlockFormat, w: Pointer, row0: Value, panel: Pointer, *, n_rows: int, n_cols: int
) -> None:
    """Decode rows row0 .. row0 + lanes - 1 of a weight matrix into `panel`.

    Rows behind the last are read as the last one; their sums are not stored.
    """
    n, pitch = k.target.lanes, fmt.row_bytes(n_cols)
    rows = []
    for i in range(n):
        row = row0 + i if n_rows % n == 0 else k.minimum(row0 + i, n_rows - 1)
        rows.append(w.bytes(row * pitch))
    if fmt.is_quantised:
        _decode_codes(k, fmt, rows, panel, n_cols)
    else:
        _decode_floats(k, fmt, rows, panel, n_cols)


def _interleave(k: Kernel, rows: list[Pointer], offset: Any) -> list[Value]:
    """16 bytes of every row -> 4 vectors of u32; vector j has dword j of row i in lane i."""
    n = k.target.lanes
    loaded = [row.bytes(offset, u32).load(u32 * 4) for row in rows]
    groups = [join(k, [loaded[4 * g + i] for g in range(n // 4)]) for i in range(4)]
    return transpose4(k, groups)


def _decode_codes(
    k: Kernel, fmt: BlockFormat, rows: list[Pointer], panel: Pointer, n_cols: int
) -> None:
    n, bias = k.target.lanes, k.target.weight_bias
    scales = panel.bytes(n_cols * n, f32)
    at = fmt.field_offset("qs")
    with k.loop(0, n_cols // BLOCK) as b:
        block = [row.bytes(b * fmt.block_bytes) for row in rows]
        out = panel.bytes(b * (BLOCK * n), u32)
        first = _interleave(k, block, at)
        if fmt.table or fmt.offset:
            table = code_table(fmt, bias)
            low = [k.target.lookup16(k, table, v.bits_as(u8 * (4 * n)) & 15) for v in first]
            high = [
                k.target.lookup16(k, table, (v >> 4).bits_as(u8 * (4 * n)) & 15) for v in first
            ]
            groups = [v.bits_as(u32 * n) for v in low + high]
        else:
            flip = 0x80808080 if bias else 0
            groups = [v ^ flip for v in first + _interleave(k, block, at + 16)]
        for g, codes in enumerate(groups):
            out.at(g * n).store(codes)
        d = k.undefined(f16 * n)
        for i, p in enumerate(block):
            d = k.insert(d, p.bytes(fmt.field_offset("d"), f16).load(), i)
        scales.at(b * n).store(d.to(f32))


def _decode_floats(
    k: Kernel, fmt: BlockFormat, rows: list[Pointer], panel: Pointer, n_cols: int
) -> None:
    n, source = k.target.lanes, fmt.fields[0].type
    per_chunk = 16 // source.nbytes
    out = panel.cast(f32)
    with k.loop(0, n_cols // per_chunk) as c:
        values = []
        for v in _interleave(k, rows, c * 16):
            if source == f32:
                values.append(v.bits_as(f32 * n))
            else:
                halves = [(v & 0xFFFF).to(u16), (v >> 16).to(u16)]
                values += [h.bits_as(_stored(source, n)).to(f32) for h in halves]
        for i, value in enumerate(values):
            out.at((c * per_chunk + i) * n).store(value)


def _stored(source: Any, n: int) -> Any:
    return (bf16 if source == bf16 else f16) * n


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
) -> None:
    """For each token t: store(t, sum over columns of panel * x[t]); x rows are `x_pitch` bytes."""
    done = k.var(k.const(0, i64))
    multiply = _multiply_codes if fmt.is_quantised else _multiply_floats
    for size in token_tiles(k.target):
        last = k.const(n_tokens, i64) - (size - 1)
        with k.loop(done.get(), last, size) as t:
            rows = x.bytes(t * x_pitch)
            for i, total in enumerate(multiply(k, panel, rows, size, n_cols, x_pitch)):
                store(t + i, total)
            done.set(t + size)


def _multiply_codes(
    k: Kernel, panel: Pointer, x: Pointer, size: int, n_cols: int, x_pitch: int
) -> list[Value]:
    """Sums for `size` tokens: per block an exact integer dot, then one scaled add in f32."""
    n, n_blocks = k.target.lanes, n_cols // BLOCK
    panel_scales = panel.bytes(n_cols * n, f32)
    x_scales, x_sums = n_cols, n_cols + 4 * n_blocks
    totals = [k.var(k.zeros(f32 * n)) for _ in range(size)]
    with k.loop(0, n_blocks) as b:
        codes = panel.bytes(b * (BLOCK * n))
        scale = panel_scales.at(b * n).load(f32 * n)
        groups = [
            codes.bytes(4 * g * n, k.target.weight_type).load(k.target.weight_type * (4 * n))
            for g in range(BLOCK // 4)
        ]
        for first in range(0, size, 4):
            part = range(first, min(first + 4, size))
            accs = []
            for t in part:
                start = x.bytes(t * x_pitch + x_sums, i32).at(b).load()
                accs.append(k.splat(start, n) if k.target.weight_bias else k.zeros(i32 * n))
            for g, weights in enumerate(groups):
                for i, t in enumerate(part):
                    four = x.bytes(t * x_pitch + 4 * g).bytes(b * BLOCK, i32).load()
                    spread = k.splat(four, n).bits_as(i8 * (4 * n))
                    accs[i] = k.dot_i8(accs[i], weights, spread)
            for i, t in enumerate(part):
                x_scale = x.bytes(t * x_pitch + x_scales, f32).at(b).load()
                totals[t] += accs[i].to(f32) * (scale * x_scale)
    return [total.get() for total in totals]


def _multiply_floats(
    k: Kernel, panel: Pointer, x: Pointer, size: int, n_cols: int, x_pitch: int
) -> list[Value]:
    n = k.target.lanes
    totals = [k.var(k.zeros(f32 * n)) for _ in range(size)]
    with k.loop(0, n_cols) as j:
        weights = panel.cast(f32).at(j * n).load(f32 * n)
        for t in range(size):
            totals[t] += weights * x.bytes(t * x_pitch, f32).at(j).load()
    return [total.get() for total in totals]
