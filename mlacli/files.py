"""Writing files so that what bears the name is always whole; reading the system's."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mlacli.errors import SpaceError, UsageError

Data = bytes | memoryview


def check_target(flag: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise UsageError, before slow work begins, where no such file can be written."""
    if path.suffix not in suffixes:
        what = suffixes[0] if len(suffixes) == 1 else f"one of {', '.join(suffixes)}"
        raise UsageError(f"{flag}: {path}: the name does not end with {what}")
    if path.is_dir():
        raise UsageError(f"{flag}: {path}: is a folder")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{flag}: {path}: there is no such folder")


def write_whole(path: Path, parts: Iterable[Data]) -> int:
    """Write parts one after another as a file of mode 0600; returns its size.

    They go to another name in the same folder, are synced and renamed; a link at `path` is
    replaced, not followed. Raises OSError: then what was there before stays, and nothing else.
    """
    folder = path.absolute().parent
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
    return size


def write_text(flag: str, path: Path, text: str) -> None:
    """A text file, whole or not at all. Raises SpaceError, which begins with `flag`."""
    try:
        write_whole(path, [text.encode("utf-8", "backslashreplace")])
    except OSError as problem:
        raise SpaceError(f"{flag}: {path}: {problem.strerror}") from problem


def system_text(path: Path) -> str:
    """What a file of /proc or /sys says, without white space around it; nothing where it is not."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
