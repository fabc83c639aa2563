"""Rows interleaved at load (-rtr): a register reads the same 4 codes of all rows of a group.

Lane = row, so a dot product needs neither shuffles nor horizontal sums, and decoding a panel is
plain loads. A group's block (layout: codegen/formats.py) holds R scales, then its dwords of codes
as vectors of R lanes; R is the target's number of lanes. Per block there is an exact integer dot,
then one scaled add in f32, as in panel.py: few tokens and many get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f16, f32, i8, i32, i64, u8, u16, u32
from codegen.formats import BlockFormat
from codegen.kernel import kernel, ptr, value
from codegen.kernels.activations import scales_offset, sums_offset
from codegen.kernels.blocks import BLOCK
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

GROUPS = BLOCK // 4  # dot products of 4 columns in a block
TOGETHER = 4  # tokens that share a decoded block
AHEAD_BYTES = 4096  # how far memory is asked for before it is used
Store = Callable[[Value, Value], None]  # (token, sums of a group's rows for it)


@kernel(y=ptr(u8), w=ptr(u8), n_groups=value(), n_blocks=value(), per_matrix=value(), pitch=value())
def interleave_rows(
    k: Kernel,
    y: Pointer,
    w: Pointer,
    n_groups: Value,
    n_blocks: Value,
    per_matrix: Value,
    pitch: Value,
    *,
    fmt: BlockFormat,
) -> None:
    """y = the rows of w, interleaved; `fmt` is that of y.

    Rows are `n_blocks` long. Matrices of `per_matrix` groups are `pitch` bytes apart in w and
    dense in y.
    """
    n, dwords = fmt.interleaved, (fmt.block_bytes - fmt.field_offset("qs")) // 4
    row_bytes = n_blocks * fmt.block_bytes
    with k.tiles(n_groups) as group:
        source = w.bytes(group // per_matrix * pitch).bytes(group % per_matrix * n * row_bytes)
        target = y.bytes(group * n * row_bytes)
        with k.loop(0, n_blocks) as b:
            scales, codes = _fields(fmt, target, b)
            for i in range(n):
                block = source.bytes(b * fmt.block_bytes).bytes(row_bytes * i)
                scales.cast(u16)[i] = block.bytes(fmt.field_offset("d"), u16).load()
                four = block.bytes(fmt.field_offset("qs"), u32)
                for j in range(dwords):
                    codes[j * n + i] = four[j]


def _fields(fmt: BlockFormat, group: Pointer, b: Value) -> tuple[Pointer, Pointer]:
    """Where block b of a group has its scales (f16) and its dwords of codes."""
    n = fmt.interleaved
    at = group.bytes(b * (n * fmt.block_bytes))
    return at.bytes(n * fmt.field_offset("d"), f16), at.bytes(n * fmt.field_offset("qs"), u32)


def block_codes(k: Kernel, fmt: BlockFormat, codes: Pointer) -> list[Value]:
    """A block's codes as `dot_i8` wants them: vector g has columns 4 g to 4 g + 3 of every row."""
    n, bias = fmt.interleaved, k.target.weight_bias
    weight_type = k.target.weight_type * (4 * n)
    if not fmt.table and not fmt.offset:
        vectors = [codes.at(g * n).load(u32 * n) for g in range(GROUPS)]
        return [(v ^ (0x80808080 if bias else 0)).bits_as(weight_type) for v in vectors]
    packed = [codes.at(j * n).load(u32 * n) for j in range(GROUPS // 2)]
    nibbles = [(v >> shift).bits_as(u8 * (4 * n)) & 15 for shift in (0, 4) for v in packed]
    table = tuple(v + bias for v in (fmt.table or range(fmt.offset, fmt.offset + 16)))
    return [k.target.lookup16(k, table, index).bits_as(weight_type) for index in nibbles]


# -- few tokens -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Interleaved rows, and the address of what will be read after them."""

    first: Pointer
    following: Pointer


def few_dots(
    k: Kernel, fmt: BlockFormat, group: Group, x: Pointer, n_tokens: Value | int, store: Store,
    n_cols: int, x_pitch: int,
) -> None:  # fmt: skip
    """For each token t: store(t, the sums over j of row[j] * x[t][j], one lane per row).

    A block is decoded once for up to TOGETHER tokens.
    """

    def alone() -> None:
        store(k.const(0, i64), group_dots(k, fmt, group, [x], n_cols)[0])

    def together() -> None:
        with k.loop(0, n_tokens, TOGETHER) as first:
            tokens = [k.minimum(first + i, k.const(n_tokens, i64) - 1) for i in range(TOGETHER)]
            xs = [x.bytes(token * x_pitch) for token in tokens]
            for i, total in enumerate(group_dots(k, fmt, group, xs, n_cols)):
                with k.when(first + i < n_tokens):
                    store(first + i, total)

    if isinstance(n_tokens, int):
        alone() if n_tokens == 1 else together()
        return
    with k.either(n_tokens.eq(1)) as (one, several):
        with one:
            alone()
        with several:
            together()


def group_dots(
    k: Kernel, fmt: BlockFormat, group: Group, xs: Sequence[Pointer], n_cols: int
) -> list[Value]:
    """For each a8 row x: the sums over j of row[j] * x[j], one lane per row of the group."""
    n, n_blocks = fmt.interleaved, n_cols // BLOCK
    block_bytes = n * fmt.block_bytes
    chains = 2 if len(xs) == 1 else 1  # one token alone would wait for each of its dots
    totals = [k.var(k.zeros(f32 * n)) for _ in xs]
    with k.loop(0, n_blocks) as b:
        scales, codes = _fields(fmt, group.first, b)
        _prefetch(k, group, b * block_bytes, n_blocks * block_bytes, block_bytes)
        weights = block_codes(k, fmt, codes)
        d = scales.load(f16 * n).to(f32)
        for x, total in zip(xs, totals, strict=True):
            accs = [k.zeros(i32 * n) for _ in range(chains)]
            if k.target.weight_bias:
                accs[0] = k.splat(x.bytes(sums_offset(n_cols), i32).at(b).load(), n)
            for g, four in enumerate(weights):
                spread = k.splat(x.bytes(4 * g).bytes(b * BLOCK, i32).load(), n)
                at = g % chains
                accs[at] = k.dot_i8(accs[at], four, spread.bits_as(i8 * (4 * n)))
            dot = accs[0] if chains == 1 else accs[0] + accs[1]
            total += dot.to(f32) * (d * x.bytes(scales_offset(n_cols), f32).at(b).load())
    return [total.get() for total in totals]


def _prefetch(k: Kernel, group: Group, at: Value, group_bytes: int, nbytes: int) -> None:
    """Ask for as much as a block, some way ahead: in this group, or in what follows it."""
    behind = at + (AHEAD_BYTES - group_bytes)
    within = group.first.bytes(at + AHEAD_BYTES)
    ahead = k.select_pointer(behind < 0, within, group.following.bytes(behind))
    for line in range(0, nbytes, k.target.cache_line):
        k.prefetch(ahead.bytes(line), 2)  # into the second level: 7 % faster than into the first


# -- many tokens ----------------------------------------------------------------------------------


def decode_group(
    k: Kernel, fmt: BlockFormat, group: Pointer, codes_out: Pointer, scales_out: Pointer,
    *, n_cols: int, step: int,
) -> None:  # fmt: skip
    """Decode a group into its half of a panel (panel.py), whose vectors are `step` rows apart."""
    n = fmt.interleaved
    with k.loop(0, n_cols // BLOCK) as b:
        scales, codes = _fields(fmt, group, b)
        out = codes_out.at(b * (BLOCK * step))
        for g, four in enumerate(block_codes(k, fmt, codes)):
            out.at(g * (4 * step)).store(four)
        scales_out.at(b * step).store(scales.load(f16 * n).to(f32))


__all__ = ["Group", "decode_group", "few_dots", "interleave_rows"]
