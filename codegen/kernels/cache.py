"""Writing the cache: norm, rotate, quantise and store the new tokens' rows in one pass.

Latent rows (-mla 1, 2, 3) are [c_kv normed | k_pe rotated]; head rows (-mla 0) are, per head,
[k_nope | k_pe rotated] in K and the values in V. Without flash attention the latent part or V is
kept transposed: [values][n_ctx], one column per cell, f16 or f32 (formats.transposed_type). Token
t is written to cells[t].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f16, f32, i32, i64, u8, u16
from codegen.formats import BlockFormat, transposed_type
from codegen.kernel import dim, kernel, ptr, value
from codegen.kernels.blocks import BLOCK
from codegen.kernels.encode import store_row
from codegen.kernels.layers import inverse_rms, normed, rotate, rotation
from codegen.kernels.rows import row_tiles, store_vectors, vectors
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

COLUMN_TOKENS = 16  # neighbouring columns are written together, so that cache lines fill up


@dataclass(frozen=True)
class Latent:
    """Sizes of a latent row, and the epsilon of its norm."""

    n_lora: int
    n_rope: int
    eps: float

    @property
    def width(self) -> int:
        return self.n_lora + self.n_rope


@dataclass(frozen=True)
class Heads:
    """Sizes of what kv_b makes of a latent row: per head [k_nope | v]."""

    n_heads: int
    n_nope: int
    n_rope: int
    n_v: int
    n_lora: int

    @property
    def k_width(self) -> int:
        return self.n_nope + self.n_rope

    @property
    def kv_width(self) -> int:
        return self.n_nope + self.n_v


@kernel(cache=ptr(u8), kv_a=ptr(f32), w=ptr(f32), rope=ptr(f32), cells=ptr(i32), n_tokens=dim())
def store_latent(
    k: Kernel,
    cache: Pointer,
    kv_a: Pointer,
    w: Pointer,
    rope: Pointer,
    cells: Pointer,
    n_tokens: Value,
    *,
    latent: Latent,
    fmt: BlockFormat,
) -> None:
    """Row cells[t] of the cache = [rms_norm(kv_a[t, :n_lora]) * w | rotated kv_a[t, n_lora:]]."""
    row = k.stack(f32, latent.width)
    with row_tiles(k, n_tokens, latent.width) as t:
        latent_row(k, row, kv_a, w, rope, t, latent)
        store_at(k, fmt, cache, cells[t].to(i64), row, latent.width)


@kernel(
    cache=ptr(u8),
    kv_t=ptr(u8),
    kv_a=ptr(f32),
    w=ptr(f32),
    rope=ptr(f32),
    cells=ptr(i32),
    n_ctx=value(),
    n_tokens=dim(),
)
def store_latent_both_ways(
    k: Kernel,
    cache: Pointer,
    kv_t: Pointer,
    kv_a: Pointer,
    w: Pointer,
    rope: Pointer,
    cells: Pointer,
    n_ctx: Value,
    n_tokens: Value,
    *,
    latent: Latent,
    fmt: BlockFormat,
) -> None:
    """store_latent, and column cells[t] of kv_t [n_lora][n_ctx] = the normed latent part."""
    n, kv_t = latent.n_lora, kv_t.cast(transposed_type(fmt))
    row, columns = k.stack(f32, latent.width), k.stack(kv_t.elem, COLUMN_TOKENS * n)
    with token_groups(k, n_tokens, 1) as (first, count, _):
        with k.loop(0, count) as j:
            t = first + j
            latent_row(k, row, kv_a, w, rope, t, latent)
            store_at(k, fmt, cache, cells[t].to(i64), row, latent.width)
            copy_row(k, columns.at(j * n), row, n)
        store_columns(k, kv_t, n_ctx, columns, cells.at(first), count, n)


@kernel(
    k_cache=ptr(u8),
    v_cache=ptr(u8),
    kv=ptr(f32),
    kv_a=ptr(f32),
    rope=ptr(f32),
    cells=ptr(i32),
    n_tokens=dim(),
)
def store_kv(
    k: Kernel,
    k_cache: Pointer,
    v_cache: Pointer,
    kv: Pointer,
    kv_a: Pointer,
    rope: Pointer,
    cells: Pointer,
    n_tokens: Value,
    *,
    heads: Heads,
    fmt_k: BlockFormat,
    fmt_v: BlockFormat,
) -> None:
    """K and V rows of each head from kv [T][H][nope + v] and the k_pe behind kv_a's latent part."""
    row = k.stack(f32, heads.k_width)
    with row_tiles(k, n_tokens * heads.n_heads, heads.k_width + heads.n_v) as index:
        t, source = index // heads.n_heads, kv.at(index * heads.kv_width)
        place = cells[t].to(i64) * heads.n_heads + index % heads.n_heads
        key_row(k, row, source, kv_a, rope, t, heads)
        store_at(k, fmt_k, k_cache, place, row, heads.k_width)
        store_at(k, fmt_v, v_cache, place, source.at(heads.n_nope), heads.n_v)


