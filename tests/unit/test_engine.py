"""The engine against the float64 oracle, and its modes against one another."""

from __future__ import annotations

import numpy as np
import pytest

from mlacli.errors import SpaceError
from tests import reference
from tests.conftest import TinyModel
from tests.engines import all_logits, make_engine

TOKENS = np.random.default_rng(3).integers(0, 4096, 150).tolist()
PRESETS = ("tiny-v3", "tiny-lite", "tiny-odd")
LIMITS = {"f32": 1e-10, "f16": 2e-5, "bf16": 2e-4, "q8_0": 1e-4, "q8_KV": 3e-4, "q6_0": 3e-3}


def median_error(tiny_model: TinyModel, preset: str, kv_b: str = "joint", **flags: object) -> float:
    path = tiny_model(preset, "F32", kv_b)
    expected = oracle_logits(path)
    n_ubatch = flags.pop("n_ubatch", 64)
    got = all_logits(make_engine(path, n_ubatch=n_ubatch, **flags), TOKENS)
    return float(np.median(reference.per_token_nmse(got, expected)))


_ORACLE: dict[object, reference.Array] = {}


def oracle_logits(path: object) -> reference.Array:
    if path not in _ORACLE:
        _ORACLE[path] = reference.load(path).forward(TOKENS)  # type: ignore[arg-type]
    return _ORACLE[path]


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("mla", [0, 1, 2, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_mode_is_exact_with_an_f32_cache(
    tiny_model: TinyModel, preset: str, mla: int, flash_attn: bool
) -> None:
    if not flash_attn and mla < 2:
        limit = LIMITS["f16"]  # the transposed copy is f16
    elif not flash_attn:
        limit = LIMITS["f16"]
    else:
        limit = LIMITS["f32"]
    error = median_error(
        tiny_model, preset, mla=mla, flash_attn=flash_attn, type_k="f32", type_v="f32"
        if flash_attn else "f16", mla_threshold=20 if mla > 1 else None,
    )  # fmt: skip
    assert error <= limit


@pytest.mark.parametrize("type_k", list(LIMITS))
@pytest.mark.parametrize("mla", [0, 1, 2])
def test_cache_types(tiny_model: TinyModel, mla: int, type_k: str) -> None:
    error = median_error(tiny_model, "tiny-v3", mla=mla, type_k=type_k)
    assert error <= LIMITS[type_k]


@pytest.mark.parametrize("n_ubatch", [1, 7, 32])
def test_batch_sizes(tiny_model: TinyModel, n_ubatch: int) -> None:
    error = median_error(tiny_model, "tiny-odd", type_k="f32", n_ubatch=n_ubatch)
    assert error <= LIMITS["f32"]


def test_two_sequences_in_one_cache_do_not_see_each_other(tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-v3", "F32", "joint")
    engine = make_engine(path, type_k="f32", n_ubatch=64)
    first, second = TOKENS[:40], TOKENS[40:80]
    mixed = [t for pair in zip(first, second, strict=True) for t in pair]
    positions = [i // 2 for i in range(80)]
    both = engine.eval(mixed, positions, [i % 2 for i in range(80)], wanted=range(80))
    for sequence, alone in enumerate((first, second)):
        expected = reference.load(path).forward(alone)
        assert reference.nmse(both[sequence::2], expected) <= LIMITS["f32"]


@pytest.mark.parametrize("n_threads", [1, 3, 5])
def test_threads_do_not_change_a_bit(tiny_model: TinyModel, n_threads: int) -> None:
    path = tiny_model("tiny-odd", "IQ4_NL", "joint")
    expected = all_logits(make_engine(path, n_ubatch=64, n_threads=2), TOKENS)
    got = all_logits(make_engine(path, n_ubatch=64, n_threads=n_threads), TOKENS)
    assert np.array_equal(got, expected)


def test_three_flavours_give_the_same_logits(tiny_model: TinyModel) -> None:
    runs = [
        all_logits(make_engine(tiny_model("tiny-v3", "F32", kv_b), n_ubatch=64), TOKENS)
        for kv_b in ("joint", "both", "split")
    ]
    assert np.array_equal(runs[0], runs[1])
    assert np.array_equal(runs[0], runs[2])


def test_fused_and_separate_experts_agree(tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-v3", "Q8_0", "joint")
    fused = all_logits(make_engine(path, n_ubatch=64), TOKENS)
    separate = all_logits(make_engine(path, n_ubatch=64, fmoe=False), TOKENS)
    assert reference.nmse(separate, fused) <= 1e-10


def test_truncated_sequence_goes_on_as_if_the_rest_had_never_been(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("tiny-v3", "Q8_0", "joint"), n_ubatch=64)
    expected = all_logits(engine, TOKENS[:30])[20:].copy()
    engine.cache.clear()
    engine.eval(TOKENS[:20], range(20))
    engine.eval(TOKENS[100:110], range(20, 30))
    engine.cache.truncate(0, 20)
    got = engine.eval(TOKENS[20:30], range(20, 30), wanted=range(10))
    assert reference.nmse(got, expected) <= 1e-10


def test_a_full_context_is_refused(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model(), n_ctx=256)
    with pytest.raises(SpaceError, match="context is full"):
        engine.eval(TOKENS * 2, range(300))
