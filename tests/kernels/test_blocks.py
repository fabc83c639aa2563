"""Stored formats inside kernels, read and written, bit for bit against the numpy oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen.dtypes import f32, u8
from codegen.formats import CACHE_FORMATS, WEIGHT_FORMATS, BlockFormat
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.blocks import BLOCK, load_block
from codegen.kernels.encode import store_row
from codegen.kernels.rows import row_tiles, store_vectors, vectors
from mlacli.gguf.quants import dequantise, quantise
from tests.kernels.harness import Array, assert_threads_agree, each_target, run_guarded, run_kernel

FORMATS = {f.name: f for f in (*WEIGHT_FORMATS.values(), *CACHE_FORMATS.values())}
WRITTEN = [f for f in FORMATS.values() if not f.groups]
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
each_written = pytest.mark.parametrize("fmt", WRITTEN, ids=lambda fmt: fmt.name)


@kernel(y=ptr(f32), rows=ptr(u8), n_rows=dim())
def decode(k: Any, y: Any, rows: Any, n_rows: Any, *, n: int, fmt: BlockFormat) -> None:
    with row_tiles(k, n_rows, n) as r:
        with k.loop(0, n // BLOCK) as block:
            values = load_block(k, fmt, rows.bytes(r * fmt.row_bytes(n)), block)
            store_vectors(y.at(r * n + block * BLOCK), values)


@kernel(rows=ptr(u8), x=ptr(f32), n_rows=dim())
def encode(k: Any, rows: Any, x: Any, n_rows: Any, *, n: int, fmt: BlockFormat) -> None:
    with row_tiles(k, n_rows, n) as r:
        source = x.at(r * n)
        row = rows.bytes(r * fmt.row_bytes(n))
        store_row(k, fmt, row, n, lambda block: vectors(k, source.at(block * BLOCK), BLOCK))


def random_rows(fmt: BlockFormat, n_rows: int, n: int) -> NDArray[np.uint8]:
    """Rows of random bytes: every code, sign and scale, and not-a-numbers, too."""
    raw = np.random.default_rng(n_rows + n).integers(0, 256, (n_rows, fmt.row_bytes(n)), np.uint8)
    return raw


def same_bits(found: Array, expected: Array) -> None:
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan], expected[~is_nan])


@each_target
@each_format
@pytest.mark.parametrize(("n_rows", "n"), [(1, 32), (31, 576), (32, 32), (33, 576)])
def test_read(target: Any, fmt: BlockFormat, n_rows: int, n: int) -> None:
    n += -n % fmt.size
    rows = random_rows(fmt, n_rows, n)

    def make() -> dict[str, Any]:
        return {"y": np.zeros((n_rows, n), np.float32), "rows": rows, "n_rows": n_rows}

    spec = decode(n=n, fmt=fmt)
    found = assert_threads_agree(spec, target, make, ["y"])["y"]
    same_bits(found, dequantise(rows, fmt, n))
    if n_rows != 32:
        same_bits(run_guarded(spec, target, make(), outputs=["y"])["y"], found)


@each_target
@each_written
@pytest.mark.parametrize(("n_rows", "n"), [(1, 32), (31, 576), (32, 32), (33, 576)])
def test_write(target: Any, fmt: BlockFormat, n_rows: int, n: int) -> None:
    x = np.random.default_rng(n).normal(size=(n_rows, n)).astype(np.float32)
    x[0, :32] = 0

    def make() -> dict[str, Any]:
        rows = np.zeros((n_rows, fmt.row_bytes(n)), np.uint8)
        return {"rows": rows, "x": x, "n_rows": n_rows}

    spec = encode(n=n, fmt=fmt)
    found = assert_threads_agree(spec, target, make, ["rows"])["rows"]
    np.testing.assert_array_equal(found, quantise(x, fmt))
    if n_rows != 32:
        run_guarded(spec, target, make(), outputs=["rows"], n_threads=2)


@each_target
@each_written
@pytest.mark.parametrize("scale", [6e4, 1e8, 1e-8, 1e-38, 1e-42, 0.0])
def test_write_range(target: Any, fmt: BlockFormat, scale: float) -> None:
    x = (np.random.default_rng(5).uniform(-1, 1, (40, 64)) * scale).astype(np.float32)
    x[1, 3], x[1, 4] = scale, -scale  # equals of both signs: the first decides
    x[2, 3], x[2, 4] = -scale, scale
    x[3, 9] = 0 * scale
    x[4] = np.tile([scale, 0.5 * scale / 127], 32)  # ties
    rows = np.zeros((40, fmt.row_bytes(64)), np.uint8)
    args: dict[str, Any] = {"rows": rows, "x": x, "n_rows": 40}
    run_kernel(encode(n=64, fmt=fmt), target, args)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(rows, quantise(x, fmt))


@each_target
@each_written
@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_a_fault_stays_visible(target: Any, fmt: BlockFormat, fault: float) -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 40] = fault
    rows = np.zeros((1, fmt.row_bytes(64)), np.uint8)
    run_kernel(encode(n=64, fmt=fmt), target, {"rows": rows, "x": x, "n_rows": 1})
    with np.errstate(invalid="ignore"):
        decoded = dequantise(rows, fmt, 64)
    assert not np.isfinite(decoded[0, 32:]).all()
    assert fmt.header or np.isfinite(decoded[0, :32]).all()
