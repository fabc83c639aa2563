"""Scores without flash attention for a few tokens over a cache with a row per head.

There is next to no arithmetic to share between rows: what counts is to read the cache as it lies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr, value
from codegen.kernels.attention_block import decode
from codegen.kernels.attention_plain import MASKED, padded
from codegen.kernels.blocks import BLOCK
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

STREAM_CELLS = 32  # per item


@kernel(
    s=ptr(f32),
    q=ptr(f32),
    k_cache=ptr(u8),
    pos=ptr(i32),
    seq=ptr(i32),
    cell_pos=ptr(i32),
    cell_seq=ptr(i32),
    head_start=value(i64),
    n_tokens=dim(),
    n_kv=dim(),
)
def kq_few(
    k: Kernel,
    s: Pointer,
    q: Pointer,
    k_cache: Pointer,
    pos: Pointer,
    seq: Pointer,
    cell_pos: Pointer,
    cell_seq: Pointer,
    head_start: Value,
    n_tokens: Value,
    n_kv: Value,
    *,
    n_head: int,
    n_slice: int,
    d_k: int,
    fmt_k: BlockFormat,
    scale: float,
) -> None:
    """s[h, t, j] = scale * q[t, head_start + h] . k[j, head_start + h], masked; h < n_slice.

    As attention_plain.kq does. The heads of a cell lie side by side, so cells are read in order,
    each once for all tokens.
    """
    stride, row_bytes = padded(n_kv), fmt_k.row_bytes(d_k)
    with k.tiles((stride + (STREAM_CELLS - 1)) // STREAM_CELLS) as item:
        start = item * STREAM_CELLS
        with k.loop(start, k.minimum(start + STREAM_CELLS, stride)) as column:
            cell = k.minimum(column, n_kv - 1)
            keys = k_cache.bytes((cell * n_head + head_start) * row_bytes)
            with k.loop(0, n_tokens) as t:
                queries, to = q.at((t * n_head + head_start) * d_k), s.at(t * stride + column)
                seen = (column < n_kv) & seq[t].eq(cell_seq[cell]) & (cell_pos[cell] <= pos[t])
                with k.either(seen) as (yes, no):
                    with yes, k.loop(0, n_slice) as h:
                        score = row_score(k, fmt_k, keys.bytes(h * row_bytes), queries, h, d_k)
                        to[h * n_tokens * stride] = score * scale
                    with no, k.loop(0, n_slice) as h:
                        to[h * n_tokens * stride] = MASKED


def row_score(
    k: Kernel, fmt: BlockFormat, row: Pointer, queries: Pointer, h: Value, d_k: int
) -> Value:
    """queries[h] . row, straight from the cache's format."""
    lanes = k.target.lanes
    sums = [k.var(k.zeros(f32 * lanes)) for _ in range(4)]
    for column in range(0, d_k, BLOCK):
        decoded = decode(k, fmt, row, k.const(column, i64), BLOCK)
        for j, v in enumerate(decoded):
            at = column + j * lanes
            sums[at // lanes % 4] += v * queries.at(h * d_k + at).load(f32 * lanes)
    a, b, c, d = (total.get() for total in sums)
    return ((a + b) + (c + d)).sum()
