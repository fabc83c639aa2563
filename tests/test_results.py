"""`mlacli sweep` and `mlacli compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlacli.__main__ import main
from mlacli.results import compare, name_of_test, rows_of


def written(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(n_prompt: int, n_gen: int, *samples: float, **more: object) -> dict[str, object]:
    mean = sum(samples) / len(samples)
    return {"n_prompt": n_prompt, "n_gen": n_gen, "avg_ts": mean, "samples_ts": samples, **more}


def test_sweep_prints_what_llama_sweep_bench_prints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["sweep", "-c", "256", "-ub", "64", "-n", "4", "-t", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "main: n_kv_max = 256, n_batch = 2048, n_ubatch = 64, flash_attn = 1, n_threads = 2, "
        "n_threads_batch = 2"
    )
    assert lines[2].startswith("|    PP |     TG |   N_KV |") and len(set(map(len, lines[2:]))) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [c[:3] for c in cells] == [["64", "4", str(n)] for n in (0, 64, 128, 192)]
    assert all(float(c[4]) > 0 and float(c[6]) > 0 for c in cells)


def test_sweep_as_jsonl_with_a_stride(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["sweep", "-c", "256", "-ub", "64", "-n", "2", "--sweep-stride", "2", "-nrep", "2"]
    assert main([*words, "--output-format", "jsonl", "-wb"]) == 0
    path = tmp_path / "s.jsonl"
    path.write_text(capsys.readouterr().out)
    found = rows_of(path)
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in found] == [
        (64, 0, 0), (0, 2, 0), (64, 0, 128), (0, 2, 128),
    ]  # fmt: skip


def test_sweep_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "-c", "256", "-n", "1000"]) == 2
    assert "error: -n: 1000 is more than -c 256" in capsys.readouterr().err


def test_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    a = written(tmp_path / "a.jsonl", row(512, 0, 10, 12, 11), row(0, 64, 5), row(0, 9, 1))
    b = written(tmp_path / "b.jsonl", row(512, 0, 22, 24, 20), row(0, 64, 4, 6, 5))
    assert main(["compare", a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["test", "a", "b", "ratio (spread)"]
    assert cells[2:] == [
        ["pp512", "11.00", "22.00", "2.00 (1.67 .. 2.40)"],
        ["tg64", "5.00", "5.00", "1.00 (0.80 .. 1.20)"],
    ]


def test_what_differs_within_a_file_names_its_rows(tmp_path: Path) -> None:
    rows = [row(0, 8, 4, type_k="f16", n_depth=64), row(0, 8, 5, type_k="q8_0", n_depth=64)]
    names = [one.test for one in compare(rows, rows)]
    assert names == ["tg8 @ d64 -ctk f16", "tg8 @ d64 -ctk q8_0"]
    assert name_of_test(row(4, 8, 1.0)) == "pp4+tg8"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "compare: needs two files or more (got 0)"),
        (["A"], "compare: needs two files or more (got 1)"),
        (["A", "none"], "No such file or directory"),
        (["A", "bad"], "not a row of a bench"),
        (["A", "other"], "have no test in common"),
    ],
)
def test_compare_refuses(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written(tmp_path / "A", row(512, 0, 10))
    written(tmp_path / "bad", {"x": 1})
    written(tmp_path / "other", row(256, 0, 10))
    assert main(["compare", *(str(tmp_path / word) for word in words)]) == 2
    assert line in capsys.readouterr().err
