"""scripts/plot_bench.py: what becomes a line of the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.plot_bench import Line, lines_of, main, rows_of

DEPTHS = [
    {"n_prompt": 0, "n_gen": 32, "n_depth": depth, "mla": mla, "avg_ts": 20.0 - mla - depth / 1024}
    for mla in (1, 3)
    for depth in (4096, 0)
]


def test_a_line_per_mode_sorted_by_depth() -> None:
    assert lines_of("ours", DEPTHS, "depth") == [
        Line("ours -mla 1", ((0, 19.0), (4096, 15.0))),
        Line("ours -mla 3", ((0, 17.0), (4096, 13.0))),
    ]


def test_a_peer_without_depth_has_its_prompt_there() -> None:
    rows = [{"n_prompt": 512, "n_gen": 8, "avg_ts": t} for t in (1.0, 9.0, 2.0)]
    assert lines_of("peer", rows, "depth") == [Line("peer", ((512, 2.0),))]


def test_prompts_and_generation_are_two_lines() -> None:
    rows = [{"n_prompt": 7, "n_gen": 0, "avg_ts": 3.0}, {"n_prompt": 0, "n_gen": 4, "avg_ts": 5.0}]
    assert [line.name for line in lines_of("a", rows, "prompt")] == ["a prompt", "a generation"]


def test_files_that_are_no_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('\n{"n_prompt": 1, "n_gen": 0}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2.*avg_ts"):
        rows_of(bad)
    for words in (["x.svg", f"a={bad}"], ["x.svg", str(bad)], ["x.svg", "a=/nonexistent"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    assert "name=file.jsonl" in capsys.readouterr().err


def test_a_picture(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, DEPTHS)))
    assert main([str(tmp_path / "x.svg"), f"ours={rows}", "--title", "t/s"]) == 0
    assert (tmp_path / "x.svg").read_text().count("ours -mla") == 2
