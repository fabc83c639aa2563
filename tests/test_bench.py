"""Bench: which cases flags give, what the tables look like, and how the command ends."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlacli import __version__
from mlacli.__main__ import main
from mlacli.bench import BenchCase, BenchResult, BenchRow, Grid, ModelFacts, cases, run_cases
from mlacli.bench_records import WRITERS
from mlacli.bench_table import markdown
from mlacli.errors import ModelError, SpaceError, UsageError
from mlacli.settings import RunSettings

FACTS = ModelFacts("deepseek2 16B Q4_K - Medium", 10_361_000_000, 15_706_000_000)
A, B = Path("a.gguf"), Path("b.gguf")


def _tests(grid: Grid) -> list[str]:
    return [case.test for case in cases(grid)]


def test_kinds_of_test_in_llama_benchs_order() -> None:
    assert _tests(Grid((A,))) == ["pp512", "tg128"]
    grid = Grid((A,), n_prompt=(16, 32), n_gen=(0,), prompt_gen=((8, 4),), fill_gen=((8, 4),))
    assert _tests(grid) == ["pp16", "pp32", "pp8+tg4", "tg4@pp8"]
    grid = Grid((A,), n_gen=(4,), n_prompt=(0,), n_depth=(0, 4096))
    assert _tests(grid) == ["tg4", "tg4 @ d4096"]


def test_pairs_with_a_zero() -> None:
    grid = Grid((A,), n_prompt=(0,), n_gen=(0,), prompt_gen=((8, 0),), fill_gen=((0, 4), (8, 0)))
    assert _tests(grid) == ["pp8", "tg4"]


def test_cross_product_order() -> None:
    grid = Grid((A, B), {"n_threads": [1, 2], "mla": [0, 3]}, n_prompt=(16,), n_gen=(0,))
    settings = [case.settings for case in cases(grid)]
    assert [(s.model, s.mla, s.n_threads) for s in settings] == [
        (model, mla, threads) for model in (A, B) for mla in (0, 3) for threads in (1, 2)
    ]
    assert all(s.n_threads_batch == s.n_threads for s in settings)


def test_values_that_set_several_settings() -> None:
    axes = {"n_threads": [3, {"n_threads": 1, "n_threads_batch": 2}]}
    found = cases(Grid((A,), axes, prompt_gen=((4, 4),)))
    assert [(c.test, c.n_threads, c.settings.n_threads_batch) for c in found] == [
        *(("pp512", 3, 3), ("tg128", 3, 3), ("pp4+tg4", 3, 3)),
        *(("pp512", 2, 2), ("tg128", 1, 2), ("pp4+tg4", 1, 2)),
    ]


def test_context_holds_the_whole_test() -> None:
    grid = Grid((A,), n_prompt=(0,), n_gen=(0,), fill_gen=((100, 20),), n_depth=(1000,))
    (case,) = cases(grid)
    assert case.settings.n_ctx == 1120
    assert (case.n_timed, case.n_fill, case.n_depth) == (20, 100, 1000)


def test_batches_go_together() -> None:
    (case,) = cases(Grid((A,), {"n_ubatch": [4096]}, n_gen=(0,)))
    assert case.settings.n_batch == 4096


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        (Grid((A,), n_prompt=(0,), n_gen=(0,)), "nothing to run"),
        (Grid((A,), n_prompt=tuple(range(1, 6000)), n_depth=(0, 1)), "too many"),
        (Grid((A,), {"type_k": ["f16", "q4_0"]}), "-ctk: q4_0 cannot hold"),
    ],
)
def test_refused_before_anything_runs(grid: Grid, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        cases(grid)


def _result(*samples_ns: int, **more: Any) -> BenchResult:
    return BenchResult(FACTS, "a CPU", "2026-01-01T00:00:00Z", samples_ns, **more)


def test_a_failed_case_is_a_row() -> None:
    def runner(case: BenchCase) -> BenchResult:
        if case.n_prompt == 16:
            raise SpaceError("needs 412 GiB")
        if case.n_prompt == 32:
            raise MemoryError
        return _result(10**9)

    rows = list(run_cases(cases(Grid((A,), n_prompt=(16, 32, 64), n_gen=(0,))), runner))
    assert [row.error for row in rows] == ["needs 412 GiB", "out of memory", ""]
    assert rows[2].avg_ts == 64


def test_a_bad_file_stops_the_bench() -> None:
    def runner(case: BenchCase) -> BenchResult:
        raise ModelError("a.gguf: not a GGUF file")

    with pytest.raises(ModelError):
        list(run_cases(cases(Grid((A,))), runner))


def test_statistics() -> None:
    case = BenchCase(RunSettings(), n_prompt=100, n_gen=0)
    row = BenchRow(case, _result(10**9, 2 * 10**9, limit_ts=150.0))
    assert row.samples_ts == [100, 50]
    assert (row.avg_ts, row.limit_percent) == (75, 50)
    assert row.stddev_ts == pytest.approx(35.355339)
    assert (row.avg_ns, row.stddev_ns) == (1_500_000_000, 707_106_781)
    single = BenchRow(case, _result(0))
    assert single.stddev_ts == single.stddev_ns == 0 and single.avg_ts == 1e11


def _rows() -> list[BenchRow]:
    """Two good rows, one whose weights came from disk, one that failed."""
    settings = RunSettings(model=A, n_threads=16, n_threads_batch=16, mla=1)
    samples = (1_000_000_000, 1_100_000_000, 900_000_000)
    return [
        BenchRow(BenchCase(settings, 512, 0), _result(*samples, limit_ts=700.0)),
        BenchRow(BenchCase(settings, 0, 128), _result(*samples, limit_ts=200.0)),
        BenchRow(BenchCase(settings, 0, 32, 4096), _result(*samples, major_faults=3)),
        BenchRow(BenchCase(settings, 512, 128), error="needs 'much'"),
    ]


GOLDEN = f"""\
| model                          |       size |     params | backend    | threads | mla |          test |              t/s |
| ------------------------------ | ---------: | ---------: | ---------- | ------: | --: | ------------: | ---------------: |
| deepseek2 16B Q4_K - Medium    |   9.65 GiB |    15.71 B | CPU        |      16 |   1 |         pp512 |   515.45 ± 51.80 |
| deepseek2 16B Q4_K - Medium    |   9.65 GiB |    15.71 B | CPU        |      16 |   1 |         tg128 |   128.86 ± 12.95 |
| deepseek2 16B Q4_K - Medium    |   9.65 GiB |    15.71 B | CPU        |      16 |   1 |  tg32 @ d4096 |   32.22 ± 3.24 * |
| a                              |            |            | CPU        |      16 |   1 |   pp512+tg128 |           failed |

