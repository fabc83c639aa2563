"""The engine against the float64 oracle: modes, cache types, batch sizes, long caches."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen.formats import CACHE_FORMATS, F16, LATENT_CACHE_TYPES, BlockFormat
from codegen.kernels.attention_splits import MIN_SPLIT
from codegen.kernels.flash_expanded import rows_per_chunk
from mlacli.gguf.quants import dequantise, quantise
from tests import reference
from tests.conftest import TinyModel
from tests.engines import all_logits, logits_and_experts, make_engine, oracle

Floats = NDArray[np.float64]
TOKENS = np.random.default_rng(3).integers(0, 4096, 700).tolist()
LENGTHS = (1, 33, 150)
# Fewer layers than tiny-lite has: what tells it apart (softmax gating, no q_lora) is in each.
PRESETS: dict[str, dict[str, Any]] = {"tiny-v3": {}, "tiny-lite": {"n_layer": 6}, "tiny-odd": {}}
EXACT = 1e-10  # F32 weights and f32 cache: what is left is the rounding of f32 sums
CLEAR = 1e-5  # a router margin above this is not a tie to f32 arithmetic
ON_OFF = pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "plain"])


@cache
def exact(path: Path, n_tokens: int, first: int = 0) -> reference.Forward:
    return oracle(path).run(TOKENS[:n_tokens], range(first, first + n_tokens))


def errors(got: NDArray[np.float32], expected: reference.Forward) -> Floats:
    """Per-token NMSE of the first tokens, those left out whose experts are a near tie."""
    n = len(got)
    clear = expected.smallest_margin()[:n] > CLEAR
    assert clear.mean() > 0.9
    return reference.per_token_nmse(got, expected.logits[:n])[clear]


# -- every mode ---------------------------------------------------------------------------------


@ON_OFF
@pytest.mark.parametrize("mla", [0, 1, 2, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_mode_is_exact_with_an_f32_cache(
    tiny_model: TinyModel, preset: str, mla: int, flash_attn: bool
) -> None:
    """Batches of 64, 64 and 22 tokens: -mla 2 expands the first two and absorbs the last."""
    path = tiny_model(preset, "F32", **PRESETS[preset])
    flags: dict[str, Any] = {"mla": mla, "flash_attn": flash_attn, "type_k": "f32", "type_v": "f32"}
    engine = make_engine(path, n_ubatch=64, mla_threshold=30 if mla == 2 else None, **flags)
    for length in LENGTHS:
        got = all_logits(engine, TOKENS[:length])
        assert errors(got, exact(path, max(LENGTHS))).max() <= EXACT


@ON_OFF
@pytest.mark.parametrize("mla", [0, 1, 2])
def test_a_long_cache(tiny_model: TinyModel, mla: int, flash_attn: bool) -> None:
    """Several splits of the cache, chunks of expanded rows and slices of K*Q, and positions on both
    sides of YaRN's original context."""
    path, config = tiny_model("tiny-odd", "F32"), oracle(tiny_model("tiny-odd", "F32")).config
    n, first = 700, 3800
    assert config.yarn is not None
    assert first < config.yarn.original_context < first + n
    assert n > 3 * MIN_SPLIT
    assert n > 3 * rows_per_chunk(2**20, config.n_head, config.nope, config.v, 1024)
    flags: dict[str, Any] = {"mla": mla, "flash_attn": flash_attn, "type_k": "f32", "type_v": "f32"}
    engine = make_engine(path, n_ctx=1024, n_ubatch=128, amb_mib=1, **flags)
    got = engine.eval(TOKENS[:n], range(first, first + n), wanted=range(n))
    assert errors(got, exact(path, n, first)).max() <= EXACT


@pytest.mark.parametrize(
    ("mla", "flash_attn", "sizes"),
    [
        (0, True, (1, 512)),
        (1, True, (1, 7, 32)),
        (2, True, (7, 512)),
        (0, False, (1, 512)),
        (1, False, (1, 7)),
        (2, False, (512,)),
    ],
)
def test_micro_batches_of_any_size(
    tiny_model: TinyModel, mla: int, flash_attn: bool, sizes: tuple[int, ...]
) -> None:
    path = tiny_model("tiny-odd", "F32")
    for n_ubatch in sizes:
        engine = make_engine(
            path, mla=mla, flash_attn=flash_attn, type_k="f32", type_v="f32", n_ubatch=n_ubatch
        )
        got = all_logits(engine, TOKENS[:150])
        assert errors(got, exact(path, 150)).max() <= EXACT, n_ubatch


