"""The command line as its own process: help, broken streams, odd surroundings."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlacli import __version__

ROOT = Path(__file__).resolve().parent.parent


def _mlacli(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlacli", *words]
    stdin = subprocess.DEVNULL
    return subprocess.run(command, stdin=stdin, text=True, cwd=ROOT, timeout=60, **options)


def test_help_and_version() -> None:
    for words in ([], ["--help"], ["-h"], ["--usage"]):
        done = _mlacli(*words, capture_output=True)
        assert done.returncode == 0 and done.stdout.startswith("Usage: mlacli")
    for command in ("run", "bench", "report"):
        done = _mlacli(command, "--help", capture_output=True)
        assert done.returncode == 0 and done.stdout.startswith(f"Usage: mlacli {command}")
    assert _mlacli("--version", capture_output=True).stdout == f"mlacli {__version__}\n"


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["bench", "--help"], ["run", "-p", "x", "-t", "0"]]
)
def test_nothing_heavy_is_loaded_before_a_model_is(words: list[str]) -> None:
    """pydantic: typer would read values with it."""
    program = (
        "import sys; from mlacli.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'numpy', 'llvmlite', 'gguf', 'jinja2', 'tokenizers', 'tabulate', 'rich'};"
        "heavy |= {'tomlkit', 'tomllib'};"
        "found = (heavy | {'pydantic', 'pydantic_core'}) & sys.modules.keys();"
        "sys.exit(str(found) if found else 0)"
    )
    command = [sys.executable, "-c", program, *words]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize(("words", "limit"), [(["--help"], 0.15), (["run", "--help"], 0.2)])
def test_help_is_fast(words: list[str], limit: float) -> None:
    """The limit is for an idle machine; a busy one may take twice that."""
    best = 10.0
    for _ in range(5):
        start = time.perf_counter()
        _mlacli(*words, capture_output=True)
        best = min(best, time.perf_counter() - start)
    assert best < 2 * limit


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mlacli r", ["run", "report"]),
        ("mlacli run --mm", ["--mmap"]),
        ("mlacli run --no-such-flag -fm", ["-fmoe"]),
        ("mlacli bench -mm", ["-mmp"]),
        ("mlacli run -no-f", ["-no-fmoe", "-no-fa"]),
        ("mlacli run -ctk f1", ["f16"]),
        ("mlacli run -fa ", ["on", "off", "auto"]),
        ("mlacli bench -ctk f16,q8_", ["f16,q8_0", "f16,q8_KV"]),
        ("mlacli bench -o js", ["json", "jsonl"]),
        ("mlacli run -m ", []),  # the shell offers files
        ("mlacli config re", ["report"]),
    ],
)
def test_completion(line: str, offered: list[str]) -> None:
    last = str(line.count(" "))
    asked = {"_MLACLI_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": last}
    done = _mlacli(capture_output=True, env=os.environ | asked)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, offered, "")


def _asked(shell: str, line: str, action: str = "") -> subprocess.CompletedProcess[str]:
    asked = {"_MLACLI_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    asked["_TYPER_COMPLETE_FISH_ACTION"] = action
    return _mlacli(capture_output=True, env=os.environ | asked)


def test_completion_of_zsh_and_fish() -> None:
    """Help stands beside a flag, on one line; where nothing is offered, files are."""
    assert '"-mla":"0\\\\: K and V; ' in _asked("zsh", "mlacli run -ml").stdout
    assert '_arguments \'*: :(("0"\n"1"\n"2"\n"3"))\'' in _asked("zsh", "mlacli run -mla ").stdout
    flags = _asked("fish", "mlacli run -ct", "get-args").stdout.splitlines()
    assert [line.split("\t")[0] for line in flags] == ["-ctk", "-ctv"]
    assert _asked("fish", "mlacli run -ctk f1", "get-args").stdout.split() == ["f16"]
    assert _asked("fish", "mlacli run -m ", "is-args").returncode == 1


def test_completion_in_bash(tmp_path: Path) -> None:
    """The script that typer writes, in a real bash, whose only commands are env and ours."""
    command = tmp_path / "mlacli"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlacli "$@"\n')
    command.chmod(0o755)
    from typer._completion_shared import get_completion_script

    script = get_completion_script(
        prog_name="mlacli", complete_var="_MLACLI_COMPLETE", shell="bash"
    )
    program = (
        f"{script}\nCOMP_WORDS=(mlacli run -rea o); COMP_CWORD=3\n"
        '_mlacli_completion mlacli; echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", program],
        env=os.environ | {"PATH": path},
        cwd=ROOT,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "on off\n"


def test_completion_script() -> None:
    done = _mlacli("--show-completion", capture_output=True)
    assert done.returncode in (0, 1)  # 1: started from no shell that it knows
    assert ("_MLACLI_COMPLETE" in done.stdout) == (done.returncode == 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's always-full device")
def test_full_stdout_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = _mlacli("--help", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 5
    assert done.stderr == "error: stdout: No space left on device\n"


def test_reader_that_left_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = _mlacli("--help", stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"COLUMNS": "0", "TERM": "dumb"},
        {"HOME": ""},
    ],
)
def test_odd_surroundings(changes: dict[str, str]) -> None:
    done = _mlacli("run", "-t", "größe", capture_output=True, env=os.environ | changes)
    assert done.returncode == 2
    assert done.stderr.startswith("error: -t: 'gr") and done.stderr.count("\n") == 1
    assert _mlacli("run", "--help", capture_output=True, env=os.environ | changes).returncode == 0
