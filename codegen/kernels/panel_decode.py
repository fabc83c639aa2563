"""Panels of weight rows: how a part of one is decoded, and where that lies in a thread's scratch.

    codes  [block][4 columns at a time][vector][lane][4]  i8 or u8
    scales [block][vector][lane], behind the codes
    floats [column][vector][lane]

Lane = row: vector v holds rows v * lanes, v * lanes + 1, ... of the panel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.dtypes import bf16, f16, f32, u16
from codegen.formats import BlockFormat
from codegen.kernels import repacked
from codegen.kernels.blocks import BLOCK, load_block
from codegen.kernels.interleave import COLUMNS, code_groups, copy_scales, interleave, turn
from codegen.targets.base import Target
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

PART_BYTES = 16384  # what is decoded at a time: it stays in the first-level cache
TOKENS = 512  # tokens whose sums wait in the scratch for the next part; more decode the panel again
Ask = Callable[[int], None]


def vectors(target: Target) -> int:
    """Registers that hold the same columns of all rows of a panel."""
    return target.registers // 8


def panel_rows(target: Target) -> int:
    """Rows of a panel."""
    return vectors(target) * target.lanes


def part_blocks(target: Target, fmt: BlockFormat, n_cols: int) -> int:
    """Blocks of 32 columns that are decoded at a time."""
    block = BLOCK * panel_rows(target) * (1 if fmt.integer_dot else 4)
    return min(PART_BYTES // block, n_cols // BLOCK)


def panel_bytes(target: Target, fmt: BlockFormat, n_cols: int) -> int:
    """Scratch for a part of a panel and, if there are several, for the sums of TOKENS tokens."""
    size = part_blocks(target, fmt, n_cols)
    waiting = TOKENS * panel_rows(target) * 4 if size < n_cols // BLOCK else 0
    return _values_bytes(target, fmt, size) + waiting


def _values_bytes(target: Target, fmt: BlockFormat, n_blocks: int) -> int:
    """Codes, scales and copies of these, or floats."""
    return n_blocks * panel_rows(target) * (BLOCK + 4 + 2 if fmt.integer_dot else 4 * BLOCK)


@dataclass(frozen=True)
class Panel:
    """A panel's scratch; b counts blocks of 32 columns from the first one of the part in it."""

    k: Kernel
    fmt: BlockFormat
    n_cols: int
    base: Pointer

    @property
    def n_rows(self) -> int:
        return panel_rows(self.k.target)

    @property
    def size(self) -> int:
        """Blocks of a part."""
        return part_blocks(self.k.target, self.fmt, self.n_cols)

    def codes(self, b: Value) -> Pointer:
        return self.base.bytes(b * (BLOCK * self.n_rows), self.k.target.weight_type)

    def scales(self, b: Value) -> Pointer:
        return self.base.bytes(self.size * self.n_rows * BLOCK, f32).at(b * self.n_rows)

    def copies(self, b: Value) -> Pointer:
        """Scales before they are f32."""
        return self.base.bytes(self.size * self.n_rows * (BLOCK + 4), u16).at(b * self.n_rows)

    def floats(self, column: Value) -> Pointer:
        return self.base.cast(f32).at(column * self.n_rows)

    def totals(self, t: Value) -> Pointer:
        """Sums so far of token t."""
        offset = _values_bytes(self.k.target, self.fmt, self.size)
        return self.base.bytes(offset, f32).at(t * self.n_rows)


@dataclass(frozen=True)
class Part:
    """Blocks first .. first + count - 1 of the rows."""

    first: Value
    count: Value


@dataclass(frozen=True)
class Rows:
    """The panel's rows: those of matrix `w` (of n_rows) from row `first` on.

    Rows behind the matrix's last are read as the last one.
    """

    w: Pointer
    first: Value
    n_rows: int

    def vector(self, panel: Panel, v: Value) -> list[Pointer]:
        n, pitch = panel.k.target.lanes, panel.fmt.row_bytes(panel.n_cols)
        found = []
        for i in range(n):
            row = self.first + v * n + i
            if self.n_rows % panel.n_rows:
                row = panel.k.minimum(row, self.n_rows - 1)
            found.append(self.w.bytes(row * pitch))
        return found

    def group(self, panel: Panel, v: Value) -> Pointer:
        """The vector's rows where they are interleaved; n_rows are whole groups."""
        n, pitch = panel.k.target.lanes, panel.fmt.row_bytes(panel.n_cols)
        return self.w.bytes(panel.k.minimum(self.first + v * n, self.n_rows - n) * pitch)


