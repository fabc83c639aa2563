"""mlacli report over grids, --fit, --memory and --plot; run --dry-run. In this process."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mlacli.__main__ import main
from mlacli.errors import UsageError
from mlacli.gguf.reader import GGUFFile, open_gguf
from mlacli.limits import ByteSize
from mlacli.settings import default_model

Capture = pytest.CaptureFixture[str]
ROW = 6 * 2 * 160  # bytes of a demo model's token: 6 layers, 128 + 32 values of f16
MIB = 2**20
REASON = (
    "-ctk: q4_0 cannot hold the latent rows of -mla 3 (one of f32, f16, bf16, q8_0, q8_KV, q6_0, "
    "or -mla 0)"
)


def lines_of(capsys: Capture, words: str, code: int = 0) -> list[str]:
    assert main(words.split()) == code
    return capsys.readouterr().out.splitlines()


def test_one_row_for_each_combination(capsys: Capture) -> None:
    lines = lines_of(capsys, "report -c 512,1024 -ctk f16,q8_KV -mla 1,3 --memory 1GiB")
    assert lines[0].startswith("Final (") and lines[0].endswith("13.82 MiB of weights, 1.00 GiB "
                                                                "available")  # fmt: skip
    assert re.split(r"  +", lines[2].strip()) == [
        *("-mla", "-ctk", "-c", "cache MiB", "compute MiB", "output MiB", "derived MiB"),
        *("needed MiB", "KV B/token", "verdict"),
    ]
    rows = [line.split() for line in lines[4:]]
    assert [row[:3] for row in rows] == [
        [mla, type_k, n] for mla in "13" for type_k in ("f16", "q8_KV") for n in ("512", "1024")
    ]
    for row in rows:
        bytes_per_token = ROW if row[1] == "f16" else 6 * (8 + 160)
        cache, compute, output, derived, needed = map(float, row[3:8])
        assert cache == round(int(row[2]) * bytes_per_token / MIB, 2)
        assert needed == pytest.approx(cache + compute + output + derived, abs=0.03)
        assert row[8:] == [str(bytes_per_token), "fits"]


def test_what_cannot_work_is_a_row_that_says_why(capsys: Capture) -> None:
    lines = lines_of(capsys, "report -ctk f16,q4_0 -mla 0,3")
    assert [line.split("  ")[-1] for line in lines[4:]] == ["fits", "fits", "fits", REASON]
    heads = lines[2].split()
    assert heads[:4] == ["-mla", "-ctk", "-ctv", "-c"]
    assert [line.split()[2] for line in lines[4:]] == ["f16", "f16", "-", "-"]


def test_nothing_works(capsys: Capture) -> None:
    assert main(["report", "-c", "512,1024", "-ctk", "q4_0"]) == 2
    printed = capsys.readouterr()
    assert printed.out.count(REASON) == 2
    assert printed.err == f"error: none of 2 combinations can work: {REASON}\n"
    assert main(["report", "-ctk", "q4_0"]) == 2  # one alone is refused as ever
    assert capsys.readouterr() == ("", f"error: {REASON}\n")


def test_json_is_a_list_of_the_single_reports(capsys: Capture) -> None:
    common = "report -mla 3 --memory 1GiB --json -t 2"
    listed = json.loads("\n".join(lines_of(capsys, f"{common} -c 512,1024 -ctk f16,q4_0")))
    single = json.loads("\n".join(lines_of(capsys, f"{common} -c 1024 -ctk f16")))
    assert len(listed) == 4 and listed[1] == single
    assert single["flags"]["type_k"] == "f16" and single["memory"]["available_bytes"] == 2**30
    assert listed[2] == {"flags": {"type_k": "q4_0", "mla": 3, "n_threads": 2, "n_ctx": 512},
                         "error": REASON}  # fmt: skip


def test_notes_come_once(capsys: Capture) -> None:
    assert main(["report", "-c", "1024,4096,8192", "-mla", "1", "-amb", "64"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "note: -amb 64 has no effect with -fa on and -mla 1: K*Q is never stored",
        "note: -c 4096: the model was trained on 2048 tokens",
        "note: -c 8192: the model was trained on 2048 tokens",
    ]


def test_the_file_is_opened_once(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    opened: list[Path] = []

    def counted(path: Path) -> GGUFFile:
        opened.append(path)
        return open_gguf(path)

    monkeypatch.setattr("mlacli.engine.open_gguf", counted)
    lines_of(capsys, "report -c 256-2048+256 -ub 32,64")
    assert opened == [default_model()]


@pytest.mark.parametrize(
    ("available", "verdict"),
    [("6MiB", "does not fit"), ("20MiB", "weights will page from disk"), ("1GiB", "fits")],
)
def test_memory_stands_for_what_there_is(capsys: Capture, available: str, verdict: str) -> None:
    lines = lines_of(capsys, f"report -c 2048 --memory {available}")
    assert lines[-1].endswith(f" available: {verdict}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64GiB", 2**36),
        ("512MiB", 2**29),
        ("16G", 2**34),
        ("1.5g", 3 * 2**29),
        (".5Ti", 2**39),
        ("2048KiB", 2**21),
        ("16GB", 16 * 10**9),
        ("1024T", 2**50),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert ByteSize("--memory").parse(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "64", "G", "GiB", "-1G", "1e3G", "1_0G", "16 G", "0x10G", "infG", "nanG", "1.2.3G"),
        *("16PiB", "16B", "16bytes", "\u0661G", "9" * 50 + "G"),
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--memory: .* is not a size \(a number and a unit: "):
        ByteSize("--memory").parse(text)


@pytest.mark.parametrize("text", ["0G", "1023K", "1025T"])
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(UsageError, match=r"out of range \(1048576 to 1125899906842624 bytes\)$"):
        ByteSize("--memory").parse(text)


REFUSED = {
    "report --memory 64": "--memory: '64' is not a size (a number and a unit: 64GiB, 512MiB, 16G)",
    "report --fit -c 512,1024": "--fit: takes one value of each flag (2 combinations)",
    "report -fitt -1": "-fitt: -1 is out of range (0 to 1073741824)",
    "report -fitc 0": "-fitc: 0 is out of range (1 to 1073741824)",
    "report --fit maybe": "--fit: 'maybe' is not one of on, auto, 1, off, 0",
    "report -c 1-2000": "-c: '1-2000' has more than 1024 values",
    "report -c 1-1000 -ub 1-1000": "1000000 combinations of flags are too many (1024)",
    "report --plot x.jpg": "--plot: x.jpg: the name does not end with one of .png, .svg, .pdf",
    "report --plot no/x.png": "--plot: no/x.png: there is no such folder",
    "report -c 1-65 --plot x.png": "--plot: 65 combinations are too many to draw (64)",
    "report -fa on,maybe": "-fa: 'maybe' is not one of on, auto, 1, off, 0",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_before_the_file_is_opened(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words.split(), "-m", "missing.gguf"]) == 2
    assert capsys.readouterr() == ("", f"error: {REFUSED[words]}\n")


def test_fit_prints_a_command_that_fits(capsys: Capture) -> None:
    lines = lines_of(
        capsys, "report --fit --memory 9MiB -mla 1 -no-fmoe --mlock -ser 1,0.5 -c 0", 5
    )
    assert lines == []  # with --mlock the weights alone are more
    capsys.readouterr()
    words = f"report --fit --memory 9MiB -mla 1 -no-fmoe -ser 1,0.5 -c 0 -m {default_model()}"
    lines = lines_of(capsys, words)
    found = re.fullmatch(r"fit +(\d+) of 2048 tokens in 9\.00 MiB", lines[0])
    command = next(line for line in lines if line.startswith("command"))
    typed = shlex.split(command)[1:]
    assert found and typed[:4] == ["mlacli", "run", "-m", str(default_model())]
    assert shlex.join(typed[4:]).startswith(f"-c {found[1]} ")
    assert {"-no-fmoe", "-ser", "1,0.5", "-mla"} < set(typed)
    assert main([*typed[1:], "--dry-run"]) == 0
    assert f"n_ctx         = {found[1]}" in capsys.readouterr().out


def test_fit_as_json(capsys: Capture) -> None:
    found = json.loads("\n".join(lines_of(capsys, "report --fit --memory 18MiB --json -ub 512")))
    assert found["report"]["n_ctx"] == found["n_ctx"] == found["n_wanted"] == 2048
    assert found["report"]["memory"]["verdict"] == "weights will page from disk"
    assert found["steps"] == []
    assert "-ctk q8_KV" not in found["command"]
    assert found["without_paging"] == {"command": "mlacli run -c 256 -ub 512", "n_ctx": 256,
                                       "steps": []}  # fmt: skip
    found = json.loads("\n".join(lines_of(capsys, "report --fit --memory 14MiB --json -ctk f16")))
    assert found["without_paging"] is None  # no buffers are small enough beside the weights
    found = json.loads("\n".join(lines_of(capsys, "report --fit --memory 1GiB --json")))
    assert found["report"]["memory"]["verdict"] == "fits" and found["without_paging"] is None


def test_the_command_repeats_what_was_given(capsys: Capture) -> None:
    given = (
        "-Cr 0-0 -fa off -ser 2,0.5 --no-mmap -okv deepseek2.rope.freq_base=float:2e4 "
        "--rope-scaling linear --rope-scale 2"
    )
    words = f"report --fit --json --memory 40MiB {given}"
    found = json.loads("\n".join(lines_of(capsys, words)))
    again = found["command"].removeprefix("mlacli run").split()
    assert set(given.split()) - {"deepseek2.rope.freq_base=float:2e4", "2"} <= set(again)
    lines = "\n".join(lines_of(capsys, " ".join(["report --json", *again])))
    assert json.loads(lines)["compute_bytes"] == found["report"]["compute_bytes"]


def test_fit_leaves_memory_free(capsys: Capture) -> None:
    def n_ctx(words: str) -> int:
        return int(json.loads("\n".join(lines_of(capsys, f"report --fit --json {words}")))["n_ctx"])

    assert n_ctx("--memory 9MiB -fitt 2") == n_ctx("--memory 7MiB")
    assert n_ctx("--memory 9MiB -ub 512 -ctk f16 -amb 256") < n_ctx("--memory 9MiB")


def test_fit_that_cannot_be(capsys: Capture) -> None:
    assert main(["report", "--fit", "--memory", "1MiB"]) == 5
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: --fit: -c 256 does not fit: it needs ")
    assert (
        main(["report", "--fit", "--memory", "7MiB", "-fitc", "2048", "-ub", "512", "-amb", "256"])
        == 5
    )
    assert capsys.readouterr().err.startswith("error: --fit: -c 2048 does not fit: it needs ")


def test_a_bar_for_each_combination(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "memory.svg"
    words = f"report -c 512,2048 -ctk f16,q8_KV,q4_0 --memory 24MiB --plot {path}"
    assert main(words.split()) == 0
    assert "note: --plot leaves out 2 combinations that cannot work\n" in capsys.readouterr().err
    texts = ["".join(t.itertext()).strip() for t in ElementTree.parse(path).iter()
             if t.tag.endswith("}text")]  # fmt: skip
    for wanted in ("-c 512", "-ctk q8_KV", "24.00 MiB available", "MiB", "KV cache", "weights"):
        assert wanted in texts
    assert texts.count("-c 2048") == 2 and "-ctk q4_0" not in texts
    first = path.read_bytes()
    assert main(words.split()) == 0 and path.read_bytes() == first  # alike each time
    assert main(f"report -c 512 --memory 4GiB --plot {path}".split()) == 0
    assert "4.00 GiB available, far above" in path.read_text()


def test_a_file_cannot_break_its_picture(tmp_path: Path) -> None:
    from dataclasses import replace

    from mlacli.report import make_report
    from mlacli.report_grid import Row
    from mlacli.report_picture import draw
    from mlacli.settings import RunSettings

    report = make_report(RunSettings(), MIB)
    report = replace(report, model=replace(report.model, name=r"$\frac{$ &<x> $\nosuch$"))
    draw([Row({}, report)], tmp_path / "x.svg", "--plot")
    assert "nosuch" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("command", ["run", "run --no-cnv", "run -i", "chat", "run -p hello"])
def test_dry_run(command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: Any) -> None:
        raise AssertionError("a weight was touched")

    monkeypatch.setattr(GGUFFile, "data", touched)
    monkeypatch.setattr(GGUFFile, "address", touched)
    monkeypatch.setattr("sys.stdin", None)
    assert main([*command.split(), "-dr", "-c", "1024"]) == 0
    out, err = capsys.readouterr()
    assert "n_ctx         = 1024" in out and out.endswith("available: fits\n") and err == ""


def test_a_dry_run_that_does_not_fit(capsys: Capture) -> None:
    assert main(["run", "--dry-run", "-c", "2147483647"]) == 5
    out, err = capsys.readouterr()
    assert out.rstrip().splitlines()[-3].endswith("available: does not fit")
    assert re.fullmatch(r"error: -c 2147483648: needs \S+ GiB, \S+ \SiB available\n", err)


def test_a_dry_run_checks_the_other_flags(capsys: Capture) -> None:
    assert main(["run", "--dry-run", "--temp", "nan"]) == 2
    assert main(["run", "--dry-run", "-f", "missing.txt"]) == 2
    capsys.readouterr()
