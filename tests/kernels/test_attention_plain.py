"""Attention without flash against float64 numpy: scores, softmax, weighted sum, transposed copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen.dtypes import DType, f16, f32
from codegen.formats import CACHE_FORMATS, F16, LATENT_CACHE_TYPES, Q5_0, Q8_KV, BlockFormat
from codegen.kernels.attention import ABSORBED, STANDARD
from codegen.kernels.attention_few import kq_few
from codegen.kernels.attention_plain import (
    kq,
    kq_scratch_bytes,
    kqv,
    soft_max,
    transpose_c,
)
from codegen.targets.base import Target
from tests.kernels.attention_cases import (
    CELLS,
    LIMIT,
    SCALE,
    TOKENS,
    Array,
    Case,
    make_cache,
    softmax_values,
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

N_HEAD, HEAD_START, N_SLICE = 5, 1, 3
NUMPY = {f16: np.float16, f32: np.float32}


def padded(n_kv: int) -> int:
    return -(-n_kv // 16) * 16


def score_case(kind: str, n_tokens: int, n_kv: int, d_k: int, fmt: BlockFormat) -> Case:
    """kq of heads 1 to 3 of 5."""
    rng = np.random.default_rng(n_kv)
    cache = make_cache(n_tokens, n_kv, seed=n_kv)
    q = rng.standard_normal((n_tokens, N_HEAD, d_k)).astype(np.float32)
    shape = (n_kv, d_k) if kind == ABSORBED else (n_kv, N_HEAD, d_k)
    k_cache, keys = stored(rng.standard_normal(shape), fmt, cache.used)
    keys = np.repeat(keys[:, None], N_HEAD, axis=1) if kind == ABSORBED else keys
    heads = slice(HEAD_START, HEAD_START + N_SLICE)
    scores = SCALE * np.einsum("thd,jhd->htj", q[:, heads], keys[:, heads])
    expected = np.full((N_SLICE, n_tokens, padded(n_kv)), -1e30)
    expected[..., :n_kv] = np.where(cache.visible, scores, -1e30)
    n_bytes = kq_scratch_bytes(n_tokens, 5, kind=kind, n_slice=N_SLICE, d_k=d_k)
    args = {
        "s": np.full(expected.shape, np.nan, np.float32),
        "q": q,
        "k_cache": k_cache,
        "pos": cache.pos,
        "seq": cache.seq,
        "cell_pos": cache.cell_pos,
        "cell_seq": cache.cell_seq,
        "scratch": np.full(n_bytes // 4, np.nan, np.float32),
        "head_start": HEAD_START,
        "n_tokens": n_tokens,
        "n_kv": n_kv,
    }
    return Case(args, expected)


def few_case(n_tokens: int, n_kv: int, d_k: int, fmt: BlockFormat) -> Case:
    case = score_case(STANDARD, n_tokens, n_kv, d_k, fmt)
    del case.args["scratch"]
    return case


def few_spec(d_k: int, fmt: BlockFormat) -> Any:
    return kq_few(n_head=N_HEAD, n_slice=N_SLICE, d_k=d_k, fmt_k=fmt, scale=SCALE)


def kq_spec(kind: str, d_k: int, max_tokens: int, fmt: BlockFormat) -> Any:
    sizes = {"kind": kind, "n_head": N_HEAD, "n_slice": N_SLICE, "d_k": d_k}
    return kq(**sizes, max_tokens=max_tokens, fmt_k=fmt, scale=SCALE)


def check_scores(found: Array, expected: Array) -> None:
    hidden = expected == -1e30
    assert np.array_equal(found == np.float32(-1e30), hidden)
    if not hidden.all():
        assert nmse(found[~hidden], expected[~hidden]) <= LIMIT


@each_target
@pytest.mark.parametrize("kind", [ABSORBED, STANDARD])
def test_kq(target: Target, kind: str) -> None:
    for n_tokens in TOKENS:
        for n_kv in CELLS:
            case = score_case(kind, n_tokens, n_kv, 96, Q8_KV)
            run_kernel(kq_spec(kind, 96, n_tokens, Q8_KV), target, case.args, n_threads=2)
            check_scores(case.args["s"], case.expected)


@each_target
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_kq_keeps_to_its_arrays(target: Target, n_tokens: int) -> None:
    case = score_case(STANDARD, n_tokens, 33, 96, F16)
    spec = kq_spec(STANDARD, 96, n_tokens, F16)
    found = run_guarded(spec, target, case.args, outputs=["s"], updates=["scratch"])
    check_scores(found["s"], case.expected)


@each_target
@pytest.mark.parametrize("fmt", [Q8_KV, F16, Q5_0], ids=lambda fmt: fmt.name)
def test_kq_few(target: Target, fmt: BlockFormat) -> None:
    for n_tokens in TOKENS:
        for n_kv in CELLS:
            case = few_case(n_tokens, n_kv, 96, fmt)
            run_kernel(few_spec(96, fmt), target, case.args, n_threads=2)
            check_scores(case.args["s"], case.expected)


@each_target
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_kq_few_keeps_to_its_arrays(target: Target, n_tokens: int) -> None:
    case = few_case(n_tokens, 33, 192, F16)
    found = run_guarded(few_spec(192, F16), target, case.args, outputs=["s"])
    check_scores(found["s"], case.expected)


@each_target
def test_soft_max(target: Target) -> None:
    rng = np.random.default_rng(3)
    for n_tokens, n_kv in ((1, 1), (2, 31), (7, 33), (3, 700)):
        scores = 3 * rng.standard_normal((N_SLICE, n_tokens, padded(n_kv)))
        scores[rng.random(scores.shape) < 0.3] = -1e30
        scores[1, 0] = -1e30
        scores[..., n_kv:] = np.nan
        visible = scores > -1e29
        s = scores.astype(np.float32)
        args: dict[str, Any] = {"s": s, "n_tokens": n_tokens, "n_kv": n_kv}
        found = run_guarded(soft_max(n_slice=N_SLICE), target, args, outputs=[], updates=["s"])["s"]
        values = np.repeat(np.eye(padded(n_kv))[:, None], N_SLICE, axis=1)
        expected = softmax_values(scores, visible, values).transpose(1, 0, 2)
        assert not found[~visible].any()
        assert nmse(found, expected) <= LIMIT


@each_target
@pytest.mark.parametrize("vt_type", [f16, f32], ids=str)
@pytest.mark.parametrize("kind", [ABSORBED, STANDARD])
def test_kqv(target: Target, kind: str, vt_type: DType) -> None:
    rng = np.random.default_rng(5)
    for n_tokens, n_kv, d_v in ((1, 1, 128), (2, 31, 160), (33, 33, 160), (7, 1100, 128)):
        copied, n_ctx = kind == ABSORBED and n_kv < 1100, padded(n_kv) + 32
        s = rng.random((N_SLICE, n_tokens, padded(n_kv))).astype(np.float32)
        s[..., n_kv:] = 0
        stride = padded(n_kv) if copied else n_ctx
        n_vt = 1 if kind == ABSORBED else N_HEAD
        vt = rng.standard_normal((n_vt, d_v, stride)).astype(NUMPY[vt_type])
        vt[..., n_kv:] = np.nan
        heads = slice(0, 1) if kind == ABSORBED else slice(HEAD_START, HEAD_START + N_SLICE)
        values = np.broadcast_to(vt[heads, :, :n_kv].astype(np.float64), (N_SLICE, d_v, n_kv))
        expected = np.einsum("htj,hdj->thd", s[..., :n_kv].astype(np.float64), values)
        args: dict[str, Any] = {
            "out": np.full((n_tokens, N_HEAD, d_v), np.nan, np.float32),
            "s": s,
            "vt": vt,
            "n_tokens": n_tokens,
        }
        args |= {"vt_stride": n_ctx, "head_start": HEAD_START, "n_kv": n_kv}
        spec = kqv(
            kind=kind, n_head=N_HEAD, n_slice=N_SLICE, d_v=d_v, copied=copied, vt_type=vt_type
        )
        other_heads = np.ones((N_HEAD, 1), np.bool_)
        other_heads[HEAD_START : HEAD_START + N_SLICE] = False
        found = run_guarded(spec, target, args, outputs=["out"], padding={"out": other_heads})
        assert nmse(found["out"][:, HEAD_START : HEAD_START + N_SLICE], expected) <= LIMIT


@each_target
@pytest.mark.parametrize("vt_type", [f16, f32], ids=str)
@pytest.mark.parametrize("name", LATENT_CACHE_TYPES)
def test_transpose_c(target: Target, name: str, vt_type: DType) -> None:
    fmt, n_lora, n_rope = CACHE_FORMATS[name], 160, 32
    spec = transpose_c(n_lora=n_lora, n_rope=n_rope, fmt=fmt, vt_type=vt_type)
    for n_kv in (1, 31, 100):
        cache = make_cache(2, n_kv)
        values = np.random.default_rng(7).standard_normal((n_kv, n_lora + n_rope))
        c, decoded = stored(values, fmt, cache.cell_seq >= 0)
        vt = np.zeros((n_lora, padded(n_kv)), NUMPY[vt_type])
        args: dict[str, Any] = {"vt": vt, "c": c, "cell_seq": cache.cell_seq, "n_kv": n_kv}
        found = run_guarded(spec, target, args, outputs=["vt"])["vt"]
        expected = np.zeros(vt.shape)
        expected[:, :n_kv] = np.where(cache.cell_seq >= 0, decoded[:, :n_lora].T, 0)
        assert np.array_equal(found, expected.astype(vt.dtype))


def test_plain_attention_does_not_depend_on_threads() -> None:
    target = host_targets()[0]
    assert_threads_agree(
        kq_spec(ABSORBED, 96, 7, F16),
        target,
        lambda: score_case(ABSORBED, 7, 700, 96, F16).args,
        ["s"],
    )
    assert_threads_agree(few_spec(96, F16), target, lambda: few_case(3, 700, 96, F16).args, ["s"])
    rng = np.random.default_rng(0)
    s = rng.standard_normal((N_SLICE, 7, 704)).astype(np.float32)
    vt = rng.standard_normal((128, 704)).astype(np.float16)
    sizes = {"n_tokens": 7, "n_kv": 700}
    assert_threads_agree(soft_max(n_slice=N_SLICE), target, lambda: {"s": s.copy(), **sizes}, ["s"])
    spec = kqv(kind=ABSORBED, n_head=N_SLICE, n_slice=N_SLICE, d_v=128, copied=True, vt_type=f16)
    out = np.zeros((7, N_SLICE, 128), np.float32)
    rest = {"s": s, "vt": vt, "vt_stride": 0, "head_start": 0, **sizes}
    assert_threads_agree(spec, target, lambda: {"out": out.copy(), **rest}, ["out"])
