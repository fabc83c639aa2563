"""Derived maths and the conversions that every kernel stands on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen import vecmath
from codegen.dtypes import bf16, f16, f32, i32, u8
from codegen.formats import IQ4_NL_VALUES
from codegen.kernel import dim, kernel, ptr
from codegen.kernels.blocks import lookup
from tests.kernels.harness import each_target, run_kernel

EVERY_16 = np.arange(65536, dtype=np.uint32).astype(np.uint16)


@kernel(y=ptr(f32), x=ptr(f32), n=dim())
def apply(k: Any, y: Any, x: Any, n: Any, *, function: str) -> None:
    """y[i] = function(x[i]); n is a multiple of 16."""
    with k.loop(0, n, k.target.lanes) as i:
        v = x.at(i).load(f32 * k.target.lanes)
        y.at(i).store(getattr(vecmath, function)(k, v).to(f32))


@kernel(y=ptr(f32), x=ptr(f16), n=dim())
def widen(k: Any, y: Any, x: Any, n: Any, *, lanes: int) -> None:
    with k.loop(0, n, lanes) as i:
        y.at(i).store(x.at(i).load(f16 * lanes).to(f32))


@kernel(y=ptr(f16), x=ptr(f32), n=dim())
def narrow(k: Any, y: Any, x: Any, n: Any, *, lanes: int) -> None:
    with k.loop(0, n, lanes) as i:
        y.at(i).store(x.at(i).load(f32 * lanes).to(f16))


@kernel(y=ptr(f32), x=ptr(bf16), n=dim())
def widen_bf16(k: Any, y: Any, x: Any, n: Any, *, lanes: int) -> None:
    with k.loop(0, n, lanes) as i:
        y.at(i).store(x.at(i).load(bf16 * lanes).to(f32))


@kernel(y=ptr(bf16), x=ptr(f32), n=dim())
def narrow_bf16(k: Any, y: Any, x: Any, n: Any, *, lanes: int) -> None:
    with k.loop(0, n, lanes) as i:
        y.at(i).store(x.at(i).load(f32 * lanes).to(bf16))


@kernel(y=ptr(f32), x=ptr(f32), n=dim())
def butterfly(k: Any, y: Any, x: Any, n: Any) -> None:
    """y = the row sums of x (lanes, lanes)."""
    lanes = k.target.lanes
    y.store(vecmath.transpose_sum(k, [x.at(i * lanes).load(f32 * lanes) for i in range(lanes)]))


@kernel(y=ptr(i32), x=ptr(i32), n=dim())
def turn4(k: Any, y: Any, x: Any, n: Any) -> None:
    lanes = k.target.lanes
    rows = [x.at(i * lanes).load(i32 * lanes) for i in range(4)]
    for j, column in enumerate(vecmath.transpose4(k, rows)):
        y.at(j * lanes).store(column)


@kernel(y=ptr(f32), x=ptr(f32), n=dim())
def weigh(k: Any, y: Any, x: Any, n: Any) -> None:
    lanes = k.target.lanes
    with k.loop(0, n, lanes) as i:
        y.at(i).store(vecmath.softmax_weight(k, x.at(i).load(f32 * lanes)))


@kernel(y=ptr(u8), x=ptr(u8), n=dim())
def look_up(k: Any, y: Any, x: Any, n: Any, *, lanes: int) -> None:
    with k.loop(0, n, lanes) as i:
        y.at(i).store(lookup(k, IQ4_NL_VALUES, x.at(i).load(u8 * lanes)))


@kernel(y=ptr(u8), x=ptr(u8), n=dim())
def look_up_nibbles(k: Any, y: Any, x: Any, n: Any) -> None:
    lanes = 4 * k.target.lanes
    with k.loop(0, n, lanes) as i:
        codes = x.at(i).load(u8 * lanes)
        y.at(i).store(k.target.lookup_nibble(k, IQ4_NL_VALUES, codes))


def run(target: Any, spec: Any, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    run_kernel(spec, target, {"y": y, "x": x, "n": x.size})
    return y


def applied(target: Any, function: str, x: NDArray[Any]) -> NDArray[Any]:
    x = x.astype(np.float32)
    return run(target, apply(function=function), x, np.empty_like(x))


def f32_samples() -> NDArray[Any]:
    """Every sign, exponent and top mantissa, with ties, near ties and random low bits."""
    high = EVERY_16.astype(np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001], np.uint32)
    bits = np.concatenate([(high[:, None] | low).ravel(), np.arange(1 << 16, dtype=np.uint32)])
    halves = EVERY_16.view(np.float16).astype(np.float32).view(np.uint32)
    bits = np.concatenate([bits, halves + 0x1000, halves + 0xFFF, halves + 0x1001])
    return np.ascontiguousarray(bits[: bits.size // 16 * 16]).view(np.float32)


def same_numbers(found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Bitwise equal, but any NaN stands for any other."""
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan].view(), expected[~is_nan])
    np.testing.assert_array_equal(np.signbit(found[~is_nan]), np.signbit(expected[~is_nan]))


