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
    ],
)
def test_completion(line: str, offered: list[str]) -> None:
    last = str(len(line.split()) - 1)
    asked = {"_MLACLI_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": last}
    done = _mlacli(capture_output=True, env=os.environ | asked)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, offered, "")


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
