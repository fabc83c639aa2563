"""Random matrices in every storage format, activations to go with them, and what is expected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen.formats import BF16, F16, F32, IQ4_NL, Q4_0, Q8_0, BlockFormat
from codegen.kernels.activations import row_bytes
from mlacli.gguf.quants import dequantise, quantise
from tests.kernels import numpy_ops

Array = NDArray[Any]

FORMATS = (F32, F16, BF16, Q8_0, Q4_0, IQ4_NL)
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
# An f32 sum may be off by this much of the sum of its terms' sizes.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Rows:
    """The bytes of some rows, and the f64 values they stand for."""

    data: Array  # u8 (rows, bytes)
    values: Array  # f64 (rows, n)


def weights(fmt: BlockFormat, n_rows: int, n: int, rng: np.random.Generator) -> Rows:
    """Normal values, as the format can hold them."""
    data = quantise(rng.normal(size=(n_rows, n)).astype(np.float32), fmt)
    return Rows(data, dequantise(data, fmt, n).astype(np.float64))


def exact_weights(fmt: BlockFormat, n_rows: int, n: int, rng: np.random.Generator) -> Rows:
    """Any codes the format has, with scales 1/2, 1 or 2; whole numbers up to 127 for floats."""
    if not fmt.is_quantised:
        whole = rng.integers(-127, 128, (n_rows, n)).astype(np.float32)
        return Rows(quantise(whole, fmt), whole.astype(np.float64))
    blocks = rng.integers(0, 256, (n_rows, n // 32, fmt.block_bytes), dtype=np.uint8)
    at = fmt.field_offset("d")
    scales = rng.choice(np.array([0.5, 1.0, 2.0], np.float16), (n_rows, n // 32, 1))
    blocks[..., at : at + 2] = scales.view(np.uint8)
    data = blocks.reshape(n_rows, fmt.row_bytes(n))
    return Rows(data, dequantise(data, fmt, n).astype(np.float64))


def activations(fmt: BlockFormat, bias: int, n_rows: int, n: int, rng: np.random.Generator) -> Rows:
    """Normal values as the format's kernels read them: a8 rows, or f32 for float weights."""
    x = rng.normal(size=(n_rows, n)).astype(np.float32)
    if not fmt.integer_dot:
        return Rows(x.view(np.uint8), x.astype(np.float64))
    codes, d, sums = numpy_ops.quantize(x, bias)
    return a8_rows(codes, d, sums)


def exact_activations(
    fmt: BlockFormat, bias: int, n_rows: int, n: int, rng: np.random.Generator, top: int = 7
) -> Rows:
    """Whole numbers up to `top`, in a8 times a power of two."""
    codes = rng.integers(-top, top + 1, (n_rows, n)).astype(np.int8)
    if not fmt.integer_dot:
        x = codes.astype(np.float32)
        return Rows(x.view(np.uint8), x.astype(np.float64))
    d = rng.choice(np.array([0.5, 1.0], np.float32), (n_rows, n // 32))
    sums = -bias * codes.reshape(n_rows, -1, 32).sum(axis=-1, dtype=np.int32)
    return a8_rows(codes, d, sums)


def a8_rows(codes: Array, d: Array, sums: Array) -> Rows:
    values = codes.astype(np.float64) * np.repeat(d.astype(np.float64), 32, axis=-1)
    return Rows(numpy_ops.join_a8(codes, d, sums, row_bytes(codes.shape[1])), values)


def assert_close(found: Array, expected: Array, sizes: Array) -> None:
    """`sizes` are the sums of the terms' absolute values: what rounding errors are relative to."""
    error = np.abs(found.astype(np.float64) - expected)
    worst = np.max(error - TOLERANCE * sizes, initial=-1.0)
    assert worst <= 0, f"error {error.max():.3g} where the terms sum to {sizes.max():.3g}"
