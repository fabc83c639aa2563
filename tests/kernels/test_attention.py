"""Flash attention against float64 numpy: every kind, cache format and target of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen.formats import BF16, CACHE_FORMATS, F16, F32, LATENT_CACHE_TYPES, Q8_KV, BlockFormat
from codegen.kernels.attention import ABSORBED, STANDARD, flash_attn, flash_scratch_bytes
from codegen.targets.base import Target
from tests.kernels.attention_cases import (
    CELLS,
    SCALE,
    TOKENS,
    Case,
    attention,
    limit,
    make_cache,
    stored,
)
from tests.kernels.harness import (
    assert_threads_agree,
    each_target,
    host_targets,
    nmse,
    run_guarded,
    run_kernel,
)


def flash_case(
    kind: str, n_tokens: int, n_kv: int, sizes: dict[str, Any], max_tokens: int, n_threads: int = 1
) -> Case:
    rng = np.random.default_rng(n_tokens * 1000 + n_kv)
    n_head, d_k, d_v = (sizes[name] for name in ("n_head", "d_k", "d_v"))
    cache = make_cache(n_tokens, n_kv, seed=n_kv)
    q = rng.standard_normal((n_tokens, n_head, d_k)).astype(np.float32)
    if kind == ABSORBED:
        k_cache, rows = stored(rng.standard_normal((n_kv, d_k)), sizes["fmt_k"], cache.used)
        v_cache, keys = k_cache, np.repeat(rows[:, None], n_head, axis=1)
        values = keys[..., :d_v]
    else:
        shape = (n_kv, n_head, d_k)
        k_cache, keys = stored(rng.standard_normal(shape), sizes["fmt_k"], cache.used)
        shape = (n_kv, n_head, d_v)
        v_cache, values = stored(rng.standard_normal(shape), sizes["fmt_v"], cache.used)
    scratch_bytes = flash_scratch_bytes(
        max_tokens, n_kv, n_threads, kind=kind, n_head=n_head, d_k=d_k, d_v=d_v
    )
    args = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "pos": cache.pos,
        "seq": cache.seq,
        "cell_pos": cache.cell_pos,
        "cell_seq": cache.cell_seq,
        "out": np.full((n_tokens, n_head, d_v), np.nan, np.float32),
        "scratch": np.full(scratch_bytes // 4, np.nan, np.float32),
        "n_tokens": n_tokens,
        "n_kv": n_kv,
    }
    return Case(args, attention(q, keys, values, cache.visible))


def flash_sizes(kind: str, n_head: int, d_k: int, d_v: int, fmt: BlockFormat) -> dict[str, Any]:
    return {"kind": kind, "n_head": n_head, "d_k": d_k, "d_v": d_v, "fmt_k": fmt, "fmt_v": fmt}


def check_flash(
    target: Target, n_tokens: int, n_kv: int, max_tokens: int, sizes: dict[str, Any]
) -> None:
    case = flash_case(sizes["kind"], n_tokens, n_kv, sizes, max_tokens)
    spec = flash_attn(**sizes, max_tokens=max_tokens, scale=SCALE)
    run_kernel(spec, target, case.args)
    assert np.isfinite(case.args["out"]).all()
    assert nmse(case.args["out"], case.expected) <= limit(sizes["fmt_k"]), (n_tokens, n_kv)


@each_target
@pytest.mark.parametrize("kind", [ABSORBED, STANDARD])
def test_flash_over_batch_and_cache_sizes(target: Target, kind: str) -> None:
    d_k, d_v = (160, 128) if kind == ABSORBED else (96, 64)
    sizes = flash_sizes(kind, 5, d_k, d_v, F16)
    for n_kv in CELLS:
        for n_tokens in TOKENS:
            check_flash(target, n_tokens, n_kv, 33, sizes)
        check_flash(target, 1, n_kv, 1, sizes)


@each_target
@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_flash_reads_every_format(target: Target, name: str) -> None:
    if name in LATENT_CACHE_TYPES:
        check_flash(target, 7, 257, 7, flash_sizes(ABSORBED, 4, 192, 160, CACHE_FORMATS[name]))
    check_flash(target, 7, 33, 7, flash_sizes(STANDARD, 2, 96, 160, CACHE_FORMATS[name]))


@each_target
@pytest.mark.parametrize("n_head", [1, 4, 16])
def test_flash_of_full_size_heads(target: Target, n_head: int) -> None:
    check_flash(target, 1, 700, 1, flash_sizes(ABSORBED, n_head, 576, 512, Q8_KV))


@pytest.mark.parametrize("kind", [ABSORBED, STANDARD])
@pytest.mark.parametrize("n_tokens", [1, 7])
@pytest.mark.parametrize("fmt", [F32, F16, Q8_KV], ids=lambda f: f.name)
def test_flash_does_not_depend_on_threads(kind: str, n_tokens: int, fmt: BlockFormat) -> None:
    sizes = flash_sizes(kind, 4, 192, 128, fmt)
    spec = flash_attn(**sizes, max_tokens=7, scale=SCALE)
    found = assert_threads_agree(
        spec,
        host_targets()[0],
        lambda: flash_case(kind, n_tokens, 700, sizes, 7, n_threads=5).args,
        ["out"],
    )
    expected = flash_case(kind, n_tokens, 700, sizes, 7).expected
    assert nmse(found["out"], expected) <= limit(fmt)


@each_target
@pytest.mark.parametrize("kind", [ABSORBED, STANDARD])
def test_flash_keeps_to_its_arrays(target: Target, kind: str) -> None:
    for fmt, d_k, d_v in ((Q8_KV, 160, 128), (Q8_KV, 192, 128), (F16, 160, 128)):
        sizes = flash_sizes(kind, 5, d_k, d_v, fmt)
        spec = flash_attn(**sizes, max_tokens=3, scale=SCALE)
        for n_tokens, n_kv in ((1, 257), (3, 31)):
            case = flash_case(kind, n_tokens, n_kv, sizes, 3)
            found = run_guarded(spec, target, case.args, outputs=["out"], updates=["scratch"])
            assert nmse(found["out"], case.expected) <= limit(fmt)


@pytest.mark.parametrize("fmt", [F32, Q8_KV], ids=lambda f: f.name)
def test_a_token_without_visible_cells_gets_zeros(fmt: BlockFormat) -> None:
    sizes = flash_sizes(ABSORBED, 2, 96, 64, fmt)
    case = flash_case(ABSORBED, 4, 40, sizes, 4)
    case.args["cell_seq"][:] = 9
    run_kernel(flash_attn(**sizes, max_tokens=4, scale=SCALE), host_targets()[0], case.args)
    assert not case.args["out"].any()


@pytest.mark.parametrize("where", ["q", "k_cache"])
def test_nan_reaches_the_output(where: str) -> None:
    sizes = flash_sizes(STANDARD, 1, 96, 64, F32)
    case = flash_case(STANDARD, 1, 33, sizes, 4)
    case.args["cell_seq"][:], case.args["cell_pos"][:] = case.args["seq"][0], 0
    case.args["k_cache"].view(np.float32)[:] = 1
    case.args["v_cache"].view(np.float32)[:] = 1
    case.args[where].reshape(-1).view(np.float32)[5] = np.nan
    run_kernel(flash_attn(**sizes, max_tokens=4, scale=SCALE), host_targets()[0], case.args)
    assert np.isnan(case.args["out"]).all()


@pytest.mark.parametrize("fmt", [F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("where", ["q", "k_cache", "v_cache"])
def test_nan_reaches_the_output_of_codes(where: str, fmt: BlockFormat) -> None:
    """One in a row of q or of the cache spoils what the row takes part in, not less."""
    sizes = flash_sizes(STANDARD, 1, 96, 64, fmt)
    case = flash_case(STANDARD, 7, 33, sizes, 7)
    case.args["cell_seq"][:], case.args["cell_pos"][:] = case.args["seq"][0], 0
    case.args["seq"][:] = case.args["seq"][0]
    for name in ("k_cache", "v_cache"):
        case.args[name].view(np.uint16)[:] = 0x3C00
    if where == "q":
        case.args["q"][:, 0, 5] = np.nan
    else:
        case.args[where].reshape(-1).view(np.uint16)[5] = 0x7FFF
    run_kernel(flash_attn(**sizes, max_tokens=7, scale=SCALE), host_targets()[0], case.args)
    assert np.isnan(case.args["out"]).all()


@each_target
def test_outliers_do_not_overflow_sums(target: Target) -> None:
    """Rows of equal magnitudes, where sums come as close to the largest i32 as they can, and rows
    where one number is far above the others."""
    for name in ("q8_KV", "q8_0", "f16", "bf16"):
        sizes = flash_sizes(ABSORBED, 4, 576, 512, CACHE_FORMATS[name])
        case = flash_case(ABSORBED, 7, 257, sizes, 7)
        q, cells = case.args["q"], len(case.args["cell_pos"])
        values = np.full((cells, 576), 3.0)
        values[::2, 7] = 30.0
        q[...] = 1e-3
        q[:, :, 7] *= np.linspace(1, 30, q[:, :, 7].size).reshape(q.shape[:2])
        used = (case.args["cell_seq"] >= 0) & (case.args["cell_seq"] < 2)
        rows, decoded = stored(values, sizes["fmt_k"], used)
        case.args["k_cache"][:] = rows
        case.args["v_cache"] = case.args["k_cache"]
        keys = np.repeat(decoded[:, None], 4, axis=1)
        visible = (case.args["cell_seq"] == case.args["seq"][:, None]) & (
            case.args["cell_pos"] <= case.args["pos"][:, None]
        )
        run_kernel(flash_attn(**sizes, max_tokens=7, scale=SCALE), target, case.args)
        expected = attention(q, keys, keys[..., :512], visible)
        assert nmse(case.args["out"], expected) <= limit(sizes["fmt_k"]), name


def test_large_scores_stay_finite() -> None:
    sizes = flash_sizes(ABSORBED, 4, 96, 64, F32)
    case = flash_case(ABSORBED, 7, 257, sizes, 7)
    case.args["q"] *= 1e4
    run_kernel(flash_attn(**sizes, max_tokens=7, scale=SCALE), host_targets()[0], case.args)
    assert np.isfinite(case.args["out"]).all()


def test_flash_scratch_stays_small() -> None:
    lite = flash_scratch_bytes(512, 163840, 16, kind=ABSORBED, n_head=16, d_k=576, d_v=512)
    full = flash_scratch_bytes(512, 163840, 16, kind=ABSORBED, n_head=128, d_k=576, d_v=512)
    assert lite <= 10 << 20 and full <= 40 << 20
