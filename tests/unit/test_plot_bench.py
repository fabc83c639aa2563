"""scripts/plot_bench.py: what becomes a line of the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlacli.results import rows_of
from scripts.plot_bench import Line, lines_of, main, of_kind

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


def test_a_row_of_a_sweep_is_two_of_a_bench(tmp_path: Path) -> None:
    row = {"n_ubatch": 512, "pp": 512, "tg": 8, "n_kv": 1024, "speed_pp": 60.5, "speed_tg": 9.25}
    (tmp_path / "sweep.jsonl").write_text(json.dumps(row | {"t_pp": 1.0, "t_tg": 1.0}))
    found = rows_of(tmp_path / "sweep.jsonl")
    assert lines_of("ik", of_kind(found, "prompt"), "depth") == [Line("ik", ((1024, 60.5),))]
    assert lines_of("ik", of_kind(found, "generation"), "depth") == [Line("ik", ((1024, 9.25),))]
    assert of_kind(found, None) == found
    (tmp_path / "bad.jsonl").write_text('{"speed_pp": 1.0}')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1.*n_kv"):
        rows_of(tmp_path / "bad.jsonl")


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
