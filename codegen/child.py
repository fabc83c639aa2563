"""Helper processes: Python scripts that see nothing of what is around them, spoken to in frames.

A frame is 8 bytes of length (little endian), then a body.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO


def start_child(script: Path, folders: Iterable[str]) -> subprocess.Popen[bytes]:
    """The script in a process of its own, its arguments the folders that it may import from.

    It has no environment, no site-packages and no terminal: Ctrl-C is for the program, not for its
    helpers. Raises OSError.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(script), *folders],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )


def write_frame(pipe: IO[bytes], body: bytes) -> None:
    pipe.write(len(body).to_bytes(8, "little") + body)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next body; None at the end of the pipe, also in the middle of a frame."""
    head = pipe.read(8)
    length = int.from_bytes(head, "little")
    body = pipe.read(length) if len(head) == 8 else b""
    return body if len(head) == 8 and len(body) == length else None
