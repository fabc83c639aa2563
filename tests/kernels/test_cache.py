from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from codegen.formats import (
    CACHE_FORMATS,
    F16,
    F32,
    LATENT_CACHE_TYPES,
    Q4_0,
    Q8_0,
    Q8_KV,
    BlockFormat,
)
from codegen.kernels.cache import (
    Heads,
    Latent,
    store_kv,
    store_kv_transposed,
    store_latent,
    store_latent_both_ways,
)
from mlacli.gguf.quants import quantise
from tests.kernels import numpy_ops
from tests.kernels.harness import (
    Array,
    assert_threads_agree,
    each_target,
    run_guarded,
    run_kernel,
)

LATENT = Latent(n_lora=160, n_rope=32, eps=1e-6)
HEADS = Heads(n_heads=5, n_nope=96, n_rope=32, n_v=160, n_lora=160)
SMALL = replace(HEADS, n_v=64)
N_CTX = 50
each_count = pytest.mark.parametrize("n_tokens", [1, 31, 32, 33])


def some_cells(n_tokens: int) -> Array:
    """Distinct cells in no order, the last and first of the cache among them."""
    between = np.random.default_rng(n_tokens).permutation(np.arange(1, N_CTX - 1))
    return np.array([N_CTX - 1, 0, *between][:n_tokens], np.int32)


