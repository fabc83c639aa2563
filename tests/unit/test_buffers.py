"""Caches and buffers: published sizes pinned, compute buffers bounded, from header-only files."""

from __future__ import annotations

from typing import Any

import pytest

from codegen.targets import NAMES, build
from mlacli.context import ContextPlan, cache_layout, padded_context, plan_context
from mlacli.engine import Model, load_model
from mlacli.memory import MIB
from mlacli.report import buffer_lines
from mlacli.settings import RunSettings
from tests.conftest import TinyModel

CONTEXTS = (4096, 163840)
HOST_TARGETS = ("avx512vnni-bf16", "avx2", "generic")


@pytest.fixture(scope="module")
def v2_lite(tiny_model: TinyModel) -> Model:
    return load_model(tiny_model("v2-lite", "IQ4_NL", sparse=True))


@pytest.fixture(scope="module")
def v3(tiny_model: TinyModel) -> Model:
    return load_model(tiny_model("v3", "IQ4_NL", sparse=True))


def planned(model: Model, n_ctx: int, target: str = HOST_TARGETS[0], **given: Any) -> ContextPlan:
    settings = RunSettings(**given)
    return plan_context(model.config, model.weights, settings, build(target), n_ctx=n_ctx)


def cache_mib(model: Model, n_ctx: int, **given: Any) -> dict[str, float]:
    settings = RunSettings(**given)
    rows = padded_context(n_ctx, flash=settings.flash_attn)
    sizes = cache_layout(model.config, settings, rows).nbytes()
    return {kind: n / MIB for kind, n in sizes.items()}


# -- cache sizes: ik_llama.cpp PR 240, llama.cpp PR 13529 ---------------------------------------


def test_published_cache_sizes_of_v2_lite(v2_lite: Model) -> None:
    q8: dict[str, Any] = {"type_k": "q8_KV"}
    at = (v2_lite, 65536)
    assert cache_mib(*at, **q8, mla=1, flash_attn=False) == {"c": 985.5, "kv_t": 1728.0}
    for mla in (1, 2, 3):
        assert cache_mib(*at, **q8, mla=mla) == {"c": 985.5}
        assert cache_mib(*at, mla=mla) == {"c": 1944.0}
    for mla in (2, 3):
        assert cache_mib(*at, **q8, mla=mla, flash_attn=False) == {"c": 985.5}
    assert cache_mib(*at, **q8, mla=0) == {"k": 5400.0, "v": 6912.0}
    assert cache_mib(*at, **q8, mla=0, flash_attn=False) == {"k": 5400.0, "v_t": 6912.0}
    assert cache_mib(v2_lite, 4096) == {"c": 121.5}


def test_published_cache_size_of_v3(v3: Model) -> None:
    assert cache_mib(v3, 163840) == {"c": 10980.0}


def test_the_context_is_padded(v2_lite: Model) -> None:
    assert cache_mib(v2_lite, 4000) == cache_mib(v2_lite, 4096)
    assert [padded_context(n, flash=True) for n in (1, 256, 257)] == [256, 256, 512]
    assert [padded_context(n, flash=False) for n in (1, 32, 33)] == [32, 32, 64]


# -- lines that scripts look for ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "size", "kinds"),
    [
        (
            {"type_k": "q8_KV", "mla": 1, "flash_attn": False},
            "2713.50",
            "c^KV (q8_KV):  985.50 MiB, kv^T (f16): 1728.00 MiB",
        ),
        ({"type_k": "q8_KV", "mla": 1}, " 985.50", "c^KV (q8_KV):  985.50 MiB, kv^T: not used"),
        ({"mla": 1}, "1944.00", "c^KV (f16): 1944.00 MiB, kv^T: not used"),
        ({"type_k": "q8_KV", "mla": 3}, " 985.50", "c^KV (q8_KV):  985.50 MiB, kv^T: not used"),
        (
            {"type_k": "q8_KV", "mla": 0},
            "12312.00",
            "K (q8_KV): 5400.00 MiB, V (f16): 6912.00 MiB",
        ),
        (
            {"type_k": "q8_KV", "mla": 0, "flash_attn": False},
            "12312.00",
            "K (q8_KV): 5400.00 MiB, V (f16): 6912.00 MiB",
        ),
        (
            {"type_k": "f32", "mla": 1, "flash_attn": False},
            "7344.00",
            "c^KV (f32): 3888.00 MiB, kv^T (f32): 3456.00 MiB",
        ),
        (
            {"type_k": "bf16", "type_v": "bf16", "mla": 0, "flash_attn": False},
            "17280.00",
            "K (bf16): 10368.00 MiB, V (f16): 6912.00 MiB",
        ),
        (
            {"type_k": "q8_0", "type_v": "q8_0", "mla": 0},
            "9180.00",
            "K (q8_0): 5508.00 MiB, V (q8_0): 3672.00 MiB",
        ),
    ],
)
def test_buffer_lines(v2_lite: Model, given: dict[str, Any], size: str, kinds: str) -> None:
    settings = RunSettings(**given)
    lines = buffer_lines(planned(v2_lite, 65536, **given), settings)
    assert f"llama_kv_cache_init:        CPU KV buffer size = {size:>8} MiB" in lines
    assert f"llama_init_from_model: KV self size  = {size} MiB, {kinds}" in lines
    assert "llama_init_from_model:        CPU  output buffer size =     0.39 MiB" in lines
    assert "llama_init_from_model: graph splits = 1" in lines