# -- cache types --------------------------------------------------------------------------------


def rounding(fmt_k: BlockFormat, fmt_v: BlockFormat, k_width: int) -> reference.Rounding:
    """What storing does to the values: rows of `k_width` values in one format, others in the other.

    Encoded and decoded by the numpy oracle of the formats.
    """

    def store(values: Floats) -> Floats:
        n = values.shape[-1]
        fmt = fmt_k if n == k_width else fmt_v
        rows = values.reshape(-1, n).astype(np.float32)
        return dequantise(quantise(rows, fmt), fmt, n).astype(np.float64).reshape(values.shape)

    return store


def check_cache(path: Path, type_k: str, fmt_v: BlockFormat, **flags: Any) -> None:
    """Against an f64 forward whose cache is rounded alike and whose experts are the same.

    What differs is then the engine's arithmetic, and that one code in a thousand falls to the other
    side of a rounding boundary. That must be small beside the type's own error, which the rounded
    forward has against one without rounding; the engine's error must be no larger than that.
    """
    tokens = TOKENS[:68]  # with batches of 64 the last has four tokens: generation's program
    engine = make_engine(path, n_ubatch=64, type_k=type_k, keep_experts=True, **flags)
    got, experts = logits_and_experts(engine, tokens)
    model = oracle(path)
    c, latent = model.config, engine.settings.mla > 0
    width = c.kv_lora + c.rope if latent else c.nope + c.rope
    rounded = model.run(
        tokens,
        cache_round=rounding(CACHE_FORMATS[type_k], fmt_v, width),
        cache_rows="latent" if latent else "heads",
        experts=experts,
    ).logits
    unrounded = model.run(tokens, experts=experts).logits
    own = median_error(rounded, unrounded)
    assert median_error(got, rounded) <= max(own / 8, EXACT)
    assert median_error(got, unrounded) <= max(1.1 * own, EXACT)


def median_error(got: NDArray[np.floating[Any]], expected: Floats) -> float:
    return float(np.median(reference.per_token_nmse(got, expected)))


@pytest.mark.parametrize(
    ("mla", "type_k"), [*((1, name) for name in LATENT_CACHE_TYPES), (2, "bf16"), (2, "q8_KV")]
)
def test_latent_cache_types(tiny_model: TinyModel, mla: int, type_k: str) -> None:
    path = tiny_model("tiny-odd", "F32")
    check_cache(path, type_k, F16, mla=mla, mla_threshold=20 if mla == 2 else None)


@pytest.mark.parametrize("type_k", CACHE_FORMATS)
def test_cache_types_of_whole_heads(tiny_model: TinyModel, type_k: str) -> None:
    fmt_v = CACHE_FORMATS[type_k]
    check_cache(tiny_model("tiny-v3", "F32"), type_k, fmt_v, mla=0, type_v=type_k)


@pytest.mark.parametrize("type_k", ["f16", "iq4_nl"])
def test_transposed_values_of_whole_heads_are_f16(tiny_model: TinyModel, type_k: str) -> None:
    check_cache(tiny_model("tiny-v3", "F32"), type_k, F16, mla=0, flash_attn=False)


@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_transposed_latent_rows(tiny_model: TinyModel, type_k: str) -> None:
    """-mla 2 turns the rounded rows around; -mla 1 keeps values that were never rounded to the
    type, so that it is closer to the exact result."""
    path, tokens, found = tiny_model("tiny-odd", "F32"), TOKENS[:68], {}
    check_cache(path, type_k, F16, mla=2, flash_attn=False)
    for mla in (1, 2):
        engine = make_engine(
            path, mla=mla, flash_attn=False, type_k=type_k, n_ubatch=64, keep_experts=True
        )
        got, experts = logits_and_experts(engine, tokens)
        found[mla] = median_error(got, oracle(path).run(tokens, experts=experts).logits)
    assert found[1] <= 1.05 * found[2]


# -- one model in three files -------------------------------------------------------------------


@pytest.mark.parametrize("mla", [0, 1, 2])
def test_three_flavours_give_the_same_logits(tiny_model: TinyModel, mla: int) -> None:
    runs = [
        all_logits(
            make_engine(
                tiny_model("tiny-v3", "F32", kv_b),
                mla=mla,
                mla_threshold=30 if mla == 2 else None,
                n_ubatch=64,
            ),
            TOKENS[:150],
        )
        for kv_b in ("joint", "both", "split")
    ]
    assert np.array_equal(runs[0], runs[1])
    assert np.array_equal(runs[0], runs[2])
