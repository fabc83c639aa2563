from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.activations import quantize, row_bytes
from tests.kernels import numpy_ops
from tests.kernels.harness import (
    assert_threads_agree,
    each_target,
    host_targets,
    run_guarded,
    run_kernel,
)

STRESS = (6e4, 1e8, 1e-8, 1e-38, 1e-42, 0.0)


def rows_of(x: np.ndarray) -> np.ndarray:
    return np.zeros((len(x), row_bytes(x.shape[1])), np.uint8)


def check(rows: np.ndarray, x: np.ndarray, weight_bias: int) -> None:
    found = numpy_ops.split_a8(rows, x.shape[1])
    for part, expected in zip(found, numpy_ops.quantize(x, weight_bias), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_row_bytes() -> None:
    assert row_bytes(32) == 64 and row_bytes(2048) == 2048 + 768 and row_bytes(576) == 832
    with pytest.raises(ValueError, match="33"):
        row_bytes(33)


@each_target
@pytest.mark.parametrize("n_tokens", [1, 31, 32, 33])
@pytest.mark.parametrize("n", [32, 160, 2048])
def test_dense(target: Any, n_tokens: int, n: int) -> None:
    x = np.random.default_rng(n + n_tokens).normal(size=(n_tokens, n)).astype(np.float32)

    def make() -> dict[str, Any]:
        return {"y": rows_of(x), "x": x, "n_tokens": n_tokens}

    rows = assert_threads_agree(quantize(n=n), target, make, ["y"])["y"]
    check(rows, x, target.weight_bias)
    padding = {"y": np.arange(row_bytes(n)) >= n + 12 * (n // 32)}
    guarded = run_guarded(
        quantize(n=n), target, make(), outputs=["y"], padding=padding, n_threads=2
    )
    used = ~padding["y"]
    np.testing.assert_array_equal(guarded["y"][:, used], rows[:, used])


@each_target
def test_part_of_each_head(target: Any) -> None:
    """q_nope, the first 128 of each head's 192 values, read where it lies, ends on the last one."""
    n_tokens, heads, width, offset = 3, 5, 192, 64
    q = np.random.default_rng(1).normal(size=(n_tokens, heads, width)).astype(np.float32)
    spec = quantize(n=128, rows_per_token=heads, row_stride=width, offset=offset)
    part = np.ascontiguousarray(q[..., offset:]).reshape(-1, 128)
    args: dict[str, Any] = {"y": rows_of(part), "x": q, "n_tokens": n_tokens}
    padding = {"y": np.arange(row_bytes(128)) >= 128 + 3 * 16}
    check(
        run_guarded(spec, target, args, outputs=["y"], padding=padding)["y"],
        part,
        target.weight_bias,
    )


@settings(max_examples=25, deadline=None)
@given(
    target=st.sampled_from(host_targets()),
    n=st.integers(1, 5).map(lambda blocks: 32 * blocks),
    sizes=st.tuples(*(st.integers(1, 4) for _ in range(3))),
    gaps=st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(0, 9)),
)
def test_any_strides(
    target: Any, n: int, sizes: tuple[int, int, int], gaps: tuple[int, int, int]
) -> None:
    """Rows at any offset, with any gap between rows and between tokens; nothing beyond is read."""
    (n_tokens, rows, n_threads), (offset, row_gap, token_gap) = sizes, gaps
    row_stride = n + row_gap
    token_stride = rows * row_stride + token_gap
    last = (n_tokens - 1) * token_stride + (rows - 1) * row_stride + offset
    x = np.random.default_rng(n).normal(size=last + n).astype(np.float32)
    starts = offset + token_stride * np.arange(n_tokens)[:, None] + row_stride * np.arange(rows)
    part = x[starts.reshape(-1, 1) + np.arange(n)]
    spec = quantize(
        n=n, rows_per_token=rows, token_stride=token_stride, row_stride=row_stride, offset=offset
    )
    args: dict[str, Any] = {"y": rows_of(part), "x": x, "n_tokens": n_tokens}
    padding = {"y": np.arange(row_bytes(n)) >= n + 12 * (n // 32)}
    found = run_guarded(spec, target, args, outputs=["y"], padding=padding, n_threads=n_threads)[
        "y"
    ]
    check(found, part, target.weight_bias)


@each_target
@pytest.mark.parametrize("scale", STRESS)
def test_range(target: Any, scale: float) -> None:
    x = np.random.default_rng(7).uniform(-1, 1, size=(4, 96)) * scale
    x = x.astype(np.float32)
    x[1, 32:64] = 0
    x[2, 0] = scale * 1000
    args: dict[str, Any] = {"y": rows_of(x), "x": x, "n_tokens": 4}
    run_kernel(quantize(n=96), target, args)
    check(args["y"], x, target.weight_bias)


@each_target
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_a_fault_stays_visible(target: Any, fault: float) -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 37] = fault
    args: dict[str, Any] = {"y": rows_of(x), "x": x, "n_tokens": 1}
    run_kernel(quantize(n=64), target, args)
    _, d, _ = numpy_ops.split_a8(args["y"], 64)
    assert np.isfinite(d[0, 0]) and not np.isfinite(d[0, 1])
