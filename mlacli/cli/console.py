"""The only place that prints: text and tables to stdout, notes and errors to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from mlacli.errors import SpaceError

_LINE_LIMIT = 300


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
