"""Profiles: recorded sums, and the table made of them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mlacli.engine import Cancelled
from mlacli.machine import Peaks
from mlacli.profile import Profile, ProgramTimes
from mlacli.profile_table import HEADER, profile_lines, table
from mlacli.work import Batch
from tests.conftest import TinyModel
from tests.engines import make_engine

PEAKS = Peaks(1, int8=8e9, bf16=2e9, f32=1e9, bandwidth=4e9)
ROW_BYTES = {"c": 100.0}


def test_every_nanosecond_of_a_step_is_run_or_wait() -> None:
    records = np.array([[1000, 1010, 1110, 1150, 1250], [1040, 1050, 1130, 1150, 1210]])
    times = ProgramTimes((), records.copy(), np.zeros_like(records))
    for _ in range(2):
        times.records[:] = records
        times.add(Batch(1, 1, 1))
    assert times.run.tolist() == [2 * 90, 2 * 80]
    assert times.wait.tolist() == [2 * (10 + 20), 2 * 30]  # one thread began 40 later
    assert times.wait_at_end == 2 * 20
    assert times.run.sum() + times.wait.sum() + times.wait_at_end == times.span_ns == 2 * 250


def profiled(tiny_model: TinyModel, n_threads: int) -> Profile:
    """A prompt of two micro-batches, and three tokens."""
    engine = make_engine(tiny_model("tiny-v3", "Q8_0"), n_ubatch=32, n_threads=n_threads)
    profile = engine.profile = Profile()
    engine.eval(range(40), range(40))
    for i in range(40, 43):
        engine.eval([7], [i])
    engine.profile = None
    engine.eval([7], [43])
    return profile


@pytest.mark.parametrize("n_threads", [1, 3])
def test_an_engine_tells_its_profile_of_every_step(tiny_model: TinyModel, n_threads: int) -> None:
    profile = profiled(tiny_model, n_threads)
    assert (profile.n_steps, profile.n_tokens) == (5, 43)
    batches = sorted((b for t in profile.programs.values() for b in t.batches), key=vars_of)
    assert batches == [Batch(1, n, 1) for n in (41, 42, 43)] + [Batch(8, 40, 1), Batch(32, 32, 0)]
    for times in profile.programs.values():
        assert (times.run > 0).all()
        assert (times.wait >= 0).all()
        assert times.wait_at_end >= 0
    assert profile.run_ns + profile.wait_ns + profile.unaccounted_ns == pytest.approx(
        profile.wall_ns
    )
    assert profile.unaccounted_ns > 0


def vars_of(batch: Batch) -> tuple[int, int]:
    return batch.n_tokens, batch.n_kv


def test_a_cancelled_step_is_left_out(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("tiny-v3", "Q8_0"), n_ubatch=32)
    profile = engine.profile = Profile()
    engine.eval([1], [0])
    before = profile.wall_ns
    engine.cancel()
    with pytest.raises(Cancelled):
        engine.eval([2], [1])
    assert (profile.n_steps, profile.wall_ns) == (1, before)


def numbers(rows: list[list[str]], column: str) -> list[float]:
    at = HEADER.index(column)
    return [float(row[at].rstrip(" %")) for row in rows if row[at] not in ("", "-")]


def test_the_table_adds_up(tiny_model: TinyModel) -> None:
    profile = profiled(tiny_model, 2)
    for by_layer in (False, True):
        *rows, total = table(profile, ROW_BYTES, PEAKS, by_layer=by_layer)
        assert [row[0] for row in rows[-2:]] == ["barriers", "unaccounted"]
        assert numbers(rows[:-2], "ms") == sorted(numbers(rows[:-2], "ms"), reverse=True)
        slack = 0.001 * len(rows)
        assert sum(numbers(rows, "ms")) == pytest.approx(numbers([total], "ms")[0], abs=slack)
        assert sum(numbers(rows, "share")) == pytest.approx(100, abs=0.1 * len(rows))
        assert sum(numbers(rows, "MB")) == pytest.approx(numbers([total], "MB")[0], abs=slack)
        assert all(len(row) == len(HEADER) for row in [*rows, total])


def test_ops_are_told_apart_and_layers_when_asked_for(tiny_model: TinyModel) -> None:
    profile = profiled(tiny_model, 1)
    ops = {row[0]: row for row in table(profile, ROW_BYTES, PEAKS)}
    layers = {row[0]: row for row in table(profile, ROW_BYTES, PEAKS, by_layer=True)}
    assert ops["matmul attn_out"][1] == "4" and layers["matmul attn_out-3"][1] == "1"
    assert "matmul attn_out-3" not in ops and "matmul attn_out" not in layers
    assert ops["rms_norm attn_norm"][-1] == "-" and ops["matmul attn_out"][-1].endswith(" %")
    assert sum(numbers([row for name, row in layers.items() if "attn_out" in name], "calls")) == 4


def test_lines_say_what_the_numbers_are_per(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("tiny-v3", "Q8_0"), n_ubatch=32)
    layout = engine.plan.layout
    assert profile_lines("prompt", Profile(), layout, PEAKS) == []
    profile = engine.profile = Profile()
    engine.eval(range(64), range(64))
    lines = profile_lines("prompt", profile, layout, PEAKS, by_layer=True)
    headings = [line for line in lines if line.startswith("profile")]
    assert headings == [
        "profile of prompt: per batch, mean of 2 batches of 32 tokens",
        "profile of prompt by layer: per batch, mean of 2 batches of 32 tokens",
    ]
    profile = engine.profile = Profile()
    engine.eval([1], [64])
    (heading,) = profile_lines("tg1", profile, layout, PEAKS)[1:2]
    assert heading == "profile of tg1: per token, mean of 1"
    last = profile_lines("tg1", profile, layout, PEAKS)[-2]
    assert re.fullmatch(
        r"machine: int8 \S+ TOP/s, bf16 \S+ TOP/s, f32 \S+ TOP/s, read \S+ GB/s", last
    )
