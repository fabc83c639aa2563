"""The small layers between the matmuls: embedding, norm, rotation, gating, sums, gathering rows.

All are f32, row-major; widths are multiples of 32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import f32, i32, i64, u8
from codegen.formats import BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.blocks import BLOCK, load_block
from codegen.kernels.rows import row_tiles, store_vectors, tree, vectors
from codegen.values import Pointer, Value
from codegen.vecmath import silu

if TYPE_CHECKING:
    from codegen.builder import Kernel

PARALLEL_VALUES = 1024  # an element-wise kernel hands out so many, also of one token's row


@kernel(y=ptr(f32), w=ptr(u8), tokens=ptr(i32), n_tokens=dim())
def embed(
    k: Kernel,
    y: Pointer,
    w: Pointer,
    tokens: Pointer,
    n_tokens: Value,
    *,
    n: int,
    fmt: BlockFormat,
) -> None:
    """y[t] = row tokens[t] of the matrix w, decoded."""
    with row_tiles(k, n_tokens, n) as t:
        row = w.bytes(tokens[t].to(i64) * fmt.row_bytes(n))
        with k.loop(0, n // BLOCK) as block:
            store_vectors(y.at(t * n + block * BLOCK), load_block(k, fmt, row, block))


@kernel(y=ptr(f32), x=ptr(f32), w=ptr(f32), n_tokens=dim())
def rms_norm(
    k: Kernel,
    y: Pointer,
    x: Pointer,
    w: Pointer,
    n_tokens: Value,
    *,
    n: int,
    eps: float,
    x_stride: int = 0,
    x_offset: int = 0,
) -> None:
    """y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * w for the n values at x[t * x_stride + x_offset];
    x_stride 0 means dense rows. y is dense and may be x when x is."""
    with row_tiles(k, n_tokens, n) as t:
        source = x.at(t * (x_stride or n) + x_offset)
        inverse = inverse_rms(k, source, n, eps)
        with k.loop(0, n, BLOCK) as i:
            store_vectors(y.at(t * n + i), normed(k, source.at(i), w.at(i), inverse))


def inverse_rms(k: Kernel, x: Pointer, n: int, eps: float) -> Value:
    """1 / sqrt(mean(x^2) + eps) over n values."""
    sums = [k.var(k.zeros(f32 * k.target.lanes)) for _ in range(0, BLOCK, k.target.lanes)]
    with k.loop(0, n, BLOCK) as i:
        for total, v in zip(sums, vectors(k, x.at(i), BLOCK), strict=True):
            total += v * v
    mean = tree(k, [total.get() for total in sums], "add") / float(n)
    return 1.0 / k.sqrt(mean + eps)


def normed(k: Kernel, x: Pointer, w: Pointer, inverse: Value) -> list[Value]:
    """32 values of a normed row."""
    pairs = zip(vectors(k, x, BLOCK), vectors(k, w, BLOCK), strict=True)
    return [v * inverse * weight for v, weight in pairs]


@kernel(y=ptr(f32), x=ptr(f32), rope=ptr(f32), n_tokens=dim())
def rope_q(
    k: Kernel,
    y: Pointer,
    x: Pointer,
    rope: Pointer,
    n_tokens: Value,
    *,
    n_heads: int,
    n_rope: int,
    x_stride: int,
    x_offset: int,
    y_stride: int,
    y_offset: int,
) -> None:
    """y[t, h, y_offset:][:n_rope] = x[t, h, x_offset:][:n_rope] rotated by the token's table
    rope[t] = (cos, sin) per pair. Strides are values per head; y may be x, for in place."""
    with row_tiles(k, n_tokens, n_heads * n_rope) as t:
        turn = rotation(k, rope.at(t * n_rope), n_rope)
        with k.loop(0, n_heads) as h:
            head = t * n_heads + h
            part = vectors(k, x.at(head * x_stride + x_offset), n_rope)
            store_vectors(y.at(head * y_stride + y_offset), rotate(k, part, turn))


def rotation(k: Kernel, table: Pointer, n_rope: int) -> list[tuple[Value, Value]]:
    """(cos, signed sin) per lane for each vector of a rotated part: (c, c), (-s, s) per pair."""
    turn = []
    for v in vectors(k, table, n_rope):
        lanes = v.type.lanes
        cos = k.shuffle(v, v, [j & ~1 for j in range(lanes)])
        sin = k.shuffle(v, v, [j | 1 for j in range(lanes)])
        turn.append((cos, sin * k.vector([-1.0, 1.0] * (lanes // 2), f32)))
    return turn


def rotate(k: Kernel, x: list[Value], turn: list[tuple[Value, Value]]) -> list[Value]:
    """(a cos - b sin, a sin + b cos) for the adjacent pairs (a, b) of x."""
    turned = []
    for v, (cos, sin) in zip(x, turn, strict=True):
        swapped = k.shuffle(v, v, [j ^ 1 for j in range(v.type.lanes)])
        turned.append(v * cos + swapped * sin)
    return turned


@kernel(y=ptr(f32), gate=ptr(f32), up=ptr(f32), n_tokens=dim())
def silu_mul(k: Kernel, y: Pointer, gate: Pointer, up: Pointer, n_tokens: Value, *, n: int) -> None:
    """y = silu(gate) * up over rows of n values; y may be gate or up."""
    with row_tiles(k, n_tokens * (n // BLOCK), BLOCK, PARALLEL_VALUES) as block:
        i = block * BLOCK
        pairs = zip(vectors(k, gate.at(i), BLOCK), vectors(k, up.at(i), BLOCK), strict=True)
        store_vectors(y.at(i), [silu(k, g) * u for g, u in pairs])


@kernel(y=ptr(f32), a=ptr(f32), b=ptr(f32), n_tokens=dim())
def add(k: Kernel, y: Pointer, a: Pointer, b: Pointer, n_tokens: Value, *, n: int) -> None:
    """y = a + b over rows of n values; y may be a or b."""
    with row_tiles(k, n_tokens * (n // BLOCK), BLOCK, PARALLEL_VALUES) as block:
        i = block * BLOCK
        pairs = zip(vectors(k, a.at(i), BLOCK), vectors(k, b.at(i), BLOCK), strict=True)
        store_vectors(y.at(i), [left + right for left, right in pairs])


@kernel(y=ptr(f32), x=ptr(f32), out_rows=ptr(i32), n_out=dim())
def take_rows(
    k: Kernel, y: Pointer, x: Pointer, out_rows: Pointer, n_out: Value, *, n: int
) -> None:
    """y[i] = x[out_rows[i]], rows of n values."""
    with row_tiles(k, n_out, n) as i:
        source = x.at(out_rows[i].to(i64) * n)
        with k.loop(0, n, BLOCK) as j:
            store_vectors(y.at(i * n + j), vectors(k, source.at(j), BLOCK))
