"""Where bench puts its results: SQLite files, pictures, side-by-side tables, progress, stderr."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from mlacli.__main__ import main
from mlacli.bench import BenchCase, BenchResult, BenchRow, Grid, ModelFacts, cases
from mlacli.bench_pivot import pivot_of, pivoted
from mlacli.bench_records import record
from mlacli.cli.bench_progress import BenchProgress
from mlacli.errors import UsageError
from tests.test_bench import fake_bench

Capture = pytest.CaptureFixture[str]
FACTS = ModelFacts("deepseek2 16B Q4_K - Medium", 10_361_000_000, 15_706_000_000)


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test takes 1 s; -fa off takes 2 s; prompts of 32 tokens fail."""
    monkeypatch.chdir(tmp_path)
    fake_bench(
        monkeypatch,
        broken=lambda case: case.n_prompt == 32,
        seconds=lambda case: 1 if case.settings.flash_attn else 2,
    )


def _table(path: str = "r.sqlite") -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as found:
        return found.execute("SELECT test, avg_ts, flash_attn, error FROM llama_bench").fetchall()


def test_rows_are_appended_to_a_database(capsys: Capture) -> None:
    words = ["bench", "-p", "16,32", "-n", "0", "--db", "r.sqlite"]
    assert main(words) == 1  # one test failed
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == "note: 2 rows appended to r.sqlite"
    failed = ("pp32", None, 1, "needs 412 GiB")
    assert _table() == [("pp16", 16.0, 1, ""), failed]
    assert main([*words, "-o", "sql", "-oe", "csv", "-fa", "0"]) == 1
    assert _table()[2:] == [("pp16", 8.0, 0, ""), ("pp32", None, 0, "needs 412 GiB")]
    assert capsys.readouterr().err.splitlines()[-4].startswith("build_commit,build_number,")


def test_a_database_that_a_peer_began_gets_our_columns() -> None:
    with sqlite3.connect("r.sqlite") as peer:
        peer.execute("CREATE TABLE llama_bench (n_prompt INTEGER, avg_ts REAL, devices TEXT)")
        peer.execute("INSERT INTO llama_bench VALUES (512, 12.5, 'auto')")
    assert main(["bench", "-p", "16", "-n", "0", "--db", "r.sqlite"]) == 0
    assert _table() == [(None, 12.5, None, None), ("pp16", 16.0, 1, "")]


def test_a_row_is_in_the_file_before_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def broken(case: BenchCase) -> bool:
        seen.append(len(_table()))
        if case.n_prompt == 64:
            raise KeyboardInterrupt
        return False

    fake_bench(monkeypatch, broken=broken)
    assert main(["bench", "-p", "16,32,64", "-n", "0", "--db", "r.sqlite"]) == 130
    assert seen == [0, 1, 2] and [row[0] for row in _table()] == ["pp16", "pp32"]


def _text_file() -> None:
    Path("r.sqlite").write_text("this is no database at all, but some text\n" * 40)


def _view() -> None:
    with sqlite3.connect("r.sqlite") as other:
        other.execute("CREATE VIEW llama_bench AS SELECT 1 AS a")