def test_buffer_lines_in_order(v2_lite: Model) -> None:
    settings = RunSettings(mla=1, n_batch=1024, n_ubatch=256, amb_mib=128, fmoe=False)
    plan = planned(v2_lite, 4096, mla=1, n_batch=1024, n_ubatch=256, amb_mib=128, fmoe=False)
    compute = plan.arena_bytes / MIB
    assert buffer_lines(plan, settings) == [
        "llama_init_from_model: n_ctx         = 4096",
        "llama_init_from_model: n_batch       = 1024",
        "llama_init_from_model: n_ubatch      = 256",
        "llama_init_from_model: flash_attn    = 1",
        "llama_init_from_model: mla_attn      = 1",
        "llama_init_from_model: attn_max_b    = 128",
        "llama_init_from_model: fused_moe     = 0",
        "llama_kv_cache_init:        CPU KV buffer size =   121.50 MiB",
        "llama_init_from_model: KV self size  =  121.50 MiB, c^KV (f16):  121.50 MiB, "
        "kv^T: not used",
        "llama_init_from_model:        CPU  output buffer size =     0.39 MiB",
        f"llama_init_from_model:        CPU compute buffer size = {compute:8.2f} MiB",
        f"llama_init_from_model: graph nodes  = {plan.n_nodes}",
        "llama_init_from_model: graph splits = 1",
    ]


# -- compute buffers ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", CONTEXTS)
@pytest.mark.parametrize("mla", range(4))
@pytest.mark.parametrize("target", HOST_TARGETS)
def test_compute_with_flash_attention(v2_lite: Model, mla: int, n_ctx: int, target: str) -> None:
    """It does not grow with the context."""
    for kind, threads in (("f16", 16), ("q8_KV", 16), ("f16", 1)):
        plan = planned(v2_lite, n_ctx, target, mla=mla, n_threads=threads, type_k=kind)
        assert plan.arena_bytes <= (64 if mla < 2 else 128) * MIB
        assert plan.output_bytes == 4 * 102400


@pytest.mark.parametrize("n_ctx", CONTEXTS)
@pytest.mark.parametrize("mla", range(4))
def test_compute_of_v3(v3: Model, mla: int, n_ctx: int) -> None:
    assert planned(v3, n_ctx, mla=mla, n_threads=16).arena_bytes <= 320 * MIB


def transposed_bytes(mla: int, n_ctx: int) -> int:
    """-mla 2 and 3 without flash attention turn the latent part of c around on the fly, as f16."""
    return 2 * 512 * n_ctx if mla >= 2 else 0


@pytest.mark.parametrize("mla", range(4))
def test_compute_holds_kq_without_flash_attention(v2_lite: Model, mla: int) -> None:
    for threads in (1, 16):
        given: dict[str, Any] = {"mla": mla, "flash_attn": False, "amb_mib": 0}
        compute = planned(v2_lite, 65536, n_threads=threads, **given).arena_bytes
        assert 2048 * MIB <= compute <= 2148 * MIB + transposed_bytes(mla, 65536)


@pytest.mark.parametrize("n_ctx", [2048, 65536])
@pytest.mark.parametrize("amb", [64, 128, 256, 512])
@pytest.mark.parametrize("mla", range(4))
def test_amb_bounds_kq(v2_lite: Model, mla: int, amb: int, n_ctx: int) -> None:
    given: dict[str, Any] = {"mla": mla, "flash_attn": False, "amb_mib": amb}
    compute = planned(v2_lite, n_ctx, n_threads=16, **given).arena_bytes
    assert compute <= (64 + 2 * amb) * MIB + transposed_bytes(mla, n_ctx)


@pytest.mark.parametrize("target", NAMES)
def test_every_target_can_be_planned(v2_lite: Model, target: str) -> None:
    assert planned(v2_lite, 4096, target).arena_bytes <= 128 * MIB
