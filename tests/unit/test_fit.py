"""Which context is taken, and what is refused before any memory is."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from mlacli.engine import Model, load_model
from mlacli.errors import EXIT_SPACE, SpaceError, UsageError
from mlacli.fit import (
    GIB,
    Need,
    check_plan,
    context_size,
    least_need,
    planned_need,
    size_text,
)
from mlacli.memory import MIB
from mlacli.settings import RunSettings
from tests.conftest import TinyModel

PLENTY = 2**60
ROW = 27 * 2 * 576  # bytes of a V2-Lite token, f16


@pytest.fixture(scope="module")
def v2_lite(tiny_model: TinyModel) -> Model:
    return load_model(tiny_model("v2-lite", "IQ4_NL", sparse=True))


def size(model: Model, available: int = PLENTY, **given: Any) -> tuple[int, list[str]]:
    said: list[str] = []
    n_ctx = context_size(model.config, RunSettings(**given), available, said.append)
    return n_ctx, said


def test_the_default_is_4096(v2_lite: Model) -> None:
    assert size(v2_lite) == (4096, [])


def test_the_default_is_what_was_trained_if_that_is_less(v2_lite: Model) -> None:
    config = replace(v2_lite.config, n_ctx_train=1000)
    assert context_size(config, RunSettings(), PLENTY) == 1000
    config = replace(v2_lite.config, n_ctx_train=100)
    assert context_size(config, RunSettings(), PLENTY) == 100


def test_the_default_is_what_fits(v2_lite: Model) -> None:
    output = 4 * 102400
    line = "note: the context is 1280 tokens: memory for 4096 is not available"
    assert size(v2_lite, 1280 * ROW + output) == (1280, [line])
    assert size(v2_lite, 1280 * ROW + output - 1)[0] == 1024
    assert size(v2_lite, 4096 * ROW + output) == (4096, [])
    assert size(v2_lite, 256 * ROW + output)[0] == 256
    with pytest.raises(SpaceError, match=r"^-c 256: needs 7\.59 MiB for the cache and 0\.39 MiB"):
        size(v2_lite, 256 * ROW + output - 1)


def test_with_fit_off_the_default_is_not_lowered(v2_lite: Model) -> None:
    assert size(v2_lite, fit=False) == (4096, [])
    with pytest.raises(SpaceError, match=r"^-c 4096: needs 121\.50 MiB for the cache"):
        size(v2_lite, 1280 * ROW, fit=False)


def test_zero_is_all_that_was_trained(v2_lite: Model) -> None:
    assert size(v2_lite, n_ctx=0) == (163840, [])
    with pytest.raises(SpaceError, match=r"^-c 163840: needs 4\.75 GiB"):
        size(v2_lite, GIB, n_ctx=0)


def test_more_than_was_trained_is_said(v2_lite: Model) -> None:
    assert size(v2_lite, n_ctx=163840) == (163840, [])
    line = "note: -c 163841: the model was trained on 163840 tokens"
    assert size(v2_lite, n_ctx=163841) == (163841, [line])


def test_a_context_that_cannot_fit_is_refused_at_once(v2_lite: Model) -> None:
    start = time.process_time()
    with pytest.raises(SpaceError) as caught:
        size(v2_lite, 18 * GIB, n_ctx=2**31 - 1)
    assert time.process_time() - start < 0.1
    assert caught.value.exit_code == EXIT_SPACE
    assert str(caught.value) == (
        "-c 2147483647: needs 62208.00 GiB for the cache and 0.39 MiB for buffers, "
        "18.00 GiB available"
    )


def test_this_machine_does_not_have_62_tib(v2_lite: Model) -> None:
    with pytest.raises(SpaceError, match=r"^-c 2147483647: needs 62208\.00 GiB for the cache"):
        context_size(v2_lite.config, RunSettings(n_ctx=2**31 - 1))


def test_rows_count_as_padded(v2_lite: Model) -> None:
    need = least_need(v2_lite.config, RunSettings(), 1)
    assert need.cache == 256 * ROW
    need = least_need(v2_lite.config, RunSettings(flash_attn=False, mla=2), 1)
    assert need.cache == 32 * ROW


@pytest.mark.parametrize(
    ("given", "mib"),
    [
        ({"flash_attn": True}, 0),
        ({"flash_attn": False, "amb_mib": 0}, 2048),
        ({"flash_attn": False, "amb_mib": 256}, 256),
        ({"flash_attn": False, "amb_mib": 300}, 256),
        ({"flash_attn": False, "amb_mib": 1}, 128),  # one head at least
        ({"flash_attn": False, "amb_mib": 0, "n_ubatch": 64}, 256),
    ],
)
def test_kq_is_counted_without_flash_attention(
    v2_lite: Model, given: dict[str, Any], mib: int
) -> None:
    assert least_need(v2_lite.config, RunSettings(**given), 65536).compute == mib * MIB


@pytest.mark.parametrize("mla", range(4))
@pytest.mark.parametrize("flash", [True, False])
def test_the_estimate_never_exceeds_the_plan(v2_lite: Model, mla: int, flash: bool) -> None:
    from codegen.targets import build
    from mlacli.context import plan_context

    settings = RunSettings(mla=mla, flash_attn=flash)
    plan = plan_context(v2_lite.config, v2_lite.weights, settings, build("generic"), n_ctx=8192)
    exact, estimate = planned_need(plan), least_need(v2_lite.config, settings, 8192)
    assert (estimate.cache, estimate.output) == (exact.cache, exact.output)
    assert 0 <= estimate.compute <= exact.compute
    # k_b, made from kv_b: 27 layers, 16 heads, 512 rows of 128 values as Q8_0
    assert exact.derived == (0 if mla == 0 else 27 * 16 * 512 * 136)
    check_plan(plan, exact.total)
    with pytest.raises(SpaceError, match=r"^-c 8192: needs"):
        check_plan(plan, exact.total - 1)


def test_need_adds_up() -> None:
    need = Need(cache=1, compute=20, output=300, derived=4000)
    assert need.total == 4321
    need.check(7, 4321)
    with pytest.raises(SpaceError, match="-c 7"):
        need.check(7, 4320)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0.00 MiB"), (MIB * 3 // 2, "1.50 MiB"), (GIB - MIB, "1023.00 MiB"), (GIB, "1.00 GiB")],
)
def test_size_text(n: int, text: str) -> None:
    assert size_text(n) == text


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"type_k": "q8_0"}, "-ctk: q8_0 has blocks of 32, a cached row 528 values"),
        ({"type_k": "q8_KV", "mla": 0}, "-ctk: q8_KV has blocks of 32, a cached row 80 values"),
        ({"type_v": "q4_0", "mla": 0}, "-ctv: q4_0 has blocks of 32, a cached row 40 values"),
    ],
)
def test_cache_types_whose_blocks_do_not_fit(
    v2_lite: Model, given: dict[str, Any], line: str
) -> None:
    odd = replace(v2_lite.config, n_rope=16, n_nope=64, n_v=40)
    with pytest.raises(UsageError) as caught:
        context_size(odd, RunSettings(**given), PLENTY)
    assert str(caught.value) == line
    assert context_size(odd, RunSettings(mla=0), PLENTY) == 4096  # f16 fits always
