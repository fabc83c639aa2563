"""Writing files so that what bears the name is always whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

Data = bytes | memoryview


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
