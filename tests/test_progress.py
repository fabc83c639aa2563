"""Progress bars: on a terminal, for long work, gone when it is done; what the work tells."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import psutil
import pytest

from codegen.formats import CACHE_FORMATS
from codegen.jit import Jit, host_target
from codegen.kernels.shift import shift_rows
from mlacli.cli import console, progress
from mlacli.cli.log_settings import LogSettings
from mlacli.engine import load_model
from mlacli.memory import copy_of, peak_memory
from mlacli.session_file import load_session, save_session
from mlacli.settings import default_model
from mlacli.sweep import sweep
from tests.engines import make_engine

ROOT = Path(__file__).parent.parent
_CODE = re.compile(r"\x1b\[(\?25[hl]|[\d;]*m|(\d*)([A-Z]))")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    streams = types.SimpleNamespace(stdout=io.StringIO(), stderr=made)
    for module in (console, progress):  # pytest puts its own into sys when the test begins
        monkeypatch.setattr(module, "sys", streams)
    monkeypatch.setattr(progress, "_DELAY", 0.02)
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


def screen(shown: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(shown):
        if found := _CODE.match(shown, at):
            at = found.end()
            if found[3] == "A":
                row -= int(found[2] or 1)
            elif found[3] == "K":
                assert found[2] == "2"
                lines[row] = ""
            continue
        char, at = shown[at], at + 1
        if char == "\r":
            column = 0
        elif char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return [line for line in lines if line]


def wait_for(terminal: Terminal, pattern: str) -> None:
    end = time.monotonic() + 20
    while not re.search(pattern, _CODE.sub("", terminal.getvalue())):
        assert time.monotonic() < end, terminal.getvalue()[-400:]
        time.sleep(0.01)


def test_long_work_has_a_bar_that_vanishes(terminal: Terminal) -> None:
    with progress.bar("prompt", "tokens") as told:
        told(0, 2048)
        wait_for(terminal, r"prompt [━╸╺]+ 0/2048 tokens")
        told(512, 2048)
        wait_for(terminal, r"512/2048 tokens, [\d.]+ t/s, \d+:\d\d left")
        assert any("━" in line for line in screen(terminal.getvalue()))
    assert screen(terminal.getvalue()) == []
    assert "\x1b[?25h" in terminal.getvalue().rpartition("\x1b[?25l")[2]  # there is a cursor
    threads = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert all(t.finished.is_set() for t in threads)


def test_other_lines_never_mix_with_a_bar(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlacli.cli.console.sys.stdout", terminal)
    with progress.bar("reading", "bytes", background=False) as told:
        time.sleep(0.05)
        told(5 << 20, 10 << 20)
        assert re.search(r"reading [━╸╺]+ 5/10 MiB", _CODE.sub("", terminal.getvalue()))
        console.note("one")
        assert screen(terminal.getvalue()) == ["one"]
        told(6 << 20, 10 << 20)
        assert len(screen(terminal.getvalue())) == 2
        console.write("two\n")
        assert screen(terminal.getvalue()) == ["one", "two"]
        told(7 << 20, 10 << 20)
        console.error("three")
        assert screen(terminal.getvalue()) == ["one", "two", "error: three"]
    assert screen(terminal.getvalue()) == ["one", "two", "error: three"]


def test_short_work_has_none(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0.5)
    for background in (True, False):
        with progress.bar("prompt", "tokens", background=background) as told:
            told(1, 2)
            told(2, 2)
    time.sleep(0.6)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("settings", "variables"),
    [
        (LogSettings(progress=False), {}),
        (LogSettings(log_disable=True), {}),
        (LogSettings(verbosity=2), {}),
        (LogSettings(simple_io=True), {}),
        (LogSettings(), {"TERM": "dumb"}),
    ],
    ids=["--no-progress", "--log-disable", "-lv 2", "--simple-io", "TERM=dumb"],
)
def test_when_there_is_no_bar(
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    settings: LogSettings,
    variables: dict[str, str],
) -> None:
    assert console.shows_bars()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    console.start(settings)
    try:
        assert not console.shows_bars()
        with progress.bar("prompt", "tokens", background=False) as told:
            time.sleep(0.03)
            told(1, 2)
    finally:
        console.finish()
    assert terminal.getvalue() == ""


def test_no_colour_leaves_the_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with progress.bar("prompt", "tokens", background=False) as told:
        time.sleep(0.03)
        told(1, 2)
    assert "━" in terminal.getvalue() and not re.search(r"\x1b\[[\d;]*3\dm", terminal.getvalue())


def test_colours_of_lines_and_of_thoughts(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlacli.cli.console.sys.stdout", terminal)
    shown = []
    for settings in (LogSettings(), LogSettings(log_colors="off"), LogSettings(color="off")):
        console.start(settings)
        console.note("note: a")
        shown.append((terminal.getvalue(), console.dim("b")))
        terminal.seek(0)
        terminal.truncate()
        console.finish()
    assert shown == [
        ("\x1b[33mnote: a\x1b[0m\n", "\x1b[2mb\x1b[0m"),
        ("note: a\n", "\x1b[2mb\x1b[0m"),
        ("\x1b[33mnote: a\x1b[0m\n", "b"),
    ]
    monkeypatch.setattr("mlacli.cli.console.sys.stdout", io.StringIO())
    assert console.dim("b") == "b"
    console.start(LogSettings(color="on"))
    assert console.dim("b") == "\x1b[2mb\x1b[0m"
    console.finish()


# -- a real process -------------------------------------------------------------------------------


def test_a_long_prompt_shows_a_bar_to_a_terminal_and_none_to_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 90)
    words = ("run", "-f", "text", "--no-cnv", "-n", "2", "-t", "1", "-ub", "1", "--temp", "0")
    command = [sys.executable, "-m", "mlacli", *words, "--no-perf"]
    env = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    piped = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=60)
    assert piped.returncode == 0 and b"\x1b" not in piped.stderr + piped.stdout
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown = b""
    while part := _read(master):
        shown += part
    os.close(master)
    assert process.wait(60) == 0
    text = shown.decode()
    assert re.search(
        r"prompt [━╸╺]+ \d+/\d{4} tokens, [\d.]+ t/s, 0:\d\d left", _CODE.sub("", text)
    )
    last = screen(text)[-len(piped.stdout.decode().splitlines()) :]
    assert last == piped.stdout.decode().splitlines()
    assert not any("━" in line for line in screen(text))


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # the other side is closed
        return b""


# -- what the work tells --------------------------------------------------------------------------


class Told:
    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))


def test_micro_batches_sessions_and_steps(tmp_path: Path) -> None:
    engine, told = make_engine(default_model(), n_ctx=256, n_ubatch=64), Told()
    tokens = list(range(100, 250))
    engine.eval(tokens, range(150), progress=told)
    assert told.calls == [(0, 150), (64, 150), (128, 150), (150, 150)]
    told = Told()
    save_session(tmp_path / "s", engine, tokens, told)
    done, total = zip(*told.calls, strict=True)
    assert set(total) == {150 * engine.plan.layout.bytes_per_token} == {done[-1]}
    assert list(done) == sorted(done)
    told, other = Told(), make_engine(default_model(), n_ctx=256, n_ubatch=64)
    assert load_session(tmp_path / "s", other, told) == tokens
    size = (tmp_path / "s").stat().st_size
    assert told.calls[-1] == (size, size) and {total for _, total in told.calls} == {size}
    told = Told()
    assert len(list(sweep(engine, 1, progress=told))) == 4
    assert told.calls == [(0, 256), (64, 256), (128, 256), (192, 256)]


@pytest.mark.parametrize("n_processes", [1, 2])
def test_kernels(n_processes: int) -> None:
    told, jit = Told(), Jit(host_target(), n_processes=n_processes)
    kinds = [{"n_heads": 1, "n_before": 32 * i, "n_rope": 16} for i in range(1, 6)]
    specs = [shift_rows(**kind, fmt=CACHE_FORMATS["f32"]) for kind in kinds]
    jit.load_all(specs[:1])
    jit.load_all(specs, told)
    assert told.calls == [(n, 4) for n in range(5)]
    told = Told()
    jit.load_all(specs, told)
    assert told.calls == []


def test_files_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlacli.memory._COPIED", 64 << 10)
    told, size = Told(), default_model().stat().st_size
    model = load_model(default_model(), mmap=False, progress=told)
    assert told.calls[-1] == (size, size)
    mapped = load_model(default_model()).file.files[0].bytes
    assert np.array_equal(model.file.files[0].bytes, mapped)
    source, steps = mapped[: 130 << 10], list[int]()
    assert np.array_equal(copy_of(source, "x", huge=False, done=steps.append), source)
    assert [n >> 10 for n in steps] == [64, 128, 130]


def test_peak_memory() -> None:
    peak, anonymous = peak_memory()
    now = psutil.Process().memory_info()
    assert 0.9 * now.rss <= peak
    assert anonymous is None or 0 < anonymous <= peak
    block = np.ones(64 << 20, np.uint8)
    assert peak_memory()[0] >= 0.9 * now.rss + block.nbytes * (peak < 1.05 * now.rss)