@kernel(
    k_cache=ptr(u8),
    v_t=ptr(u8),
    kv=ptr(f32),
    kv_a=ptr(f32),
    rope=ptr(f32),
    cells=ptr(i32),
    n_ctx=value(),
    n_tokens=dim(),
)
def store_kv_transposed(
    k: Kernel,
    k_cache: Pointer,
    v_t: Pointer,
    kv: Pointer,
    kv_a: Pointer,
    rope: Pointer,
    cells: Pointer,
    n_ctx: Value,
    n_tokens: Value,
    *,
    heads: Heads,
    fmt_k: BlockFormat,
    fmt_v: BlockFormat,
) -> None:
    """store_kv with V as columns: v_t [H * n_v][n_ctx]."""
    n, v_t = heads.n_v, v_t.cast(transposed_type(fmt_v))
    row, columns = k.stack(f32, heads.k_width), k.stack(v_t.elem, COLUMN_TOKENS * n)
    with token_groups(k, n_tokens, heads.n_heads) as (first, count, head):
        with k.loop(0, count) as j:
            t = first + j
            source = kv.at((t * heads.n_heads + head) * heads.kv_width)
            place = cells[t].to(i64) * heads.n_heads + head
            key_row(k, row, source, kv_a, rope, t, heads)
            store_at(k, fmt_k, k_cache, place, row, heads.k_width)
            copy_row(k, columns.at(j * n), source.at(heads.n_nope), n)
        lines = v_t.at(head * n * n_ctx)
        store_columns(k, lines, n_ctx, columns, cells.at(first), count, n)


@contextmanager
def token_groups(k: Kernel, n_tokens: Value, n_heads: int) -> Iterator[tuple[Value, Value, Value]]:
    """(first token, number of tokens, head): up to COLUMN_TOKENS neighbours of one head."""
    with k.tiles((n_tokens + (COLUMN_TOKENS - 1)) // COLUMN_TOKENS * n_heads) as tile:
        first = tile // n_heads * COLUMN_TOKENS
        yield first, k.minimum(n_tokens - first, COLUMN_TOKENS), tile % n_heads


def latent_row(
    k: Kernel,
    row: Pointer,
    kv_a: Pointer,
    w: Pointer,
    rope: Pointer,
    t: Value,
    latent: Latent,
) -> None:
    """row = [rms_norm(c_kv) * w | k_pe rotated] of token t, f32."""
    source = kv_a.at(t * latent.width)
    inverse = inverse_rms(k, source, latent.n_lora, latent.eps)
    with k.loop(0, latent.n_lora, BLOCK) as i:
        store_vectors(row.at(i), normed(k, source.at(i), w.at(i), inverse))
    n, end = latent.n_rope, latent.n_lora
    turn = rotation(k, rope.at(t * n), n)
    store_vectors(row.at(end), rotate(k, vectors(k, source.at(end), n), turn))


def key_row(
    k: Kernel,
    row: Pointer,
    kv: Pointer,
    kv_a: Pointer,
    rope: Pointer,
    t: Value,
    heads: Heads,
) -> None:
    """row = [k_nope of one head | k_pe rotated] of token t, f32."""
    store_vectors(row, vectors(k, kv, heads.n_nope))
    k_pe = kv_a.at(t * (heads.n_lora + heads.n_rope) + heads.n_lora)
    turn = rotation(k, rope.at(t * heads.n_rope), heads.n_rope)
    store_vectors(row.at(heads.n_nope), rotate(k, vectors(k, k_pe, heads.n_rope), turn))


def store_at(
    k: Kernel, fmt: BlockFormat, cache: Pointer, place: Value, source: Pointer, n: int
) -> None:
    """Row `place` of a cache whose rows have n values = the n f32 at `source`."""
    row = cache.bytes(place * fmt.row_bytes(n))
    store_row(k, fmt, row, n, lambda block: vectors(k, source.at(block * BLOCK), BLOCK))


def copy_row(k: Kernel, to: Pointer, source: Pointer, n: int) -> None:
    """n f32 at `source`, in the type of `to`."""
    with k.loop(0, n, BLOCK) as i:
        store_vectors(to.at(i), [v.to(to.elem) for v in vectors(k, source.at(i), BLOCK)])


def store_columns(
    k: Kernel,
    lines: Pointer,
    n_ctx: Value,
    columns: Pointer,
    cells: Pointer,
    count: Value,
    n: int,
) -> None:
    """lines[i][cells[j]] = columns[j][i] for i < n, j < count."""
    bits = u16 if lines.elem == f16 else lines.elem  # a lone f16 is moved as an integer
    with k.loop(0, n) as i:
        line = lines.at(i * n_ctx).cast(bits)
        with k.loop(0, count) as j:
            line[cells[j].to(i64)] = columns.at(j * n).cast(bits)[i]
