"""K and V from cached rows: the matrix part of expanded attention.

    k_nope[j, h] = w_uk[h] c_kv[j],   v[j, h] = v_b[h] c_kv[j]     for a chunk of cache rows j

A chunk's latent parts are brought into the form the matrix kernels read (a8 rows for weights
with an integer dot, else f32), then panels of w_uk and v_b meet all rows of the chunk at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codegen.dtypes import f32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.activations import row_bytes, store_codes
from codegen.kernels.blocks import BLOCK, load_block
from codegen.kernels.matmul import store_rows
from codegen.kernels.panel import Rows, multiply_rows, panel_rows
from codegen.kernels.rows import store_vectors
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel


HEAD_CHUNK = 512  # cache rows that `expand_head` prepares at a time


@dataclass(frozen=True)
class Part:
    """One half of kv_b: `n_heads` matrices (n_rows, n_lora), `pitch` bytes apart."""

    n_heads: int
    n_rows: int
    n_lora: int
    pitch: int
    fmt: BlockFormat


def latent_pitch(fmt: BlockFormat, n_lora: int) -> int:
    """Bytes of one row as `multiply_rows` reads it for weights of this format."""
    return row_bytes(n_lora) if fmt.integer_dot else 4 * n_lora


def latent_rows(
    k: Kernel,
    rows: Pointer,
    cache: Pointer,
    first: Value,
    n_rows: Value,
    counter: Pointer,
    *,
    part: Part,
    c_width: int,
    fmt: BlockFormat,
) -> None:
    """rows[i] = the latent part of cache row first + i, ready for the matrices."""
    n, pitch = part.n_lora, latent_pitch(part.fmt, part.n_lora)
    with k.tiles(n_rows, counter) as i:
        source = cache.bytes((first + i) * fmt.row_bytes(c_width))
        target = rows.bytes(i * pitch)
        with k.loop(0, n // BLOCK) as block:
            values = load_block(k, fmt, source, block)
            if not part.fmt.integer_dot:
                store_vectors(target.cast(f32).at(block * BLOCK), values)
            else:
                store_codes(k, target, n, block, values)


def expand_heads(
    k: Kernel,
    out: Pointer,
    w: Pointer,
    rows: Pointer,
    n_rows: Value,
    panel: Pointer,
    counter: Pointer,
    *,
    part: Part,
    out_row: int,
    out_head: int,
) -> None:
    """out[i * out_row + h * out_head + r] = w[h, r] . rows[i], strides in values."""
    n = panel_rows(k.target)
    per_head = -(-part.n_rows // n)
    with k.tiles(per_head * part.n_heads, counter) as tile:
        head, first = tile // per_head, tile % per_head * n
        to = out.at(head * out_head)
        expand_panel(k, to, w, rows, n_rows, panel, head, first, part=part, out_row=out_row)


def expand_panel(
    k: Kernel,
    out: Pointer,
    w: Pointer,
    rows: Pointer,
    n_rows: Value,
    panel: Pointer,
    head: Value,
    first: Value,
    *,
    part: Part,
    out_row: int,
) -> None:
    """out[i * out_row + r] = w[head, r] . rows[i] for the rows r of a panel, from `first` on."""
    matrix = w.cast(u8).bytes(head * part.pitch)

    def store(i: Value, total: Value) -> None:
        store_rows(k, out.at(i * out_row + first), total, first, part.n_rows)

    multiply_rows(
        k, part.fmt, Rows(matrix, first, part.n_rows), rows, n_rows, store, panel,
        n_cols=part.n_lora, x_pitch=latent_pitch(part.fmt, part.n_lora),
    )  # fmt: skip


@kernel(out=ptr(f32), cache=ptr(u8), w=ptr(u8), rows=ptr(u8), panels=ptr(u8), n_kv=dim())
def expand_head(
    k: Kernel,
    out: Pointer,
    cache: Pointer,
    w: Pointer,
    rows: Pointer,
    panels: Pointer,
    n_kv: Value,
    *,
    part: Part,
    n_rope: int,
    with_rope: bool,
    fmt: BlockFormat,
    panel_bytes: int,
) -> None:
    """out[j] = w c_kv[j], and behind it k_pe[j] if asked for: one head's keys or values, f32.

    For attention without flash, which wants all rows at once. w is the head's matrix.
    """
    width = part.n_rows + (n_rope if with_rope else 0)
    c_width = part.n_lora + n_rope
    panel = panels.bytes(k.thread * panel_bytes)
    for_rows, for_part = k.counter(), k.counter()
    with k.loop(0, n_kv, HEAD_CHUNK) as start:
        n_rows = k.minimum(n_kv - start, HEAD_CHUNK)
        to = out.at(start * width)
        latent_rows(k, rows, cache, start, n_rows, for_rows, part=part, c_width=c_width, fmt=fmt)
        k.barrier()
        reset(k, for_part)
        expand_heads(k, to, w, rows, n_rows, panel, for_part, part=part, out_row=width, out_head=0)
        if with_rope:
            first, last = k.my_share(n_rows)
            with k.loop(first, last) as i:
                row = cache.bytes((start + i) * fmt.row_bytes(c_width))
                for block in range(n_rope // BLOCK):
                    values = load_block(k, fmt, row, k.const(part.n_lora // BLOCK + block, i64))
                    store_vectors(to.at(i * width + part.n_rows + block * BLOCK), values)
        k.barrier()
        reset(k, for_rows)


def reset(k: Kernel, counter: Pointer) -> None:
    """Zero a tile counter that no thread uses between the barriers around this place."""
    with k.when(k.thread.eq(0)):
        k.store_atomic(counter, 0)
