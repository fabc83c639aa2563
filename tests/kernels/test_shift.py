"""Rows moved to other positions: the rotated part as numpy rotates it, all else untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen.formats import CACHE_FORMATS
from codegen.kernels.shift import shift_rows
from mlacli.gguf.quants import dequantise, quantise
from tests.kernels.harness import each_target, run_guarded

N_ROWS, N_BEFORE, N_ROPE = 9, 96, 64
CELLS = np.array([7, 0, 3, 4], np.int32)


@each_target
@pytest.mark.parametrize("n_heads", [1, 3])
@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_shift_rows(target: Any, name: str, n_heads: int) -> None:
    fmt, width = CACHE_FORMATS[name], N_BEFORE + N_ROPE
    rng = np.random.default_rng(4)
    values = rng.normal(size=(N_ROWS * n_heads, width)).astype(np.float32)
    rows = quantise(values, fmt)
    before = dequantise(rows, fmt, width).astype(np.float64)
    angles = rng.uniform(-4, 4, N_ROPE // 2)
    rope = np.empty(N_ROPE, np.float32)
    rope[0::2], rope[1::2] = np.cos(angles), np.sin(angles)
    found = run_guarded(
        shift_rows(n_heads=n_heads, n_before=N_BEFORE, n_rope=N_ROPE, fmt=fmt),
        target,
        {"cache": rows, "rope": rope, "cells": CELLS, "n_cells": len(CELLS)},
        outputs=(),
        updates=("cache",),
        n_threads=2,
    )["cache"].reshape(rows.shape)
    moved = np.isin(np.arange(N_ROWS), CELLS).repeat(n_heads)
    np.testing.assert_array_equal(found[~moved], rows[~moved])
    pairs = before[:, N_BEFORE:].reshape(-1, N_ROPE // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    expected = before.copy()
    expected[:, N_BEFORE::2], expected[:, N_BEFORE + 1 :: 2] = turned.real, turned.imag
    if not fmt.header:  # the blocks before the rotated ones are the same bytes
        np.testing.assert_array_equal(
            found[moved, : fmt.row_bytes(N_BEFORE)], rows[moved, : fmt.row_bytes(N_BEFORE)]
        )
    again = dequantise(found, fmt, width).astype(np.float64)
    stored = dequantise(quantise(expected.astype(np.float32), fmt), fmt, width)
    rounding = np.square(stored - expected).mean()
    error = np.square(again - expected)[moved].mean()
    assert error <= 1.2 * rounding + 1e-13