def decode(panel: Panel, rows: Rows, part: Part, ask: Ask) -> None:
    """Decode a part of the rows; `ask` is called for each block."""
    k, fmt = panel.k, panel.fmt
    with k.loop(0, vectors(k.target)) as v:
        if fmt.interleaved:
            _copy_groups(panel, rows.group(panel, v), v, part, ask)
        elif fmt.integer_dot:
            _decode_codes(panel, rows.vector(panel, v), v, part, ask)
        elif fmt.is_quantised:
            _decode_blocks(panel, rows.vector(panel, v), v, part, ask)
        else:
            _decode_floats(panel, rows.vector(panel, v), v, part, ask)
    if fmt.integer_dot and not fmt.interleaved:
        _convert_scales(panel, part)


def _store_codes(panel: Panel, groups: list[Value], v: Value, b: Value) -> None:
    out = panel.codes(b).at(v * (COLUMNS * panel.k.target.lanes))
    for g, codes in enumerate(groups):
        out.at(g * (COLUMNS * panel.n_rows)).store(codes)


def _copy_groups(panel: Panel, group: Pointer, v: Value, part: Part, ask: Ask) -> None:
    k, n = panel.k, panel.k.target.lanes
    with k.loop(0, part.count) as i:
        ask(1)
        groups, scale = repacked.load_block(k, panel.fmt, group, part.first + i)
        _store_codes(panel, groups, v, i)
        panel.scales(i).at(v * n).store(scale)


def _decode_codes(panel: Panel, rows: list[Pointer], v: Value, part: Part, ask: Ask) -> None:
    k, n, fmt = panel.k, panel.k.target.lanes, panel.fmt
    with k.loop(0, part.count) as i:
        ask(1)
        blocks = [row.bytes((part.first + i) * fmt.block_bytes) for row in rows]
        _store_codes(panel, code_groups(k, fmt, blocks), v, i)
        copy_scales(k, fmt, blocks, panel.copies(i).at(v * n))


def _convert_scales(panel: Panel, part: Part) -> None:
    k, n = panel.k, panel.n_rows
    with k.loop(0, part.count) as i:
        copies = panel.copies(i).load(u16 * n)
        panel.scales(i).store(copies.bits_as(f16 * n).to(f32))


def _decode_floats(panel: Panel, rows: list[Pointer], v: Value, part: Part, ask: Ask) -> None:
    k, n, source = panel.k, panel.k.target.lanes, panel.fmt.fields[0].type
    per_chunk = 16 // source.nbytes
    chunks = BLOCK // per_chunk
    with k.loop(0, part.count) as b:
        ask(1)
        with k.loop(b * chunks, (b + 1) * chunks) as c:
            values = []
            for w in interleave(k, rows, (part.first * chunks + c) * 16):
                if source == f32:
                    values.append(w.bits_as(f32 * n))
                else:
                    halves = [(w & 0xFFFF).to(u16), (w >> 16).to(u16)]
                    values += [h.bits_as(_stored(source, n)).to(f32) for h in halves]
            for i, value in enumerate(values):
                panel.floats(c * per_chunk + i).at(v * n).store(value)


def _decode_blocks(panel: Panel, rows: list[Pointer], v: Value, part: Part, ask: Ask) -> None:
    """Formats that have no integer dot, as f32."""
    k, n = panel.k, panel.k.target.lanes
    with k.loop(0, part.count) as i:
        ask(1)
        blocks = [load_block(k, panel.fmt, row, part.first + i) for row in rows]
        for column in range(0, BLOCK, 4):
            vector, lane = divmod(column, n)
            fours = [block[vector].lanes(lane, lane + 4) for block in blocks]
            for j, value in enumerate(turn(k, fours)):
                panel.floats(i * BLOCK + column + j).at(v * n).store(value)


def _stored(source: Any, n: int) -> Any:
    return (bf16 if source == bf16 else f16) * n
