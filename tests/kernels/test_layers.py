from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen.formats import WEIGHT_FORMATS, BlockFormat
from codegen.kernels.layers import add, embed, rms_norm, rope_q, silu_mul, take_rows
from mlacli.gguf.quants import dequantise, quantise
from tests.kernels import numpy_ops
from tests.kernels.harness import (
    Array,
    assert_threads_agree,
    each_target,
    nmse,
    run_guarded,
    run_kernel,
)

EPS = 1e-6
each_count = pytest.mark.parametrize("n_tokens", [1, 31, 32, 33])
each_width = pytest.mark.parametrize("n", [32, 160, 2048])
each_scale = pytest.mark.parametrize("scale", [6e4, 1e8, 1e-8, 0.0])


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run_all(spec: Any, target: Any, args: dict[str, Any], output: str = "y") -> Array:
    """The output, the same for all thread counts and between guard pages."""

    def make() -> dict[str, Any]:
        return args | {output: np.zeros_like(args[output])}

    found = assert_threads_agree(spec, target, make, [output])[output]
    guarded = run_guarded(spec, target, args, outputs=[output], n_threads=2)
    np.testing.assert_array_equal(guarded[output], found)
    return found


@each_target
@each_count
@each_width
def test_rms_norm(target: Any, n_tokens: int, n: int) -> None:
    x, w = normal(n_tokens, n), normal(n, seed=1)
    args: dict[str, Any] = {"y": x, "x": x, "w": w, "n_tokens": n_tokens}
    found = run_all(rms_norm(n=n, eps=EPS), target, args)
    np.testing.assert_allclose(found, numpy_ops.rms_norm(x, w, EPS), rtol=2e-6)


@each_target
@each_scale
def test_rms_norm_range(target: Any, scale: float) -> None:
    x, w = normal(3, 512) * np.float32(scale), normal(512, seed=1)
    args: dict[str, Any] = {"y": np.empty_like(x), "x": x, "w": w, "n_tokens": 3}
    run_kernel(rms_norm(n=512, eps=EPS), target, args)
    np.testing.assert_allclose(args["y"], numpy_ops.rms_norm(x, w, EPS), rtol=2e-6)


@each_target
def test_rms_norm_of_a_part(target: Any) -> None:
    """The latent part of kv_a's output; the rotated part behind it is not read."""
    kv_a, w = normal(5, 192), normal(128, seed=1)
    spec = rms_norm(n=128, eps=EPS, x_stride=192, x_offset=64)
    found = run_all(spec, target, {"y": normal(5, 128), "x": kv_a, "w": w, "n_tokens": 5})
    np.testing.assert_allclose(found, numpy_ops.rms_norm(kv_a[:, 64:], w, EPS), rtol=2e-6)


@each_target
@pytest.mark.parametrize(
    "fmt", [f for f in WEIGHT_FORMATS.values() if not f.groups], ids=lambda fmt: fmt.name
)
@pytest.mark.parametrize("n_tokens", [1, 33])
def test_embed(target: Any, fmt: BlockFormat, n_tokens: int) -> None:
    w = quantise(normal(50, 160), fmt)
    tokens = np.random.default_rng(2).integers(0, 50, n_tokens).astype(np.int32)
    tokens[-1] = 49
    args: dict[str, Any] = {
        "y": normal(n_tokens, 160),
        "w": w,
        "tokens": tokens,
        "n_tokens": n_tokens,
    }
    found = run_all(embed(n=160, fmt=fmt), target, args)
    np.testing.assert_array_equal(found, dequantise(w, fmt, 160)[tokens])


@each_target
@each_count
@each_width
def test_silu_mul_and_add(target: Any, n_tokens: int, n: int) -> None:
    a, b = normal(n_tokens, n), normal(n_tokens, n, seed=1)
    args: dict[str, Any] = {"y": np.empty_like(a), "n_tokens": n_tokens}
    found = run_all(silu_mul(n=n), target, args | {"gate": a * 8, "up": b})
    np.testing.assert_allclose(found, numpy_ops.silu(a * 8) * b, rtol=3e-6, atol=1e-30)
    found = run_all(add(n=n), target, args | {"a": a, "b": b})
    np.testing.assert_array_equal(found, a + b)


@each_target
@each_scale
def test_silu_range(target: Any, scale: float) -> None:
    gate, up = normal(2, 64) * np.float32(scale), normal(2, 64, seed=1)
    args: dict[str, Any] = {"y": np.empty_like(up), "gate": gate, "up": up, "n_tokens": 2}
    run_kernel(silu_mul(n=64), target, args)
    np.testing.assert_allclose(args["y"], numpy_ops.silu(gate) * up, rtol=3e-6, atol=1e-28)


@each_target
@pytest.mark.parametrize("n_out", [1, 31, 32, 33])
def test_take_rows(target: Any, n_out: int) -> None:
    x = normal(40, 96)
    rows = np.random.default_rng(3).integers(0, 40, n_out).astype(np.int32)
    rows[-1] = 39
    args: dict[str, Any] = {"y": normal(n_out, 96), "x": x, "out_rows": rows, "n_out": n_out}
    np.testing.assert_array_equal(run_all(take_rows(n=96), target, args), x[rows])


HEADS, NOPE, ROPE, LORA = 5, 96, 32, 160


@each_target
@each_count
def test_rope_in_place(target: Any, n_tokens: int) -> None:
    q, table = normal(n_tokens, HEADS, NOPE + ROPE), numpy_ops.rope_table(n_tokens, ROPE)
    width = NOPE + ROPE
    spec = rope_q(
        n_heads=HEADS, n_rope=ROPE, x_stride=width, x_offset=NOPE, y_stride=width, y_offset=NOPE
    )
    expected = q.astype(np.float64)
    expected[..., NOPE:] = numpy_ops.rope(q[..., NOPE:], table)
    for n_threads in (1, 2, 3, 5):
        found = q.copy()
        args: dict[str, Any] = {"y": found, "x": found, "rope": table, "n_tokens": n_tokens}
        run_kernel(spec, target, args, n_threads, jitter=True)
        np.testing.assert_array_equal(found[..., :NOPE], q[..., :NOPE])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@each_target
@each_count
@pytest.mark.parametrize("n_rope", [32, 64])
def test_rope_into_the_absorbed_query(target: Any, n_tokens: int, n_rope: int) -> None:
    """Only the rotated part of each head is written, at its place behind the latent part."""
    q, table = normal(n_tokens, HEADS, NOPE + n_rope), numpy_ops.rope_table(n_tokens, n_rope)
    spec = rope_q(
        n_heads=HEADS,
        n_rope=n_rope,
        x_stride=NOPE + n_rope,
        x_offset=NOPE,
        y_stride=LORA + n_rope,
        y_offset=LORA,
    )
    y = np.empty((n_tokens, HEADS, LORA + n_rope), np.float32)
    args: dict[str, Any] = {"y": y, "x": q, "rope": table, "n_tokens": n_tokens}
    padding = {"y": np.arange(LORA + n_rope) < LORA}
    found = run_guarded(spec, target, args, outputs=["y"], padding=padding, n_threads=3)["y"]
    expected = numpy_ops.rope(q[..., NOPE:], table)
    assert nmse(found[..., LORA:], expected) < 1e-13
    np.testing.assert_allclose(found[..., LORA:], expected, rtol=1e-5, atol=1e-6)
