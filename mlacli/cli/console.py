"""The only place that prints: text and tables to stdout, notes and errors to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from mlacli.debug import ENV
from mlacli.errors import SpaceError

_LINE_LIMIT = 300
_HISTORY = 1000


def write(text: str) -> None:
    """Put `text` on stdout at once, so that a reader sees each token as it is made.

    Raises SpaceError when it cannot be written, BrokenPipeError when the reader is gone.
    """
    if sys.stdout is None:
        raise SpaceError("stdout: is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise SpaceError(f"stdout: {problem.strerror}") from problem


def note(line: str) -> None:
    """A line on stderr. A stderr that cannot be written is no reason to stop."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def error(message: str) -> None:
    """`error: ...` as exactly one line of at most 300 characters, safe for a terminal."""
    line = "".join(c if c.isprintable() else _escaped(c) for c in f"error: {message}")
    note(line if len(line) <= _LINE_LIMIT else line[: _LINE_LIMIT - 3] + "...")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode()


def is_talking() -> bool:
    """Whether a person types: then there are prompts and line editing."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout is not None


def ask(prompt: str) -> str | None:
    """A line that is typed, or None at the end of input; no prompt is shown to a script."""
    try:
        if is_talking():
            return input(prompt)
        line = sys.stdin.readline() if sys.stdin is not None else ""
        return line.removesuffix("\n") if line else None
    except EOFError:
        write("\n")
        return None


@contextlib.contextmanager
def line_editing(words: Iterable[str]) -> Iterator[None]:
    """History, kept in a file of the user's, and completion of `words` while lines are typed."""
    if not is_talking():
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


def shows_bars() -> bool:
    """Whether progress may be drawn: stderr is a terminal that can move its cursor."""
    return ENV.cursor and sys.stderr is not None and sys.stderr.isatty()


def dim(text: str) -> str:
    """Dim on a terminal that shows colours, else as it is."""
    if not ENV.colours or sys.stdout is None or not sys.stdout.isatty():
        return text
    return f"\x1b[2m{text}\x1b[0m"


_MARKS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def marked(text: str, status: str) -> str:
    """In the colour of a status on a terminal that shows colours, else as it is."""
    if not ENV.colours or sys.stdout is None or not sys.stdout.isatty():
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
