"""Bodies on a pipe: 8 bytes of length (little endian), then the body."""

from __future__ import annotations

from typing import IO


def write_frame(pipe: IO[bytes], body: bytes) -> None:
    pipe.write(len(body).to_bytes(8, "little") + body)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next body; None at the end of the pipe, also in the middle of a frame."""
    head = pipe.read(8)
    length = int.from_bytes(head, "little")
    body = pipe.read(length) if len(head) == 8 else b""
    return body if len(head) == 8 and len(body) == length else None
