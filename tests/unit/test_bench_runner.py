"""The runner behind `mlacli bench`: one engine for tests that only differ in their sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlacli import bench_runner
from mlacli.bench import BenchCase, Grid, cases
from mlacli.bench_runner import EngineRunner
from mlacli.engine import Engine
from mlacli.errors import SpaceError
from tests.conftest import TinyModel

DEPTHS = (0, 300, 40)


def _cases(path: Path) -> list[BenchCase]:
    axes = {"type_k": ("q8_KV", "f16"), "n_threads": (2,)}
    return cases(Grid((path,), axes, n_prompt=(8,), n_gen=(), n_depth=DEPTHS))


def _run(monkeypatch: pytest.MonkeyPatch, path: Path, limit: int) -> tuple[list[int], list[int]]:
    """(n_ctx of each engine that was made, tokens evaluated untimed before each case)."""
    made: list[int] = []
    filled: list[int] = []

    class Counted(Engine):
        def __init__(self, *args: object, n_ctx: int, **rest: object) -> None:
            if n_ctx > limit:
                raise SpaceError(f"{n_ctx} do not fit")
            made.append(n_ctx)
            super().__init__(*args, n_ctx=n_ctx, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_runner, "Engine", Counted)
    found = _cases(path)
    told: list[str] = []
    runner = EngineRunner(found, repetitions=1, warmup=False, roof=False, progress=told.append)
    for case in found:
        told.clear()
        before = next((e.cache.n_used for e in runner._engines.values()), 0)
        result = runner(case)
        (engine,) = runner._engines.values()
        assert len(result.samples_ns) == 1 and engine.cache.n_used == case.n_depth + 8
        filled.append(max(0, case.n_depth - before))
        assert told == ["depth run 1/1"] * bool(filled[-1]) + ["prompt run 1/1"]
    return made, filled


def test_one_engine_serves_all_depths(
    monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    made, filled = _run(monkeypatch, tiny_model("tiny-lite", "F32"), limit=10_000)
    assert made == [308, 308]  # one for each cache type
    assert filled[:3] == [0, 292, 0]  # what lies in the cache stays, and is cut off for the third


def test_small_tests_run_where_large_ones_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    path = tiny_model("tiny-lite", "F32")
    with pytest.raises(SpaceError, match="308 do not fit"):
        _run(monkeypatch, path, limit=300)
    first = _cases(path)[0]
    runner = EngineRunner(_cases(path), repetitions=1, warmup=False, roof=False)
    assert runner(first).samples_ns
    (engine,) = runner._engines.values()
    assert engine.n_ctx < 300


def test_engines_that_are_kept_take_turns(
    monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    found = [c for c in _cases(tiny_model("tiny-lite", "F32")) if not c.n_depth]
    runner = EngineRunner(found, repetitions=1, warmup=False, roof=False, keeps=2)
    for case in (*found, *found):
        runner(case)
    assert len(found) == len(runner._engines) == 2
    first = list(runner._engines.values())
    runner(found[0])
    assert list(runner._engines.values()) == first
