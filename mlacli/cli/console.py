"""The only place that prints: text and tables to stdout, notes and errors to stderr.

`start` says how (mlacli/cli/log_settings.py); before it the defaults hold.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from mlacli.cli.log_settings import ERRORS, INFO, NOTES, LogSettings
from mlacli.debug import ENV
from mlacli.errors import SpaceError

_LINE_LIMIT = 300
_HISTORY = 1000
_DIM, _PROMPT, _TYPED, _RED, _YELLOW = "\x1b[2m", "\x1b[33m", "\x1b[1;32m", "\x1b[31m", "\x1b[33m"
_RESET = "\x1b[0m"
_OF_LEVEL = {ERRORS: ("E", _RED), NOTES: ("W", _YELLOW), INFO: ("I", "")}


@dataclass
class _Log:
    settings: LogSettings = field(default_factory=LogSettings)
    file: TextIO | None = None
    started: float = field(default_factory=time.monotonic)
    hide: Callable[[], None] | None = None  # takes a progress bar off the screen


_log = _Log()


def start(settings: LogSettings) -> None:
    """From now on lines are shown as these settings want. Raises SpaceError."""
    _log.settings, _log.started = settings, time.monotonic()
    if settings.path is None:
        return
    try:
        _log.file = settings.path.open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as problem:
        raise SpaceError(f"--log-file: {settings.path}: {problem.strerror}") from problem


def finish() -> None:
    """Close the log; the defaults hold again."""
    if _log.file is not None:
        with contextlib.suppress(OSError):  # it was flushed line by line
            _log.file.close()
    _log.settings, _log.file, _log.hide = LogSettings(), None, None


def set_bar(hide: Callable[[], None] | None) -> None:
    """There is a progress bar, which `hide` takes away until it is told something; or none."""
    _log.hide = hide


def shows_bars() -> bool:
    """Whether progress can be shown: by a terminal that can do more than lines."""
    s = _log.settings
    wanted = s.progress and not s.simple_io and s.shown >= INFO and not ENV.dumb_terminal
    return wanted and sys.stderr is not None and sys.stderr.isatty()


def shows_colours(stream: TextIO | None, when: str | None = None) -> bool:
    """Whether text on this stream may be coloured: by --color unless another flag says."""
    when = when or _log.settings.color
    if stream is None or _log.settings.simple_io or when == "off":
        return False
    return when == "on" or (ENV.colours and stream.isatty())


def write(text: str) -> None:
    """Put `text` on stdout at once, so that a reader sees each token as it is made.

    Raises SpaceError when it cannot be written, BrokenPipeError when the reader is gone.
    """
    if sys.stdout is None:
        raise SpaceError("stdout: is closed")
    if _log.hide:
        _log.hide()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise SpaceError(f"stdout: {problem.strerror}") from problem


def note(line: str) -> None:
    """A line on stderr and in the log, if they are to have it: `note: ...` is one that warns."""
    _line(line, NOTES if line.startswith("note: ") else INFO)


def tell(line: str) -> None:
    """A line on stderr that was asked for, whatever the log flags say."""
    _put(sys.stderr, line)


def _line(line: str, level: int) -> None:
    settings, (letter, colour) = _log.settings, _OF_LEVEL[level]
    if settings.log_prefix:
        line = f"{letter} {line}"
    if settings.log_timestamps:
        line = f"{_time()} {line}"
    if level <= max(settings.shown, ERRORS):
        coloured = colour and shows_colours(sys.stderr, settings.log_colors)
        _put(sys.stderr, f"{colour}{line}{_RESET}" if coloured else line)
    if _log.file is not None and level <= max(settings.verbosity, ERRORS):
        _put(_log.file, line)


def _time() -> str:
    """llama.cpp's: minutes, seconds, milliseconds, microseconds."""
    us = int(1e6 * (time.monotonic() - _log.started))
    return f"{us // 60_000_000}.{us // 10**6 % 60:02d}.{us // 1000 % 1000:03d}.{us % 1000:03d}"


def _put(stream: TextIO | None, line: str) -> None:
    """A stream that cannot be written is no reason to stop."""
    if _log.hide:
        _log.hide()
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.write(line + "\n")
            stream.flush()


def error(message: str) -> None:
    """`error: ...` as exactly one line of at most 300 characters, safe for a terminal."""
    line = "".join(c if c.isprintable() else _escaped(c) for c in f"error: {message}")
    _line(line if len(line) <= _LINE_LIMIT else line[: _LINE_LIMIT - 3] + "...", ERRORS)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode()


def is_talking() -> bool:
    """Whether a person types: then there are prompts and line editing."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout is not None


def ask(prompt: str) -> str | None:
    """A line that is typed, or None at the end of input; no prompt is shown to a script."""
    try:
        if is_talking():
            return _typed(prompt)
        line = sys.stdin.readline() if sys.stdin is not None else ""
        return line.removesuffix("\n") if line else None
    except EOFError:
        write("\n")
        return None


def _typed(prompt: str) -> str:
    """A line that a person types, in its own colour. Raises EOFError."""
    if _log.settings.simple_io:
        write(prompt)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.removesuffix("\n")
    if not shows_colours(sys.stdout):
        return input(prompt)
    try:  # readline must not count what takes no room
        return input(f"{prompt}\x01{_TYPED}\x02")
    finally:
        write(_RESET)


@contextlib.contextmanager
def line_editing(words: Iterable[str]) -> Iterator[None]:
    """History, kept in a file of the user's, and completion of `words` while lines are typed."""
    if not is_talking() or _log.settings.simple_io:
        yield
        return
    import readline

    from platformdirs import user_state_path

    path = user_state_path("mlacli") / "history"
    known = sorted(words)
    readline.set_completer_delims(" ")
    readline.set_completer(
        lambda text, i: next(iter([w for w in known if w.startswith(text)][i:]), None)
    )
    readline.parse_and_bind("tab: complete")
    with contextlib.suppress(OSError):  # the first time there is none
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(path)
            path.chmod(0o600)
        except OSError as problem:
            note(f"note: the history is not kept: {path}: {problem.strerror}")


def dim(text: str) -> str:
    """Dim where colours are shown, else as it is."""
    return f"{_DIM}{text}{_RESET}" if shows_colours(sys.stdout) else text


def prompt(text: str) -> str:
    """In the colour of prompts where colours are shown, else as it is."""
    return f"{_PROMPT}{text}{_RESET}" if shows_colours(sys.stdout) else text


_MARKS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def marked(text: str, status: str) -> str:
    """In the colour of a status where colours are shown, else as it is."""
    if not shows_colours(sys.stdout):
        return text
    from rich.color import ColorSystem
    from rich.style import Style

    return Style.parse(_MARKS[status]).render(text, color_system=ColorSystem.STANDARD)


def prepare_streams() -> None:
    """Characters that the locale cannot show are escaped instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def abandon(stream: TextIO | None) -> None:
    """Throw away what a broken stream still buffers; else Python complains when it exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        assert stream is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