@each_target
def test_f16_to_f32(target: Any) -> None:
    for lanes in (1, 4, target.lanes):
        found = run(target, widen(lanes=lanes), EVERY_16, np.empty(65536, np.float32))
        same_numbers(found, EVERY_16.view(np.float16).astype(np.float32))


@each_target
def test_f32_to_f16(target: Any) -> None:
    x = f32_samples()
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    for lanes in (1, target.lanes):
        found = run(target, narrow(lanes=lanes), x, np.empty(x.size, np.uint16))
        same_numbers(found.view(np.float16), expected)


@each_target
def test_bf16_to_f32(target: Any) -> None:
    for lanes in (1, target.lanes):
        found = run(target, widen_bf16(lanes=lanes), EVERY_16, np.empty(65536, np.float32))
        same_numbers(found, (EVERY_16.astype(np.uint32) << 16).view(np.float32))


@each_target
def test_f32_to_bf16(target: Any) -> None:
    x = f32_samples()
    bits = x.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)
    expected = (np.where(np.isnan(x), 0x7FC0, nearest) << 16).view(np.float32)
    for lanes in (1, target.lanes):
        found = run(target, narrow_bf16(lanes=lanes), x, np.empty(x.size, np.uint16))
        same_numbers((found.astype(np.uint32) << 16).view(np.float32), expected)


@each_target
def test_exp2(target: Any) -> None:
    x = np.concatenate([np.linspace(-126, 127, 40_000), np.linspace(-2, 2, 40_000)])
    x = x.astype(np.float32)
    found = applied(target, "exp2", x).astype(np.float64)
    assert np.abs(found / np.exp2(x.astype(np.float64)) - 1).max() < 2.5e-7
    ends = np.array([-np.inf, -1e8, -127.0, 0.0, 127.0, 128.0, 1e8, np.inf] * 2)
    expected = np.array([2.0**-126] * 3 + [1.0] + [2.0**127] * 4)
    np.testing.assert_array_equal(applied(target, "exp2", ends), np.tile(expected, 2))
    assert np.isnan(applied(target, "exp2", np.full(16, np.nan))).all()


@each_target
def test_round_to_int(target: Any) -> None:
    x = np.concatenate([np.arange(-400, 400) / 4, [4e6, -4e6] * 8]).astype(np.float32)
    np.testing.assert_array_equal(applied(target, "round_to_int", x), np.rint(x))


@each_target
@pytest.mark.parametrize("function", ["sigmoid", "silu"])
def test_sigmoid_and_silu(target: Any, function: str) -> None:
    x = np.concatenate([np.linspace(-80, 80, 4000), [6e4, -6e4, 1e8, -1e8, 1e-8, -1e-8, 0.0, -0.0]])
    x = np.resize(x, 4016).astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        expected = 1 / (1 + np.exp(-x))
    expected = expected * x if function == "silu" else expected
    found = applied(target, function, x)
    np.testing.assert_allclose(found, expected, rtol=6e-6, atol=1e-30)
    assert np.isnan(applied(target, function, np.full(16, np.nan))).all()


@each_target
def test_lanes_are_moved_right(target: Any) -> None:
    lanes = target.lanes
    x = np.arange(lanes * lanes, dtype=np.float32).reshape(lanes, lanes)
    np.testing.assert_array_equal(
        run(target, butterfly(), x, np.empty(lanes, np.float32)), x.sum(1)
    )
    rows = np.arange(4 * lanes, dtype=np.int32).reshape(4, lanes)
    found = run(target, turn4(), rows, np.empty((4, lanes), np.int32))
    groups = rows.reshape(4, lanes // 4, 4)
    np.testing.assert_array_equal(found, groups.transpose(2, 1, 0).reshape(4, lanes))


@each_target
def test_softmax_weight_is_never_denormal(target: Any) -> None:
    x = np.linspace(-160, 0, 256, dtype=np.float32)
    x[0], x[1] = np.nan, -1e30
    found = run(target, weigh(), x, np.empty(256, np.float32))
    assert np.isnan(found[0])
    far = x[1:] < -64
    assert not found[1:][far].any()
    np.testing.assert_allclose(found[1:][~far], np.exp2(x[1:][~far].astype(np.float64)), rtol=1e-6)


@each_target
def test_lookup16(target: Any) -> None:
    x = np.resize(np.arange(16, dtype=np.uint8), 256)
    np.random.default_rng(0).shuffle(x)
    expected = np.array(IQ4_NL_VALUES, np.int8)[x].view(np.uint8)
    for lanes in {4, 8, 16, 4 * target.lanes}:
        found = run(target, look_up(lanes=lanes), x, np.empty(256, np.uint8))
        np.testing.assert_array_equal(found, expected)


@each_target
def test_lookup_nibble_ignores_the_upper_bits(target: Any) -> None:
    x = np.random.default_rng(0).permutation(256).astype(np.uint8)
    expected = np.array(IQ4_NL_VALUES, np.int8)[x & 15].view(np.uint8)
    found = run(target, look_up_nibbles(), x, np.empty(256, np.uint8))
    np.testing.assert_array_equal(found, expected)