def inputs(n_tokens: int, latent: Latent = LATENT, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(n_tokens)
    return {
        "kv_a": (rng.normal(size=(n_tokens, latent.width)) * scale).astype(np.float32),
        "w": rng.normal(size=latent.n_lora).astype(np.float32),
        "rope": numpy_ops.rope_table(n_tokens, latent.n_rope),
        "cells": some_cells(n_tokens),
        "n_tokens": n_tokens,
    }


def latent_rows(given: dict[str, Any], latent: Latent = LATENT) -> Array:
    c_kv = numpy_ops.rms_norm(given["kv_a"][:, : latent.n_lora], given["w"], latent.eps)
    k_pe = numpy_ops.rope(given["kv_a"][:, latent.n_lora :], given["rope"])
    return np.concatenate([c_kv, k_pe], axis=1)


def old_rows(n_rows: int, row_bytes: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (n_rows, row_bytes), np.uint8)


def stored_f32(target: Any, given: dict[str, Any], latent: Latent = LATENT) -> Array:
    """The rows that an f32 cache gets: other formats must hold exactly these, quantised."""
    cache = np.zeros((N_CTX, latent.width), np.float32)
    run_kernel(store_latent(latent=latent, fmt=F32), target, given | {"cache": cache})
    return np.asarray(cache[given["cells"]])


@each_target
@each_count
@pytest.mark.parametrize("name", LATENT_CACHE_TYPES)
def test_store_latent(target: Any, n_tokens: int, name: str) -> None:
    given, fmt = inputs(n_tokens), CACHE_FORMATS[name]
    rows = stored_f32(target, given)
    np.testing.assert_allclose(rows, latent_rows(given), rtol=1e-5, atol=2e-6)
    old = old_rows(N_CTX, fmt.row_bytes(LATENT.width))
    expected = old.copy()
    expected[given["cells"]] = quantise(rows, fmt)
    spec = store_latent(latent=LATENT, fmt=fmt)
    found = assert_threads_agree(spec, target, lambda: given | {"cache": old.copy()}, ["cache"])
    np.testing.assert_array_equal(found["cache"], expected)
    if n_tokens != 32:
        guarded = run_guarded(spec, target, given | {"cache": old}, outputs=[], updates=["cache"])
        np.testing.assert_array_equal(guarded["cache"], expected)


@each_target
def test_store_latent_of_deepseek(target: Any) -> None:
    latent = Latent(n_lora=512, n_rope=64, eps=1e-6)
    given = inputs(3, latent)
    rows = stored_f32(target, given, latent)
    np.testing.assert_allclose(rows, latent_rows(given, latent), rtol=1e-5, atol=2e-6)


@each_target
@each_count
@pytest.mark.parametrize("name", ["f16", "q8_KV", "f32"])
def test_store_latent_both_ways(target: Any, n_tokens: int, name: str) -> None:
    given, fmt = inputs(n_tokens), CACHE_FORMATS[name]
    given["n_ctx"] = N_CTX
    cache = old_rows(N_CTX, fmt.row_bytes(LATENT.width))
    kv_t = np.full((LATENT.n_lora, N_CTX), 7, np.float32 if name == "f32" else np.float16)
    spec = store_latent_both_ways(latent=LATENT, fmt=fmt)

    def make() -> dict[str, Any]:
        return given | {"cache": cache.copy(), "kv_t": kv_t.copy()}

    found = assert_threads_agree(spec, target, make, ["cache", "kv_t"])
    without = {key: v for key, v in given.items() if key != "n_ctx"}
    rows, cells = stored_f32(target, without), given["cells"]
    cache[cells] = quantise(rows, fmt)
    np.testing.assert_array_equal(found["cache"], cache)
    kv_t[:, cells] = rows[:, : LATENT.n_lora].T.astype(kv_t.dtype)
    np.testing.assert_array_equal(found["kv_t"], kv_t)
    if n_tokens != 32:
        run_guarded(spec, target, make(), outputs=[], updates=["cache", "kv_t"], n_threads=2)


def kv_inputs(n_tokens: int, heads: Heads) -> dict[str, Any]:
    given = inputs(n_tokens)
    del given["w"]
    shape = (n_tokens, heads.n_heads, heads.kv_width)
    given["kv"] = np.random.default_rng(9).normal(size=shape).astype(np.float32)
    return given


def check_k(target: Any, found: Array, old: Array, given: dict[str, Any], fmt: BlockFormat) -> None:
    """K rows are k_nope exactly, k_pe to f32's accuracy; other formats are exact on top of that."""
    n_tokens, cells = given["n_tokens"], given["cells"]
    k_pe = numpy_ops.rope(given["kv_a"][:, HEADS.n_lora :], given["rope"])
    shape = (n_tokens, HEADS.n_heads, HEADS.n_rope)
    rows = np.empty((n_tokens, HEADS.n_heads, HEADS.k_width), np.float32)
    rows[..., : HEADS.n_nope] = given["kv"][..., : HEADS.n_nope]
    without = {name: given[name] for name in ("kv_a", "rope", "cells", "n_tokens")}
    rotated = stored_f32(target, without | {"w": np.ones(LATENT.n_lora, np.float32)})
    rows[..., HEADS.n_nope :] = rotated[:, None, LATENT.n_lora :]
    np.testing.assert_allclose(
        rows[..., HEADS.n_nope :], np.broadcast_to(k_pe[:, None], shape), rtol=1e-5, atol=2e-6
    )
    expected = old.copy().reshape(N_CTX, HEADS.n_heads, -1)
    flat = quantise(rows.reshape(-1, HEADS.k_width), fmt)
    expected[cells] = flat.reshape(n_tokens, HEADS.n_heads, -1)
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


@each_target
@pytest.mark.parametrize("name", CACHE_FORMATS)
@pytest.mark.parametrize("n_tokens", [1, 33])
def test_store_kv(target: Any, name: str, n_tokens: int) -> None:
    fmt_k, fmt_v = CACHE_FORMATS[name], Q4_0 if name == "q8_0" else CACHE_FORMATS[name]
    given = kv_inputs(n_tokens, HEADS)
    k_cache = old_rows(N_CTX * HEADS.n_heads, fmt_k.row_bytes(HEADS.k_width))
    v_cache = old_rows(N_CTX * HEADS.n_heads, fmt_v.row_bytes(HEADS.n_v))
    spec = store_kv(heads=HEADS, fmt_k=fmt_k, fmt_v=fmt_v)

    def make() -> dict[str, Any]:
        return given | {"k_cache": k_cache.copy(), "v_cache": v_cache.copy()}

    found = assert_threads_agree(spec, target, make, ["k_cache", "v_cache"])
    check_k(target, found["k_cache"], k_cache, given, fmt_k)
    expected = v_cache.copy().reshape(N_CTX, HEADS.n_heads, -1)
    values = np.ascontiguousarray(given["kv"][..., HEADS.n_nope :]).reshape(-1, HEADS.n_v)
    expected[given["cells"]] = quantise(values, fmt_v).reshape(n_tokens, HEADS.n_heads, -1)
    np.testing.assert_array_equal(found["v_cache"], expected.reshape(v_cache.shape))
    run_guarded(spec, target, make(), outputs=[], updates=["k_cache", "v_cache"])


@each_target
@each_count
@pytest.mark.parametrize(
    ("fmt", "fmt_v"), [(Q8_0, F16), (Q8_KV, F16), (F16, F32)], ids=lambda fmt: fmt.name
)
def test_store_kv_transposed(
    target: Any, fmt: BlockFormat, fmt_v: BlockFormat, n_tokens: int
) -> None:
    given = kv_inputs(n_tokens, SMALL) | {"n_ctx": N_CTX}
    k_cache = old_rows(N_CTX * SMALL.n_heads, fmt.row_bytes(SMALL.k_width))
    dtype = np.float32 if fmt_v is F32 else np.float16
    v_t = np.full((SMALL.n_heads, SMALL.n_v, N_CTX), 7, dtype)
    spec = store_kv_transposed(heads=SMALL, fmt_k=fmt, fmt_v=fmt_v)

    def make() -> dict[str, Any]:
        return given | {"k_cache": k_cache.copy(), "v_t": v_t.copy()}

    found = assert_threads_agree(spec, target, make, ["k_cache", "v_t"])
    check_k(target, found["k_cache"], k_cache, given, fmt)
    values = given["kv"][..., SMALL.n_nope :].astype(dtype)
    v_t[:, :, given["cells"]] = values.transpose(1, 2, 0)
    np.testing.assert_array_equal(found["v_t"], v_t)
    if n_tokens != 32:
        run_guarded(spec, target, make(), outputs=[], updates=["k_cache", "v_t"], n_threads=3)


@each_target
@pytest.mark.parametrize("name", LATENT_CACHE_TYPES)
@pytest.mark.parametrize("scale", [6e4, 1e8, 1e-8, 0.0])
def test_range(target: Any, name: str, scale: float) -> None:
    """The norm brings any scale back; k_pe has none and overflows f16 to infinity, as it must."""
    given, fmt = inputs(4, scale=scale), CACHE_FORMATS[name]
    rows = stored_f32(target, given)
    np.testing.assert_allclose(rows, latent_rows(given), rtol=1e-5, atol=2e-6 * max(scale, 1e-9))
    cache = np.zeros((N_CTX, fmt.row_bytes(LATENT.width)), np.uint8)
    run_kernel(store_latent(latent=LATENT, fmt=fmt), target, given | {"cache": cache})
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(cache[given["cells"]], quantise(rows, fmt))
