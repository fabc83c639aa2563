"""Rows as lines of a picture: which lines, along what, on paper and in a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlacli.plot_results import (
    Line,
    draw,
    kind_of,
    lines_of,
    picture_of,
    terminal_plot,
    what_varies,
)
from mlacli.results import rows_of
from scripts.plot_bench import main

Rows = list[dict[str, Any]]
DEPTHS: Rows = [
    {"n_prompt": 0, "n_gen": 32, "n_depth": depth, "mla": mla, "avg_ts": 20.0 - mla - depth / 1024}
    for mla in (1, 3)
    for depth in (4096, 0)
]


def test_a_line_per_mode_sorted_by_depth() -> None:
    assert lines_of("ours", DEPTHS, "depth") == [
        Line("ours -mla 1", ((0, 19.0), (4096, 15.0))),
        Line("ours -mla 3", ((0, 17.0), (4096, 13.0))),
    ]


def test_lines_are_named_by_every_axis_that_varies() -> None:
    rows: Rows = [
        {
            **{"n_prompt": 512, "n_gen": 0, "n_ubatch": ubatch, "type_k": type_k},
            **{"flash_attn": fa, "use_mmap": True, "model_filename": "/a/b.gguf", "avg_ts": 1.0},
        }
        for type_k, fa in (("f16", True), ("q8_KV", True), ("q8_KV", False))
        for ubatch in (64, 128)
    ]
    names = [line.name for line in lines_of("", rows, "ubatch")]
    assert names == ["-ctk f16 -fa 1", "-ctk q8_KV -fa 1", "-ctk q8_KV -fa 0"]
    assert what_varies([rows]) == "ubatch"


def test_tests_that_differ_besides_what_goes_along() -> None:
    rows: Rows = [
        {"n_prompt": 0, "n_gen": n, "n_depth": depth, "avg_ts": 1.0 * n}
        for n in (8, 16)
        for depth in (0, 64)
    ]
    assert [line.name for line in lines_of("a", rows, "depth")] == ["a tg8", "a tg16"]
    assert [line.name for line in lines_of("", rows, "generated")] == ["d0", "d64"]


def test_threads_go_along_as_one() -> None:
    rows: Rows = [
        {"n_prompt": 8, "n_gen": 0, "n_threads": n, "n_threads_batch": n, "avg_ts": n}
        for n in (1, 2)
    ]
    assert what_varies([rows]) == "threads"
    assert lines_of("", rows, "threads") == [Line("", ((1, 1.0), (2, 2.0)))]


@pytest.mark.parametrize(
    ("key", "kind", "x"),
    [
        ("n_depth", "prompt", "depth"),
        ("n_prompt", "prompt", "prompt"),
        ("n_gen", "generation", "generated"),
        ("n_batch", "prompt", "batch"),
    ],
)
def test_what_goes_along(key: str, kind: str, x: str) -> None:
    base = {"n_prompt": 8 * (kind == "prompt"), "n_gen": 8 * (kind != "prompt"), "n_depth": 0}
    rows: Rows = [base | {"avg_ts": 1.0, key: n} for n in (16, 32)]
    assert {kind_of(row) for row in rows} == {kind} and what_varies([rows]) == x
    assert what_varies([rows[:1], rows[1:]]) is None  # each file is a point of its own
    # a prompt of 512 and a generation of 128 do not make the size of prompts vary
    assert what_varies([[base | {"n_prompt": 512}, base | {"n_prompt": 0, "n_gen": 128}]]) is None


def test_a_peer_without_depth_has_its_prompt_there() -> None:
    rows: Rows = [{"n_prompt": 512, "n_gen": 8, "avg_ts": t} for t in (1.0, 9.0, 2.0)]
    assert lines_of("peer", rows, "depth") == [Line("peer", ((512, 2.0),))]
    assert kind_of({"n_prompt": 512, "n_gen": 8, "n_depth": 0}) == "prompt + generation"


def test_prompts_and_generation_are_two_panels() -> None:
    rows: Rows = [
        {"n_prompt": 7, "n_gen": 0, "n_depth": 0, "avg_ts": 3.0},
        {"n_prompt": 0, "n_gen": 4, "n_depth": 0, "avg_ts": 5.0},
    ]
    found = picture_of({"a": rows, "b": rows[:1]}, "depth").panels
    assert [(p.kind, [line.name for line in p.lines]) for p in found] == [
        ("prompt", ["a", "b"]),
        ("generation", ["a"]),
    ]
    only = picture_of({"a": rows}, "depth", kinds=("generation",)).panels
    assert [p.kind for p in only] == ["generation"]


def test_a_row_of_a_sweep_is_two_of_a_bench(tmp_path: Path) -> None:
    row = {"n_ubatch": 512, "pp": 512, "tg": 8, "n_kv": 1024, "speed_pp": 60.5, "speed_tg": 9.25}
    (tmp_path / "sweep.jsonl").write_text(json.dumps(row | {"t_pp": 1.0, "t_tg": 1.0}))
    panels = picture_of({"ik": rows_of(tmp_path / "sweep.jsonl")}, "depth").panels
    assert [panel.lines for panel in panels] == [
        (Line("ik", ((1024, 60.5),)),),
        (Line("ik", ((1024, 9.25),)),),
    ]
    (tmp_path / "bad.jsonl").write_text('{"speed_pp": 1.0}')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1.*n_kv"):
        rows_of(tmp_path / "bad.jsonl")


def test_in_a_terminal_without_colours() -> None:
    text = terminal_plot(picture_of({"": DEPTHS}, "depth", "a model"), 60, colours=False)
    lines = text.splitlines()
    assert "\x1b" not in text and max(map(len, lines)) <= 60
    assert lines[0].strip() == "a model: generation t/s"
    assert lines[-2:] == [" o -mla 1", " x -mla 3"]
    ticks = next(line for line in lines if line.split() == ["0", "4096"])
    assert lines[lines.index(ticks) + 1].strip() == "tokens in the cache"
    heights = [next(i for i, row in enumerate(lines) if mark in row) for mark in "ox"]
    assert heights[0] < heights[1]  # 19 t/s stand above 17
    assert any(row.startswith("19.0┤o") for row in lines)


def test_in_a_terminal_with_colours() -> None:
    text = terminal_plot(picture_of({"": DEPTHS}, "depth"), 80, colours=True)
    assert "\x1b[38;5;" in text and "\x1b[48;" not in text  # the background is the terminal's own
    one: Rows = [{"n_prompt": 4, "n_gen": 0, "n_depth": 0, "avg_ts": 0.5}]
    assert "━━" not in terminal_plot(picture_of({"": one}, "depth"), 80, colours=True)


def test_a_picture_says_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    draw(picture_of({"": DEPTHS}, "depth", "a model"), path, "--plot")
    svg = path.read_text()
    for text in ("a model", "generation", "tokens per second", "tokens in the cache", "-mla 3"):
        assert f">{text}<" in svg
    draw(picture_of({"": DEPTHS}, "depth", "a model"), tmp_path / "y.svg", "--plot")
    assert (tmp_path / "y.svg").read_text() == svg


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "x.svg"
    rows.write_text("\n".join(map(json.dumps, DEPTHS)))
    assert main([str(out), f"ours={rows}", "--title", "t/s", "--kind", "generation"]) == 0
    assert out.read_text().count("ours -mla") == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text('\n{"n_prompt": 1, "n_gen": 0}\n')
    rows.write_text(json.dumps(DEPTHS[0]))
    for words, line in (
        ([str(out), f"a={bad}"], "bad.jsonl:2: not a row of a bench ('avg_ts')"),
        ([str(out), str(bad)], "'name=file.jsonl' is wanted"),
        ([str(out), "a=/nonexistent"], "No such file"),
        ([str(out), f"a={rows}"], "nothing varies"),
        ([str(tmp_path / "x.bmp"), f"a={rows}"], "does not end with one of .png"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and line in capsys.readouterr().err