* 3 major page faults while timed: weights were read from disk
pp512+tg128 failed: needs 'much'

build: mlacli {__version__}
"""  # noqa: E501


def test_markdown() -> None:
    assert markdown(_rows()) == GOLDEN


def test_markdown_with_limits() -> None:
    lines = markdown(_rows()[:2], roof=True).splitlines()
    assert [line.split("|")[-2] for line in lines[:4]] == [
        "   limit ",
        " ------: ",
        "  73.6 % ",
        "  64.4 % ",
    ]


def _header(rows: Sequence[BenchRow]) -> list[str]:
    return [cell.strip() for cell in markdown(rows).splitlines()[0].split("|")[5:-3]]


def test_columns_appear_when_they_say_something() -> None:
    row = _rows()[0]
    plain = replace(row.case.settings, mla=3)

    def rows(*settings: RunSettings) -> list[BenchRow]:
        return [replace(row, case=replace(row.case, settings=s)) for s in settings]

    assert _header(rows(plain)) == ["threads"]
    assert _header(rows(plain, replace(plain, mla=2))) == ["threads", "mla"]
    changed = replace(
        plain,
        n_batch=1024,
        n_ubatch=256,
        type_k="q8_0",
        type_v="bf16",
        flash_attn=False,
        amb_mib=64,
        ser=(4, 0.3),
        mmap=False,
        rtr=True,
        thp=True,
        fmoe=False,
    )
    wide = "threads n_batch n_ubatch type_k type_v fa amb ser mmap rtr thp fmoe"
    assert " ".join(_header(rows(changed))) == wide
    cells = [cell.strip() for cell in markdown(rows(changed)).splitlines()[2].split("|")]
    assert " ".join(cells[5:-3]) == "16 1024 256 q8_0 bf16 0 64 4,0.3 0 1 1 0"


def test_small_models_in_smaller_units() -> None:
    facts = ModelFacts("tiny", 27 << 20, 13_400_000)
    row = BenchRow(_rows()[0].case, replace(_result(10**9), model=facts))
    assert "|  27.00 MiB |    13.40 M |" in markdown([row])


def test_json_and_json_lines() -> None:
    records = json.loads(WRITERS["json"](_rows()))
    assert records == [json.loads(line) for line in WRITERS["jsonl"](_rows()).splitlines()]
    first, failed = records[0], records[3]
    assert first["samples_ns"] == [1_000_000_000, 1_100_000_000, 900_000_000]
    assert first["avg_ts"] == pytest.approx(515.4478) and first["avg_ns"] == 1_000_000_000
    assert (first["mla_attn"], first["flash_attn"], first["n_prompt"]) == (1, True, 512)
    assert records[2]["n_depth"] == 4096 and records[2]["major_faults"] == 3
    assert failed["avg_ts"] is None and failed["error"] == "needs 'much'"


def test_csv() -> None:
    text = WRITERS["csv"](_rows())
    first, failed = (list(csv.DictReader(io.StringIO(text)))[i] for i in (0, 3))
    assert text.splitlines()[1].startswith(f'"{__version__}","0","a CPU","","CPU","a.gguf"')
    assert (first["flash_attn"], first["test"], first["n_threads"]) == ("1", "pp512", "16")
    assert (failed["avg_ts"], failed["error"]) == ("", "needs 'much'")
    assert "samples_ns" not in first


def test_sql_is_read_by_sqlite() -> None:
    database = sqlite3.connect(":memory:")
    database.executescript(WRITERS["sql"](_rows()) * 2)
    found = database.execute("SELECT test, n_threads, round(avg_ts), error FROM llama_bench")
    assert (
        found.fetchall()
        == [
            ("pp512", 16, 515.0, ""),
            ("tg128", 16, 129.0, ""),
            ("tg32 @ d4096", 16, 32.0, ""),
            ("pp512+tg128", 16, None, "needs 'much'"),
        ]
        * 2
    )


def fake_bench(
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[BenchCase], bool],
    seconds: Callable[[BenchCase], int] = lambda case: 1,
) -> None:
    """A runner in place of the engine: each test takes the same time."""

    class EngineRunner:
        notes = ("the object cache is cold",)

        def __init__(
            self, cases: Sequence[BenchCase], *, repetitions: int, warmup: bool, **flags: Any
        ) -> None:
            self.cases, self.repetitions = cases, repetitions
            self.progress: Callable[[str], None] = lambda what: None
            assert warmup and flags.keys() == {"roof", "profile", "verbose", "delay"}

        def __call__(self, case: BenchCase) -> BenchResult:
            if broken(case):
                raise SpaceError("needs 412 GiB")
            for number in range(self.repetitions):
                self.progress(f"prompt run {number + 1}/{self.repetitions}")
            facts = ModelFacts("deepseek2 13M F16", 27 << 20, 13_000_000)
            samples = (seconds(case) * 10**9,) * self.repetitions
            return BenchResult(facts, "a CPU", "2026-01-01T00:00:00Z", samples)

    module = types.ModuleType("mlacli.bench_runner")
    monkeypatch.setattr(module, "EngineRunner", EngineRunner, raising=False)
    monkeypatch.setitem(sys.modules, "mlacli.bench_runner", module)


def test_bench_prints_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "bench -p 16,32 -n 0 -t 1 -fa 0,1 -rtr -r 2"
    fake_bench(monkeypatch, broken=lambda case: False)
    assert main(line.split()) == 0
    printed = capsys.readouterr()
    rows = [line.split("|")[1:-1] for line in printed.out.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in rows[0]]
    assert " ".join(header) == "model size params backend threads fa rtr test t/s"
    assert [row[-2].strip() for row in rows[2:]] == ["pp16", "pp32"] * 2
    assert [row[5].strip() for row in rows[2:]] == ["0", "0", "1", "1"]
    assert rows[2][-1].strip() == "16.00 ± 0.00"
    assert printed.err.splitlines()[-2:] == [
        "4/4: pp32 32.00 t/s",
        "note: the object cache is cold",
    ]


def test_bench_with_a_failed_case_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_bench(monkeypatch, broken=lambda case: case.n_prompt == 32)
    assert main(["bench", "-p", "16,32", "-n", "0"]) == 1
    out = capsys.readouterr().out
    assert "pp32 failed: needs 412 GiB" in out and "16.00 ± 0.00" in out
