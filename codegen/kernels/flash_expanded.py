"""Expanded attention in one launch: FlashMLA-2 (ik_llama.cpp PR 253) without its growing buffer.

    for each chunk of cache rows:  K, V = kv_b c   (a matrix product, all heads)
                                   fold softmax(q K) V of the chunk into the running result

Only one chunk of K and V exists at a time, so memory does not grow with the context. Threads meet
at barriers between the parts of a chunk: the next part reads what all of them wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.attention_block import Cells
from codegen.kernels.attention_expanded import (
    Chunk,
    Expanded,
    attend_chunk,
    expanded_scratch_bytes,
    expanded_state_bytes,
)
from codegen.kernels.expand import Part, expand_heads, latent_pitch, latent_rows, reset
from codegen.kernels.panel import panel_bytes
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


def layout(
    target: Target,
    expanded: Expanded,
    parts: tuple[Part, Part],
    chunk_rows: int,
    n_threads: int,
) -> Layout:
    """Where the kernel's workspaces lie in scratch."""
    e, panel = expanded, 0
    for part in parts:
        panel = max(panel, _aligned(panel_bytes(target, part.fmt, part.n_lora)))
    sizes = {
        "attend": expanded_scratch_bytes(
            e.max_tokens,
            n_threads,
            n_head=e.n_head,
            n_nope=e.n_nope,
            n_rope=e.n_rope,
            n_value=e.n_value,
        ),
        "state": expanded_state_bytes(e.max_tokens, n_head=e.n_head),
        "rows": chunk_rows * latent_pitch(parts[0].fmt, e.n_lora),
        "kv": 4 * chunk_rows * e.n_head * (e.n_nope + e.n_value),
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
    e, width = expanded, expanded.n_nope + expanded.n_value
    c_width = e.n_lora + e.n_rope
    panel, values = panels.bytes(k.thread * panel_bytes), kv.at(e.n_nope)
    for_rows, for_attention = k.counter(), k.counter()
    for_parts = [k.counter() for _ in parts]
    with k.loop(0, n_kv, chunk_rows) as start:
        stop = k.minimum(start + chunk_rows, n_kv)
        n_rows = stop - start
        latent_rows(
            k, rows, cache, start, n_rows, for_rows, part=parts[0], c_width=c_width, fmt=fmt
        )
        k.barrier()
        reset(k, for_attention)
        halves = ((kv, w_uk, for_parts[0], parts[0]), (values, v_b, for_parts[1], parts[1]))
        for to, w, counter, part in halves:
            expand_heads(
                k, to, w, rows, n_rows, panel, counter,
                part=part, out_row=e.n_head * width, out_head=width,
            )  # fmt: skip
        k.barrier()
        reset(k, for_rows)
        chunk = Chunk(kv, values, width, width, start, stop, start > 0, stop >= n_kv)
        attend_chunk(
            k, e, chunk, Cells(cell_pos, cell_seq, pos, seq), q, cache, out, state, attend,
            n_tokens, fmt=fmt, scale=scale, counter=for_attention,
        )  # fmt: skip
        k.barrier()
        for counter in for_parts:
            reset(k, counter)
