"""`mlacli sweep` and `mlacli compare`."""

from __future__ import annotations

import json
import re
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
        "main: n_kv_max = 256, n_batch = 2048, n_ubatch = 64, flash_attn = 1, n_gpu_layers = 0, "
        "n_threads = 2, n_threads_batch = 2"
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


# What llama-sweep-bench (ik_llama.cpp 8337e4cd3) printed with --sweep-memory, for its layout.
PEER_HEAD = """\
|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |    RSS HWM | VRAM delta |
|-------|--------|--------|----------|----------|----------|----------|------------|------------|
"""
PEER_LINE = (
    "|   128 |     16 |    384 |    5.031 |    25.44 |    4.953 |     3.23 "
    "|       84.1 |        n/a |"
)
PEER_JSON = (
    '{"n_kv_max": 512, "n_batch": 2048, "n_ubatch": 128, "flash_attn": 1, "n_gpu_layers": -1, '
    '"n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 16, "n_kv": 384, "t_pp": 3.545717, '
    '"speed_pp": 36.099892, "t_tg": 5.380450, "speed_tg": 2.973729, "rss_hwm_mib": 84.195, '
    '"vram_delta_mib": null }'
)


def shape(text: str) -> str:
    """Numbers of a line as 9s of the same number of digits behind the point."""
    return re.sub(
        r" *-?[0-9]+(?=[., |}])", " 9", re.sub(r"(?<=\.)[0-9]+", lambda m: "9" * len(m[0]), text)
    )


def test_sweep_has_the_peers_layout_to_the_letter(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["sweep", "-c", "256", "-ub", "128", "-n", "2", "-t", "2", "--sweep-memory"]
    assert main([*words, "--plot", str(tmp_path / "x.svg"), "--plot", "-"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines(keepends=True)
    assert "".join(lines[2:4]) == PEER_HEAD and len(lines) == 6
    assert {shape(line.strip()) for line in lines[4:]} == {shape(PEER_LINE)}
    assert set(map(len, lines[4:])) == {len(PEER_LINE) + 1}
    assert printed.err.count("tokens in the cache") == 2 and "prompt t/s" in printed.err
    assert "tokens in the cache" in (tmp_path / "x.svg").read_text()
    assert main([*words, "--output-format", "jsonl"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert {shape(line) for line in found} == {shape(PEER_JSON)}
    assert [json.loads(line).keys() for line in found] == [json.loads(PEER_JSON).keys()] * 2


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


def test_rows_of_peers(tmp_path: Path) -> None:
    """ik_llama.cpp's llama-bench has no jsonl; the prompt of its -gp is not timed."""
    rows: list[dict[str, object]] = [
        row(64, 8, 5.0, test="tg8@pp64", mla_attn=3, use_mmap=True),
        row(64, 8, 50.0, test="pp64+tg8", mla_attn=3, use_mmap=True),
        {"n_prompt": 64, "n_gen": 0, "avg_ts": None, "error": "needs 412 GiB"},
        *(row(64, 0, rate) for rate in (0.0, float("nan"), float("inf"))),
    ]
    (tmp_path / "ik.json").write_text(json.dumps(rows, indent=2))
    found = rows_of(tmp_path / "ik.json")
    assert [name_of_test(one) for one in found] == ["tg8 @ d64", "pp64+tg8"]
    assert rows_of(Path(written(tmp_path / "ik.jsonl", *rows))) == found
    depth = '{"n_prompt": 1, "n_gen": 0, "avg_ts": 1, "n_depth": "deep"}'
    samples = '{"n_prompt": 1, "n_gen": 0, "avg_ts": 1, "samples_ts": ["fast"]}'
    name = '{"n_prompt": "x", "n_gen": 0, "avg_ts": 1}'
    for text in ("[1]", "[", '["speed_pp"]', "null", name, depth, samples):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ValueError, match=r"bad.*not a row of a bench"):
            rows_of(tmp_path / "bad")


def test_how_a_file_is_read_names_rows_once() -> None:
    rows = [
        row(8, 0, 1, load_mode=mode, use_mmap="mmap" in mode, repack=rtr, model_filename="a/b.gguf")
        for mode in ("mmap", "mmap+mlock", "none")
        for rtr in (False, True)
    ]
    names = [one.test for one in compare(rows, rows)]
    assert names[:3] == ["pp8 -lm mmap -rtr 0", "pp8 -lm mmap -rtr 1", "pp8 -lm mmap+mlock -rtr 0"]


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