@pytest.mark.parametrize(
    ("prepare", "words", "line"),
    [
        (_text_file, "--db r.sqlite", "--db: r.sqlite: file is not a database"),
        (_view, "--db r.sqlite", "--db: r.sqlite: Cannot add a column to a view"),
        (_view, "--db no/r.sqlite", "--db: no/r.sqlite: there is no such folder"),
        (_view, "--db .", "--db: .: unable to open database file"),
    ],
)
def test_databases_that_cannot_be_used(
    prepare: Callable[[], None],
    words: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def never(case: BenchCase) -> bool:
        raise AssertionError("it was measured")

    prepare()
    fake_bench(monkeypatch, broken=never)
    assert main(["bench", *words.split()]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_the_table_on_stderr_as_well(capsys: Capture) -> None:
    assert main(["bench", "-p", "16", "-n", "0", "-o", "json", "-oe", "md"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["avg_ts"] == 16
    assert printed.err.splitlines()[2].startswith("| model ")


def test_side_by_side(capsys: Capture) -> None:
    assert (
        main(["bench", "-p", "16,32", "-n", "8", "-fa", "1,0", "-mla", "1,3", "--pivot", "fa"]) == 1
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[5:-1]] for line in lines]
    assert cells[0] == ["threads", "mla", "test", "t/s (no FA)", "t/s (FA)", "speedup"]
    assert [row[1:] for row in cells[2:]] == [
        [mla, *rest]
        for mla in "13"
        for rest in (
            ["pp16", "8.00 ± 0.00", "16.00 ± 0.00", "2.00"],
            ["pp32", "failed", "failed", ""],
            ["tg8", "4.00 ± 0.00", "8.00 ± 0.00", "2.00"],
        )
    ]


def test_three_values_side_by_side() -> None:
    found = cases(Grid((Path("a.gguf"),), {"mla": [3, 1, 2]}, n_prompt=(16,), n_gen=(0,)))
    rows = [
        BenchRow(case, BenchResult(FACTS, "", "", (10**9 * (case.settings.mla + 1),)))
        for case in found
    ]
    head, _, only, *_ = pivoted(rows, pivot_of("mla", found)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[7:-1]] for line in (head, only)]
    names = ["t/s (mla 3)", "t/s (mla 1)", "t/s (mla 2)"]  # as given: the first is the base
    assert cells[0] == [*names, "speedup (mla 1)", "speedup (mla 2)"]
    assert cells[1] == ["4.00 ± 0.00", "8.00 ± 0.00", "5.33 ± 0.00", "2.00", "1.33"]
    types = cases(Grid((Path("a.gguf"),), {"type_k": ["f16", "q8_KV"]}))
    assert [pivot_of("ctk", types).label(value) for value in ("f16", "q8_KV")] == ["f16", "q8_KV"]
    with pytest.raises(UsageError, match="--pivot: rtr has one value only"):
        pivot_of("rtr", types)


def test_pictures(capsys: Capture) -> None:
    old = [{"n_prompt": 16, "n_gen": 0, "n_depth": depth, "avg_ts": 9.0} for depth in (0, 64)]
    Path("old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    words = "bench -p 16 -n 0 -d 0,64 -fa 0,1 --plot x.svg --plot-with old=old.jsonl --plot -"
    assert main(words.split()) == 0
    svg, printed = Path("x.svg").read_text(), capsys.readouterr()
    for text in ("mlacli -fa 0", "mlacli -fa 1", "old", "deepseek2 13M F16"):
        assert f">{text}<" in svg
    assert [line for line in printed.err.splitlines() if line.startswith(" o ")] == [
        " o mlacli -fa 0"
    ]
    assert "tokens in the cache" in printed.err and "tokens in the cache" not in printed.out


def test_what_was_measured_before_a_stop_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: BenchCase) -> bool:
        if case.n_depth == 128:
            raise KeyboardInterrupt
        return False

    fake_bench(monkeypatch, broken=broken)
    assert main(["bench", "-p", "16", "-n", "0", "-d", "0,64,128", "--plot", "x.svg"]) == 130
    assert ">prompt<" in Path("x.svg").read_text()


def test_progress_as_lines(capsys: Capture) -> None:
    assert main(["bench", "-p", "16", "-n", "8", "-r", "2", "--progress"]) == 0
    first = "mlacli bench: benchmark 1/2:"
    assert capsys.readouterr().err.splitlines()[:5] == [
        f"{first} starting",
        f"{first} prompt run 1/2",
        f"{first} prompt run 2/2",
        "1/2: pp16 16.00 t/s",
        "mlacli bench: benchmark 2/2: starting",
    ]


def test_progress_as_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import sys

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with BenchProgress(2, 3, lines=False) as bar:
        bar.test("pp16")
        bar.run("warmup depth run")
        bar.run("warmup prompt run")
        bar.run("prompt run 1/2")
        bar.line("1/2: pp16 [red]9[/red] t/s")
    err = capsys.readouterr().err
    assert "1/2 pp16: prompt run 1/2" in err and "1/2: pp16 [red]9[/red] t/s" in err
    monkeypatch.setenv("TERM", "dumb")
    with BenchProgress(1, 1, lines=False) as bar:
        bar.test("pp16")
    assert capsys.readouterr().err == ""


def test_flags_of_the_peers(capsys: Capture) -> None:
    words = "bench -p 16 -n 8 -tgb 1,2;2,4 -lm none,mmap+mlock -gr 0,1 -no-fug --repack 1 -o jsonl"
    assert main(words.split()) == 0
    printed = capsys.readouterr()
    notes = [line for line in printed.err.splitlines() if line.startswith("note: -")]
    assert [line.split(":")[1] for line in notes] == [
        " -gr has no effect",
        " -no-fug has no effect",
    ]
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [(r["test"], r["n_threads"], r["load_mode"]) for r in rows] == [
        (test, n, mode)
        for mode in ("none", "mmap+mlock")
        for threads in ((2, 1), (4, 2))
        for test, n in zip(("pp16", "tg8"), threads, strict=True)
    ]
    assert all(r["repack"] and r["use_mmap"] == ("mmap" in r["load_mode"]) for r in rows)


def test_every_column_of_llama_cpp_is_there() -> None:
    """Those of llama-bench -o sql in llama.cpp 0c1e570, in which its rows are inserted."""
    peer = """build_commit build_number cpu_info gpu_info backends model_filename model_type
        model_size model_n_params n_batch n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v
        n_gpu_layers n_cpu_moe split_mode main_gpu no_kv_offload flash_attn devices tensor_split
        tensor_buft_overrides load_mode lazy_mode embeddings no_op_offload no_host repack fit_target
        fit_min_ctx n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts"""
    ours = record(BenchRow(cases(Grid((Path("a.gguf"),)))[0]))
    assert set(peer.split()) - ours.keys() == set()
    own = {"mla_attn", "attn_max_batch", "ser", "use_mmap", "use_thp", "fused_moe", "test"}
    assert ours.keys() - set(peer.split()) == own | {
        *("prio", "numa", "limit_ts", "major_faults", "error")
    }
