"""Expanded attention in one launch: FlashMLA-2 (ik_llama.cpp PR 253) without its growing buffer.

    for each chunk of cache rows:  K, V = kv_b c   (a matrix product, all heads)
                                   fold softmax(q K) V of the chunk into the running result

Only one chunk of K and V exists at a time, so memory does not grow with the context. Threads meet
at barriers between the parts of a chunk: the next part reads what all of them wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.dtypes import f32, i32, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.attention_block import Block, Cells
from codegen.kernels.attention_codes import CodeSizes
from codegen.kernels.attention_expanded import (
    Chunk,
    Expanded,
    Fold,
    Span,
    attend_chunk,
    expanded_state_bytes,
    fold_codes,
    fold_rows,
)
from codegen.kernels.expand import Part, expand_heads, latent_pitch, latent_rows, reset
from codegen.kernels.expand_codes import CodeChunk, expand_codes, stage_bytes
from codegen.kernels.panel_decode import panel_bytes
from codegen.targets.base import Target
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

ROW_STEP = 64


@dataclass(frozen=True)
class Layout:
    """Byte offsets of the parts of the op's scratch, and its size."""

    chunk_rows: int
    panel_bytes: int
    attend: int
    state: int
    rows: int
    kv: int
    panels: int
    size: int


def rows_per_chunk(chunk_bytes: int, n_head: int, n_nope: int, n_value: int, n_ctx: int) -> int:
    """Cache rows whose expanded K and V fit `chunk_bytes`; at least a few."""
    fitting = chunk_bytes // (4 * n_head * (n_nope + n_value)) // ROW_STEP * ROW_STEP
    return max(ROW_STEP, min(fitting, -(-n_ctx // ROW_STEP) * ROW_STEP))


@functools.cache
def layout(
    target: Target,
    expanded: Expanded,
    parts: tuple[Part, Part],
    chunk_rows: int,
    n_threads: int,
    fmt: BlockFormat,
) -> Layout:
    """Where the kernel's workspaces lie in scratch; `fmt` is the cache's."""
    e, way = expanded, expanded.way(fmt, parts[0].fmt)
    panel = max(_aligned(panel_bytes(target, part.fmt, part.n_lora)) for part in parts)
    kv = 4 * chunk_rows * e.n_head * (e.n_nope + e.n_value)
    if isinstance(way, CodeSizes):
        kv = CodeChunk(way, chunk_rows).nbytes
        panel += stage_bytes(max(e.n_nope, e.n_value))
    sizes = {
        "attend": 4 * n_threads * way.thread_words,
        "state": expanded_state_bytes(e.max_tokens, n_head=e.n_head),
        "rows": chunk_rows * latent_pitch(parts[0].fmt, e.n_lora),
        "kv": kv,
        "panels": n_threads * panel,
    }
    offsets, at = {}, 0
    for name, size in sizes.items():
        offsets[name] = at
        at += _aligned(size)
    return Layout(chunk_rows, panel, **offsets, size=at)


def _aligned(n: int) -> int:
    return -(-n // 64) * 64


@kernel(
    q=ptr(f32),
    cache=ptr(u8),
    w_uk=ptr(u8),
    v_b=ptr(u8),
    pos=ptr(i32),
    seq=ptr(i32),
    cell_pos=ptr(i32),
    cell_seq=ptr(i32),
    out=ptr(f32),
    attend=ptr(f32),
    state=ptr(f32),
    rows=ptr(u8),
    kv=ptr(f32),
    panels=ptr(u8),
    n_tokens=dim(),
    n_kv=dim(),
)
def flash_expanded(
    k: Kernel,
    q: Pointer,
    cache: Pointer,
    w_uk: Pointer,
    v_b: Pointer,
    pos: Pointer,
    seq: Pointer,
    cell_pos: Pointer,
    cell_seq: Pointer,
    out: Pointer,
    attend: Pointer,
    state: Pointer,
    rows: Pointer,
    kv: Pointer,
    panels: Pointer,
    n_tokens: Value,
    n_kv: Value,
    *,
    expanded: Expanded,
    parts: tuple[Part, Part],
    fmt: BlockFormat,
    scale: float,
    chunk_rows: int,
    panel_bytes: int,
) -> None:
    """out[t, h] = softmax(scale q[t, h] [w_uk[h] c_kv | k_pe]) (v_b[h] c_kv)."""
    e, way = expanded, expanded.way(fmt, parts[0].fmt)
    c_width, cells = e.n_lora + e.n_rope, Cells(cell_pos, cell_seq, pos, seq)
    make = codes_chunk if isinstance(way, CodeSizes) else f32_chunk
    chunk = make(
        k, e, kv, (w_uk, v_b), rows, cache, panels.bytes(k.thread * panel_bytes), cells,
        parts=parts, fmt=fmt, scale=scale, chunk_rows=chunk_rows,
    )  # fmt: skip
    for_rows, for_attention = k.counter(), k.counter()
    with k.loop(0, n_kv, chunk_rows) as start:
        stop = k.minimum(start + chunk_rows, n_kv)
        latent_rows(
            k, rows, cache, start, stop - start, for_rows,
            part=parts[0], c_width=c_width, fmt=fmt,
        )  # fmt: skip
        k.barrier()
        reset(k, for_attention)
        chunk.expand(start, stop - start)
        k.barrier()
        reset(k, for_rows)
        attend_chunk(
            k, way, Span(start, stop, start > 0, stop >= n_kv), chunk.fold_of(start), cells, q, out,
            state, attend, n_tokens, for_attention,
        )  # fmt: skip
        k.barrier()
        for counter in chunk.counters:
            reset(k, counter)


@dataclass(frozen=True)
class ChunkMaker:
    """`expand(start, n_rows)` fills the chunk, `fold_of(start)` says how a block takes in a tile of
    it. The counters are to be zero when `expand` starts."""

    expand: Callable[[Value, Value], None]
    fold_of: Callable[[Value], Callable[[Any, Block], Fold]]
    counters: list[Pointer]


def f32_chunk(
    k: Kernel, e: Expanded, kv: Pointer, weights: tuple[Pointer, Pointer], rows: Pointer,
    cache: Pointer, own: Pointer, cells: Cells, *, parts: tuple[Part, Part], fmt: BlockFormat,
    scale: float, chunk_rows: int,
) -> ChunkMaker:  # fmt: skip
    """K and V of a row side by side for each head, in f32."""
    width, counters = e.n_nope + e.n_value, [k.counter() for _ in parts]
    places = (kv, kv.at(e.n_nope))

    def expand(start: Value, n_rows: Value) -> None:
        for to, w, counter, part in zip(places, weights, counters, parts, strict=True):
            expand_heads(
                k, to, w, rows, n_rows, own, counter,
                part=part, out_row=e.n_head * width, out_head=width,
            )  # fmt: skip

    def fold_of(start: Value) -> Callable[[Any, Block], Fold]:
        return fold_rows(k, e, Chunk(*places, width, width, start), cache, fmt, scale)

    return ChunkMaker(expand, fold_of, counters)


def codes_chunk(
    k: Kernel, e: Expanded, kv: Pointer, weights: tuple[Pointer, Pointer], rows: Pointer,
    cache: Pointer, own: Pointer, cells: Cells, *, parts: tuple[Part, Part], fmt: BlockFormat,
    scale: float, chunk_rows: int,
) -> ChunkMaker:  # fmt: skip
    """K and V of each head as codes."""
    way, counter = e.way(fmt, parts[0].fmt), k.counter()
    assert isinstance(way, CodeSizes)
    chunk, stage = CodeChunk(way, chunk_rows), own.cast(f32)
    panel = own.bytes(stage_bytes(max(e.n_nope, e.n_value)))

    def expand(start: Value, n_rows: Value) -> None:
        cached = cache.bytes(start * fmt.row_bytes(e.n_lora + e.n_rope))
        expand_codes(
            k, chunk, kv, weights, rows, cached, n_rows, panel, stage, counter,
            parts=parts, fmt=fmt,
        )  # fmt: skip

    def fold_of(start: Value) -> Callable[[Any, Block], Fold]:
        return fold_codes(k, chunk, kv, cells, start, scale)

    return ChunkMaker(expand, fold_of, [counter])
