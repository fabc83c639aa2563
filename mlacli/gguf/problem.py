"""The one line that a bad model file is refused with."""

from __future__ import annotations

from pathlib import Path

from mlacli.errors import ModelError

LINE_LIMIT = 290  # with the command line's "error: " in front it stays within 300


def printable(text: str, limit: int) -> str:
    r"""`text` with control, bidi and undecodable characters escaped, its middle cut to fit `limit`.

    Bytes that were no UTF-8 arrive here as surrogate escapes and are shown as `\xff`.
    """
    if len(text) > 2 * limit:
        text = text[:limit] + text[-limit:]
    line = "".join(char if char.isprintable() else _escaped(ord(char)) for char in text)
    if len(line) <= limit:
        return line
    half = (limit - 3) // 2
    return f"{line[:half]}...{line[-half:]}"


def _escaped(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape's stand-in for one undecodable byte
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def model_error(
    path: Path, field: str, problem: str, *, got: object = None, limit: object = None
) -> ModelError:
    """`<file>: <field or tensor>: <what is wrong> (got X, limit Y)`, at most 290 characters.

    `field` and `got` may come straight from the file: they are escaped and shortened here.
    `limit` is what the value should have been: a bound, a range or the one right value.
    """
    details = []
    if got is not None:
        details.append(f"got {printable(str(got), 40)}")
    if limit is not None:
        details.append(f"limit {printable(str(limit), 60)}")
    tail = f" ({', '.join(details)})" if details else ""
    head = f"{printable(str(path), 80)}: {printable(field, 72)}: "
    return ModelError(head + printable(problem, LINE_LIMIT - len(head) - len(tail)) + tail)
