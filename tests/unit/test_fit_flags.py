"""report --fit: what is picked fits, one step more does not, and what was given stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacli.context import ContextPlan, plan_context
from mlacli.engine import Model, load_model
from mlacli.errors import SpaceError, UsageError
from mlacli.fit_flags import GAIN, Fitted, _lower, fit_flags
from mlacli.report import PAGES, TOO_LARGE, report_of
from mlacli.settings import RunSettings, fitted
from mlacli.units import GIB, MIB
from tests.conftest import TinyModel

STEP = 256
# Bytes of a token in 3 layers of V2-Lite: latent 512 + 64 values; K and V of 16 heads.
F16, Q8_KV, PLAIN = 3 * 2 * 576, 3 * (8 + 576), 3 * 16 * 2 * (192 + 128)
# Most that compute buffers may take with flash attention; k_b as Q8_0 where it is made at load.
COMPUTE, K_B, OUTPUT = 128 * MIB, 3 * 16 * 512 * 136, 4 * 102400


@pytest.fixture(scope="module")
def v2_lite(tiny_model: TinyModel) -> Model:
    return load_model(tiny_model("v2-lite-3l", "IQ4_NL", sparse=True))


def fit(model: Model, limit: int, least: int = 1, weights: bool = False, **flags: Any) -> Fitted:
    chosen = fitted(model=model.file.path, n_threads=2, **flags)
    return fit_flags(model, chosen, flags.keys(), limit, least=least, with_weights=weights)


@pytest.mark.parametrize(
    ("flags", "row", "derived"),
    [
        ({"type_k": "f16"}, F16, K_B),
        ({"type_k": "q8_KV"}, Q8_KV, K_B),
        ({"type_k": "q8_KV", "mla": 1}, Q8_KV, K_B),
        ({"type_k": "f16", "mla": 0}, PLAIN, 0),
    ],
)
def test_the_context_is_what_the_formulas_leave_room_for(
    v2_lite: Model, flags: dict[str, Any], row: int, derived: int
) -> None:
    limit = 240 * MIB
    n = fit(v2_lite, limit, n_ubatch=512, amb_mib=256, **flags).settings.n_ctx
    assert n is not None and n % STEP == 0
    assert n * row + derived + OUTPUT < limit
    assert (n + STEP) * row + derived + OUTPUT + COMPUTE > limit


def test_all_that_was_trained_fits_untouched(v2_lite: Model) -> None:
    found = fit(v2_lite, 64 * GIB)
    assert (found.settings.n_ctx, found.n_wanted, found.steps) == (163840, 163840, ())
    assert fit(v2_lite, 64 * GIB, n_ctx=10_000).settings.n_ctx == 9984  # a multiple of 256
    assert fit(v2_lite, 64 * GIB, n_ctx=0).settings.n_ctx == 163840
    assert fit(v2_lite, 64 * GIB, n_ctx=200_000).settings.n_ctx == 781 * STEP
    assert fit(v2_lite, 64 * GIB, n_ctx=100).settings.n_ctx == 100


def test_the_type_goes_first(v2_lite: Model) -> None:
    found = fit(v2_lite, 340 * MIB)
    assert [(s.field, s.after, s.n_after) for s in found.steps] == [("type_k", "q8_KV", 163840)]
    found = fit(v2_lite, 240 * MIB, n_ubatch=512, amb_mib=256)
    assert [(s.field, s.before, s.after) for s in found.steps] == [("type_k", "f16", "q8_KV")]
    step = found.steps[0]
    assert step.n_after == found.settings.n_ctx
    assert step.n_after / step.n_before == pytest.approx(F16 / Q8_KV, rel=0.02)


def test_buffers_shrink_where_they_stand_in_the_way(v2_lite: Model) -> None:
    found = fit(v2_lite, 40 * MIB)
    assert {s.field for s in found.steps} >= {"type_k", "n_ubatch"}
    assert found.settings.n_ubatch < 512 and found.settings.amb_mib <= 256
    kept = fit(v2_lite, 40 * MIB, n_ubatch=512)
    assert kept.settings.n_ubatch == 512
    assert (kept.settings.n_ctx or 0) < (found.settings.n_ctx or 0)


def test_without_flash_attention_amb_makes_room(v2_lite: Model) -> None:
    flags: dict[str, Any] = {"flash_attn": False, "type_k": "q8_KV", "n_ubatch": 512}
    found = fit(v2_lite, 200 * MIB, **flags)
    assert [step.field for step in found.steps] == ["amb_mib"]
    assert found.settings.amb_mib < 256


def test_weights_that_are_to_stay_count(v2_lite: Model) -> None:
    size, limit = v2_lite.file.size_bytes, v2_lite.file.size_bytes + 160 * MIB
    paging, resident = fit(v2_lite, limit), fit(v2_lite, limit, weights=True)
    assert report_of(v2_lite, paging.settings, limit).memory.verdict == PAGES
    assert report_of(v2_lite, resident.settings, limit).memory.verdict == "fits"
    assert fit(v2_lite, limit, mmap=False).settings.n_ctx == resident.settings.n_ctx
    with pytest.raises(SpaceError):
        fit(v2_lite, size, weights=True)


def test_nothing_fits(v2_lite: Model) -> None:
    with pytest.raises(SpaceError, match=r"^--fit: -c 256 does not fit: it needs \d\.\d\d MiB "):
        fit(v2_lite, 4 * MIB)
    line = r"with -ctk q8_KV, -ub 32, -amb 8; 4\.00 MiB can be had$"
    with pytest.raises(SpaceError, match=line):
        fit(v2_lite, 4 * MIB)
    with pytest.raises(SpaceError, match=r"^--fit: -c 163840 does not fit: it needs 289\.\d\d MiB"):
        fit(v2_lite, 240 * MIB, least=163840)
    with pytest.raises(SpaceError):
        fit(v2_lite, -MIB)


def test_types_whose_blocks_do_not_divide_the_rows_are_not_tried(v2_lite: Model) -> None:
    odd = replace(v2_lite, config=replace(v2_lite.config, n_rope=16))
    assert next(_lower(v2_lite, RunSettings(), ())) == ("type_k", "q8_KV")
    assert next(_lower(odd, RunSettings(), ())) == ("n_ubatch", 256)
    with pytest.raises(UsageError, match="blocks of 32"):
        fit(odd, GIB, type_k="q8_KV")


SIZES = st.floats(0.002, 0.5).map(lambda share: int(share * GIB))
FLAGS = st.fixed_dictionaries(
    {},
    optional={
        "mla": st.integers(0, 3),
        "flash_attn": st.booleans(),
        "type_k": st.sampled_from(["f16", "q8_KV", "q8_0", "f32"]),
        "n_ubatch": st.sampled_from([1, 64, 300, 512, 2048]),
        "amb_mib": st.sampled_from([0, 1, 64, 256]),
        "n_ctx": st.integers(1, 200_000),
        "rtr": st.just(True),
    },
)


@settings(max_examples=15, deadline=None)
@given(limit=SIZES, flags=FLAGS)
def test_what_is_picked_fits_and_one_step_more_does_not(
    v2_lite: Model, limit: int, flags: dict[str, Any]
) -> None:
    model = v2_lite

    def verdict(**changes: Any) -> str:
        given_settings = {**flags, "n_threads": 2, "model": model.file.path, **changes}
        return report_of(model, fitted(**given_settings), limit).memory.verdict

    try:
        found = fit(model, limit, **flags)
    except SpaceError:
        assert verdict(n_ctx=min(STEP, flags.get("n_ctx", STEP))) == TOO_LARGE
        return
    lowered = {step.field: step.after for step in found.steps}
    assert not lowered.keys() & flags.keys()
    n = found.settings.n_ctx
    assert n is not None and n <= found.n_wanted
    assert verdict(**lowered, n_ctx=n) != TOO_LARGE
    if n + STEP <= found.n_wanted:
        assert verdict(**lowered, n_ctx=n + STEP) == TOO_LARGE
    for step in found.steps:  # each was worth it
        assert step.n_after >= step.n_before + max(1, step.n_before // STEP // GAIN) * STEP


def test_few_plans_are_enough(v2_lite: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []

    def counted(*args: Any, n_ctx: int, **others: Any) -> ContextPlan:
        planned.append(n_ctx)
        return plan_context(*args, n_ctx=n_ctx, **others)

    monkeypatch.setattr("mlacli.fit_flags.plan_context", counted)
    fit(v2_lite, 64 * GIB)
    assert planned == [163840]
    planned.clear()
    fit(v2_lite, 240 * MIB, type_k="f16", n_ubatch=512, amb_mib=256)
    assert len(planned) <= 5


def test_given_settings_are_not_changed(v2_lite: Model) -> None:
    before = RunSettings(model=v2_lite.file.path)
    fit_flags(v2_lite, before, (), 240 * MIB)
    assert before == RunSettings(model=v2_lite.file.path)
