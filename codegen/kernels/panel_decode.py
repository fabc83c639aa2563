"""Panels of weight rows: where their parts lie in a thread's scratch, and how they are decoded.

    codes  [block][4 columns at a time][half][lane][4]  i8 or u8, then  scales [block][half][lane]
    floats [column][half][lane]

Lane = row: half h holds rows h * lanes, h * lanes + 1, ... of the panel.
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

HALVES = 2
PART_BYTES = 16384  # what is decoded at a time: it stays in the first-level cache
TOKENS = 96  # tokens whose sums wait in the scratch for the next part
Ask = Callable[[], None]


def panel_rows(target: Target) -> int:
    """Rows of a panel."""
    return HALVES * target.lanes


def panel_bytes(target: Target, fmt: BlockFormat, n_cols: int) -> int:
    """Scratch for one panel and for the sums of TOKENS tokens."""
    return _totals_offset(target, fmt, n_cols) + TOKENS * panel_rows(target) * 4


def part_blocks(target: Target, fmt: BlockFormat) -> int:
    """Blocks of 32 columns that are decoded at a time."""
    return PART_BYTES // (BLOCK * panel_rows(target) * (1 if fmt.integer_dot else 4))


def _copies_offset(target: Target, fmt: BlockFormat, n_cols: int) -> int:
    n = panel_rows(target)
    return n_cols * n + n_cols // BLOCK * n * 4 if fmt.integer_dot else n_cols * n * 4


def _totals_offset(target: Target, fmt: BlockFormat, n_cols: int) -> int:
    copies = part_blocks(target, fmt) * panel_rows(target) * 2 if fmt.integer_dot else 0
    return _copies_offset(target, fmt, n_cols) + copies


@dataclass(frozen=True)
class Panel:
    """A panel's scratch; b counts blocks of 32 columns."""

    k: Kernel
    fmt: BlockFormat
    n_cols: int
    base: Pointer

    @property
    def n_rows(self) -> int:
        return panel_rows(self.k.target)

    def codes(self, b: Value) -> Pointer:
        return self.base.bytes(b * (BLOCK * self.n_rows), self.k.target.weight_type)

    def scales(self, b: Value) -> Pointer:
        return self.base.bytes(self.n_cols * self.n_rows, f32).at(b * self.n_rows)

    def floats(self, b: Value) -> Pointer:
        return self.base.cast(f32).at(b * (BLOCK * self.n_rows))

    @property
    def copies(self) -> Pointer:
        """Scales of a part before they are f32."""
        offset = _copies_offset(self.k.target, self.fmt, self.n_cols)
        return self.base.bytes(offset, u16)

    def totals(self, t: Value) -> Pointer:
        """Sums so far of token t."""
        offset = _totals_offset(self.k.target, self.fmt, self.n_cols)
        return self.base.bytes(offset, f32).at(t * self.n_rows)


@dataclass(frozen=True)
class Part:
    """Blocks first .. first + count - 1 of the rows, which lie in the panel from block `to` on."""

    first: Value
    count: Value
    to: Value


@dataclass(frozen=True)
class Rows:
    """The panel's rows: those of matrix `w` (of n_rows) from row `first` on.

    Rows behind the matrix's last are read as the last one.
    """

    w: Pointer
    first: Value
    n_rows: int

    def half(self, panel: Panel, half: Value) -> list[Pointer]:
        n, pitch = panel.k.target.lanes, panel.fmt.row_bytes(panel.n_cols)
        found = []
        for i in range(n):
            row = self.first + half * n + i
            if self.n_rows % panel.n_rows:
                row = panel.k.minimum(row, self.n_rows - 1)
            found.append(self.w.bytes(row * pitch))
        return found

    def group(self, panel: Panel, half: Value) -> Pointer:
        """The half's rows where they are interleaved; n_rows are whole groups."""
        n, pitch = panel.k.target.lanes, panel.fmt.row_bytes(panel.n_cols)
        return self.w.bytes(panel.k.minimum(self.first + half * n, self.n_rows - n) * pitch)


