"""The ways to attend to a tile of cells, and which one a kernel takes.

Each is a kind of `Sizes` that knows its own workspace (`space`), how to `pack` rows of q into it,
to fold a tile's listed cells into an open block (`attend`), and to move a row of o (`close_row`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from codegen.formats import CACHE_FORMATS, F32, BlockFormat
from codegen.kernels import attention_f32 as in_f32
from codegen.kernels.attention_block import (
    ABSORBED,
    TILE_KEYS,
    Block,
    Caches,
    Sizes,
    Workspace,
    copy_row,
    decode,
    touch,
    workspace,
)
from codegen.kernels.attention_bytes import ByteSizes, suits_bytes
from codegen.kernels.attention_codes import CodeSizes
from codegen.kernels.attention_row import attend_row
from codegen.kernels.codes import codes_of
from codegen.targets.base import Target
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel


@dataclass(frozen=True)
class ExactSizes(Sizes):
    """Attention in f32."""

    @property
    def tile_keys(self) -> int:
        return TILE_KEYS

    def space(self, k: Kernel, scratch: Pointer) -> Workspace:
        """This thread's part of the scratch memory, as named arrays."""
        return workspace(k, self, scratch)

    def pack(
        self, k: Kernel, w: Workspace, block: Block, q_row: Callable[[Value], Pointer]
    ) -> None:
        """The block's rows of q; `q_row(row)` is the address of one."""
        in_f32.pack_block(k, self, w, block, q_row)

    def attend(
        self,
        k: Kernel,
        w: Workspace,
        block: Block,
        caches: Caches,
        n_keys: Value,
        next_cell: Value,
        scale: float,
    ) -> None:
        """Fold the listed cells into m, l and o of an open block."""
        self.fold(k, w, block.n_rows, n_keys, next_cell, decoded_rows(k, self, caches), scale)

    def fold(
        self,
        k: Kernel,
        w: Workspace,
        n_rows: Value,
        n_keys: Value,
        next_cell: Value,
        rows: in_f32.Rows,
        scale: float,
    ) -> None:
        """The same, with rows from wherever they come."""
        if self.block_rows == 1:
            attend_row(k, self, w, n_keys, rows, scale)
            return
        in_f32.score_tile(k, self, w, n_rows, n_keys, next_cell, rows)
        in_f32.softmax_tile(k, self, w, n_rows, n_keys, scale)
        in_f32.value_tile(k, self, w, n_rows, n_keys, rows)

    def close_row(self, k: Kernel, o: Pointer, to: Pointer, factor: Value | float) -> None:
        """to = o * factor."""
        copy_row(k, o, to, self.d_v, factor)

    def reopen_row(self, k: Kernel, source: Pointer, o: Pointer) -> None:
        """o = source."""
        copy_row(k, source, o, self.d_v)


Way: TypeAlias = ExactSizes | CodeSizes | ByteSizes


def choose_way(target: Target, sizes: Sizes, fmt_k: BlockFormat, fmt_v: BlockFormat) -> Way:
    """f32 for an f32 cache, which is asked for to be exact, and for a single row of q, which shares
    nothing that would pay for making codes."""
    formats = (fmt_k, fmt_k if sizes.kind == ABSORBED else fmt_v)
    if F32 in formats or sizes.block_rows == 1:
        return ExactSizes(**fields_of(sizes))
    if suits_bytes(target, sizes, formats):
        return ByteSizes(**fields_of(sizes))
    return by_codes(sizes, *formats)


def by_codes(sizes: Sizes, fmt_k: BlockFormat, fmt_v: BlockFormat) -> CodeSizes:
    """By codes of both formats."""
    return CodeSizes(**fields_of(sizes), codes_k=codes_of(fmt_k), codes_v=codes_of(fmt_v))


def fields_of(sizes: Sizes) -> dict[str, Any]:
    return {field.name: getattr(sizes, field.name) for field in fields(Sizes)}


def most_words(sizes: Sizes) -> int:
    """Words of a thread's workspace that are enough whichever way is taken."""
    ways: list[Way] = [ExactSizes(**fields_of(sizes)), ByteSizes(**fields_of(sizes))]
    ways += [by_codes(sizes, fmt, fmt) for fmt in CACHE_FORMATS.values() if fmt is not F32]
    return max(way.thread_words for way in ways)


def caches_of(
    sizes: Sizes, k_cache: Pointer, v_cache: Pointer, head: Value, fmt_k: BlockFormat,
    fmt_v: BlockFormat,
) -> Caches:  # fmt: skip
    """The caches as a head sees them."""

    def rows(cache: Pointer, n_bytes: int) -> Callable[[Value], Pointer]:
        if sizes.kind == ABSORBED:
            return lambda cell: cache.bytes(cell * n_bytes)
        return lambda cell: cache.bytes((cell * sizes.n_head + head) * n_bytes)

    keys = rows(k_cache, fmt_k.row_bytes(sizes.d_k))
    if sizes.kind == ABSORBED:
        return Caches(keys, keys, fmt_k, fmt_k)
    return Caches(keys, rows(v_cache, fmt_v.row_bytes(sizes.d_v)), fmt_k, fmt_v)


def decoded_rows(k: Kernel, sizes: Sizes, caches: Caches) -> in_f32.Rows:
    """Keys and values in f32."""
    d_k, d_v, absorbed = sizes.d_k, sizes.d_v, sizes.kind == ABSORBED

    def key(cell: Value, column: Value) -> list[Value]:
        return decode(k, caches.fmt_k, caches.key(cell), column, sizes.key_slab)

    def value(cell: Value, column: Value) -> list[Value]:
        return decode(k, caches.fmt_v, caches.value(cell), column, sizes.value_slab)

    def prefetch(cell: Value, column: Value, count: int) -> None:
        touch(k, caches.key(cell), column, count, caches.fmt_k.row_bytes(d_k), d_k)
        if not absorbed:
            touch(k, caches.value(cell), column, count, caches.fmt_v.row_bytes(d_v), d_k)

    return in_f32.Rows(key, value, prefetch)
