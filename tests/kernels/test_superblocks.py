"""Matrices of K-quants against numpy in f64: few tokens, many tokens, experts, embedding."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from codegen.formats import WEIGHT_FORMATS, BlockFormat
from codegen.kernels import layers, matmul, moe, moe_few
from codegen.kernels.panel import panel_bytes
from codegen.targets.base import Target
from mlacli.gguf.quants import dequantise
from tests.kernels import numpy_ops
from tests.kernels.harness import (
    Array,
    assert_threads_agree,
    each_target,
    host_targets,
    run_guarded,
    run_kernel,
)

FORMATS = [f for f in WEIGHT_FORMATS.values() if f.groups]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
MOST_THREADS = 5
TOLERANCE = 2e-6  # of the sum of the terms' sizes


IDS = np.array([[0, 2], [2, 0], [2, 1], [0, 2], [2, 0], [2, 1]], np.int32)
N_EXPERT, N_USED, N_ROWS, N_COLS = 3, 2, 35, 256
SIZES: dict[str, Any] = {"n_rows": N_ROWS, "n_cols": N_COLS}


def weights(fmt: BlockFormat, n_rows: int, n: int, seed: int = 0) -> tuple[Array, Array]:
    """Random bytes with small scales, as they lie in a file, and their values in f64."""
    rng = np.random.default_rng((n_rows, n, seed))
    blocks = rng.integers(0, 256, (n_rows, n // fmt.size, fmt.block_bytes), np.uint8)
    for name in ("d", "dmin"):
        if fmt.has(name):
            at, scales = fmt.field_offset(name), rng.uniform(1e-4, 1e-2, (*blocks.shape[:2], 1))
            blocks[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
    data = blocks.reshape(n_rows, fmt.row_bytes(n))
    return data, dequantise(data, fmt, n).astype(np.float64)


def normal(*shape: int) -> Array:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def raw(rows: Array) -> Array:
    return np.ascontiguousarray(rows).view(np.uint8)


def slots(values: Array, x: Array) -> Array:
    """w[expert of slot i] x[i]."""
    chosen = values.reshape(N_EXPERT, N_ROWS, N_COLS)[IDS.ravel()]
    product: Array = np.einsum("src,sc->sr", chosen, x)
    return product


def scratch(target: Target, fmt: BlockFormat, n_cols: int) -> tuple[Array, int]:
    room = -(-panel_bytes(target, fmt, n_cols) // 64) * 64
    return np.zeros(MOST_THREADS * room, np.uint8), room


def assert_product(found: Array, w: Array, x: Array) -> None:
    """found[..., t, r] = w[..., r] . x[..., t]."""
    expected, sizes = (
        np.einsum("...rc,...tc->...tr", a, b) for a, b in ((w, x), (np.abs(w), np.abs(x)))
    )
    assert (np.abs(found - expected) <= TOLERANCE * sizes).all()


def assert_near(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@each_target
@each_format
@pytest.mark.parametrize(("n_rows", "n_cols", "n_heads"), [(33, 512, 2), (5, 256, 1)])
def test_products(target: Target, fmt: BlockFormat, n_rows: int, n_cols: int, n_heads: int) -> None:
    data, values = weights(fmt, n_heads * n_rows, n_cols)
    by_head = values.reshape(n_heads, n_rows, n_cols)
    x_head, y_head = 4 * n_cols, n_rows
    shape = matmul.Shape(
        n_rows, n_cols, n_heads, n_rows * fmt.row_bytes(n_cols), n_heads * x_head, x_head,
        n_heads * y_head, y_head,
    )  # fmt: skip
    room, room_bytes = scratch(target, fmt, n_cols)

    def arguments(n_tokens: int, extra: dict[str, Array]) -> dict[str, Any]:
        y = np.full((n_tokens, n_heads, n_rows), np.nan, np.float32)
        x = normal(n_tokens, n_heads, n_cols).view(np.uint8)
        residual = np.zeros(0, np.float32)
        return {"y": y, "w": data, "x": x, "residual": residual, "n_tokens": n_tokens} | extra

    few = matmul.matvec(shape=shape, fmt=fmt)
    many = matmul.matmul(shape=shape, fmt=fmt, scratch_bytes=room_bytes)
    for n_tokens in (1, 3, 19):
        x = normal(n_tokens, n_heads, n_cols).transpose(1, 0, 2)
        for spec, extra in ((few, {}), (many, {"scratch": room})):
            make = partial(arguments, n_tokens, extra)
            found = assert_threads_agree(spec, target, make, ["y"])["y"]
            assert_product(found.transpose(1, 0, 2), by_head, x)
            if n_tokens == 3:
                updates = list(extra)
                guarded = run_guarded(
                    spec, target, make(), outputs=["y"], updates=updates, n_threads=1
                )
                assert guarded["y"].tobytes() == found.tobytes()


@each_target
def test_up_and_gate_of_experts(target: Target) -> None:
    """Two formats per target, all in turn."""
    turn = [t.name for t in host_targets()].index(target.name)
    fmt_gate, fmt_up = (FORMATS[(turn + i) % len(FORMATS)] for i in (0, 1))
    gate, gate_values = weights(fmt_gate, N_EXPERT * N_ROWS, N_COLS, 1)
    up, up_values = weights(fmt_up, N_EXPERT * N_ROWS, N_COLS, 2)
    offsets, order, _ = numpy_ops.group_tokens(IDS, N_EXPERT)
    x = normal(len(IDS), N_COLS)
    by_slot = np.repeat(x, N_USED, axis=0)
    expected = numpy_ops.silu(slots(gate_values, by_slot)) * slots(up_values, by_slot)
    sizes = SIZES | {"fmt_gate": fmt_gate, "fmt_up": fmt_up}
    room, room_bytes = scratch(target, fmt_gate, N_COLS)
    few = moe_few.moe_up_gate_vec(**sizes, n_used=N_USED)
    many = moe.moe_up_gate(**sizes, n_expert=N_EXPERT, scratch_bytes=room_bytes)
    tables: dict[str, Any] = {"ids": IDS, "n_tokens": len(IDS)}
    groups: dict[str, Any] = {"offsets": offsets, "scratch": room}
    in_order = np.arange(IDS.size)
    for spec, rows, kept, extra in (
        (few, x, in_order, tables),
        (many, x[order // N_USED], order, groups),
    ):
        y = np.full((IDS.size, N_ROWS), np.nan, np.float32)
        args = {"y": y, "gate": gate, "up": up, "x": raw(rows)}
        run_kernel(spec, target, args | extra, n_threads=2)
        assert_near(y, expected[kept])


@each_target
def test_down_of_experts(target: Target) -> None:
    """z[slot] = w_e x[slot] for few tokens, y[token] += weight * (w_e x[slot]) for many."""
    fmt = FORMATS[-1]
    w, values = weights(fmt, N_EXPERT * N_ROWS, N_COLS)
    offsets, order, _ = numpy_ops.group_tokens(IDS, N_EXPERT)
    factors, x = np.float32(2.0) ** -np.arange(IDS.size, dtype=np.float32), normal(12, N_COLS)
    products = slots(values, x)
    weighted = (products * factors[:, None]).reshape(len(IDS), N_USED, N_ROWS)
    room, room_bytes = scratch(target, fmt, N_COLS)
    sizes = SIZES | {"fmt": fmt, "n_used": N_USED}
    few = moe_few.moe_matmul_vec(**sizes, per_slot=True)
    many = moe.moe_down(**sizes, n_expert=N_EXPERT, scratch_bytes=room_bytes)
    tables: dict[str, Any] = {"x": raw(x), "ids": IDS, "n_tokens": len(IDS)}
    groups: dict[str, Any] = {"x": raw(x[order]), "offsets": offsets, "order": order}
    groups |= {"weights": factors, "scratch": room}
    for spec, expected, args in (
        (few, products, tables),
        (many, 1 + weighted.sum(axis=1), groups),
    ):
        y = np.ones(expected.shape, np.float32)
        run_kernel(spec, target, args | {"y": y, "w": w}, n_threads=2)
        assert_near(y, expected)


@each_target
@each_format
def test_embed(target: Target, fmt: BlockFormat) -> None:
    w, values = weights(fmt, 9, 512)
    tokens = np.array([8, 0, 3], np.int32)
    y = np.zeros((3, 512), np.float32)
    args: dict[str, Any] = {"y": y, "w": w, "tokens": tokens, "n_tokens": 3}
    run_kernel(layers.embed(n=512, fmt=fmt), target, args)
    np.testing.assert_array_equal(y, values[tokens])