def decode(panel: Panel, rows: Rows, part: Part, ask: Ask) -> None:
    """Decode a part of the rows; `ask` is called for each block."""
    k, fmt = panel.k, panel.fmt
    with k.loop(0, HALVES) as half:
        if fmt.interleaved:
            _copy_groups(panel, rows.group(panel, half), half, part, ask)
        elif fmt.integer_dot:
            _decode_codes(panel, rows.half(panel, half), half, part, ask)
        elif fmt.is_quantised:
            _decode_blocks(panel, rows.half(panel, half), half, part, ask)
        else:
            _decode_floats(panel, rows.half(panel, half), half, part, ask)
    if fmt.integer_dot and not fmt.interleaved:
        _convert_scales(panel, part)


def _store_codes(panel: Panel, groups: list[Value], half: Value, b: Value) -> None:
    out = panel.codes(b).at(half * (COLUMNS * panel.k.target.lanes))
    for g, codes in enumerate(groups):
        out.at(g * (COLUMNS * panel.n_rows)).store(codes)


def _copy_groups(panel: Panel, group: Pointer, half: Value, part: Part, ask: Ask) -> None:
    k, n = panel.k, panel.k.target.lanes
    with k.loop(0, part.count) as i:
        ask()
        groups, scale = repacked.load_block(k, panel.fmt, group, part.first + i)
        _store_codes(panel, groups, half, part.to + i)
        panel.scales(part.to + i).at(half * n).store(scale)


def _decode_codes(panel: Panel, rows: list[Pointer], half: Value, part: Part, ask: Ask) -> None:
    k, n, fmt = panel.k, panel.k.target.lanes, panel.fmt
    with k.loop(0, part.count) as i:
        ask()
        blocks = [row.bytes((part.first + i) * fmt.block_bytes) for row in rows]
        _store_codes(panel, code_groups(k, fmt, blocks), half, part.to + i)
        copy_scales(k, fmt, blocks, panel.copies.at(i * panel.n_rows).at(half * n))


def _convert_scales(panel: Panel, part: Part) -> None:
    k, n = panel.k, panel.n_rows
    with k.loop(0, part.count) as i:
        copies = panel.copies.at(i * n).load(u16 * n)
        panel.scales(part.to + i).store(copies.bits_as(f16 * n).to(f32))


def _decode_floats(panel: Panel, rows: list[Pointer], half: Value, part: Part, ask: Ask) -> None:
    k, n, source = panel.k, panel.k.target.lanes, panel.fmt.fields[0].type
    per_chunk = 16 // source.nbytes
    chunks = BLOCK // per_chunk
    out = panel.floats(part.to).at(half * n)
    with k.loop(0, part.count) as b:
        ask()
        with k.loop(b * chunks, (b + 1) * chunks) as c:
            values = []
            for v in interleave(k, rows, (part.first * chunks + c) * 16):
                if source == f32:
                    values.append(v.bits_as(f32 * n))
                else:
                    halves = [(v & 0xFFFF).to(u16), (v >> 16).to(u16)]
                    values += [h.bits_as(_stored(source, n)).to(f32) for h in halves]
            for i, value in enumerate(values):
                out.at((c * per_chunk + i) * panel.n_rows).store(value)


def _decode_blocks(panel: Panel, rows: list[Pointer], half: Value, part: Part, ask: Ask) -> None:
    """Formats that have no integer dot, as f32."""
    k, n = panel.k, panel.k.target.lanes
    with k.loop(0, part.count) as i:
        ask()
        blocks = [load_block(k, panel.fmt, row, part.first + i) for row in rows]
        out = panel.floats(part.to + i).at(half * n)
        for column in range(0, BLOCK, 4):
            vector, lane = divmod(column, n)
            fours = [block[vector].lanes(lane, lane + 4) for block in blocks]
            for j, value in enumerate(turn(k, fours)):
                out.at((column + j) * panel.n_rows).store(value)


def _stored(source: Any, n: int) -> Any:
    return (bf16 if source == bf16 else f16) * n
