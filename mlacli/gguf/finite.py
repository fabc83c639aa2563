"""Looks for NaN and Inf in weights (--check-tensors) without decoding them.

A block holds whole numbers and a few floats that they are multiplied with. No product of f16 scales
and codes overflows f32, so a value is NaN or Inf exactly when a float of its block is: only those
are read, and of them only the exponent, which is all ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from codegen.formats import BlockFormat
from mlacli.errors import ModelError
from mlacli.gguf.parse import TensorInfo, format_of, has_format
from mlacli.gguf.problem import LINE_LIMIT, model_error, printable
from mlacli.gguf.quants import split_rows
from mlacli.gguf.reader import GGUFFile

_PART = 8 << 20  # bytes looked at together: what is made of them stays in a cache
# float type -> (its bits as a number, the bits of the exponent)
_EXPONENTS = {
    ("f", 16): ("<u2", 0x7C00),
    ("g", 16): ("<u2", 0x7F80),
    ("f", 32): ("<u4", 0x7F800000),
}


@dataclass(frozen=True)
class Bad:
    """A tensor with blocks that are not finite: how many of how many, and the first of them."""

    name: str
    count: int
    n_blocks: int
    first: int

    def __str__(self) -> str:
        return f"{self.name} ({self.count} of {self.n_blocks} blocks, first {self.first})"


def check_values(file: GGUFFile, n_threads: int) -> str:
    """What has been looked at, as one line. Raises ModelError naming the tensors that hold NaN or
    Inf."""
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and rarely needed

    start = time.perf_counter()
    tensors = [tensor for tensor in file.tensors.values() if has_format(tensor)]
    with ThreadPoolExecutor(max(1, n_threads)) as pool:  # numpy lets go of the interpreter's lock
        found = [bad for bad in pool.map(lambda t: find_bad(file, t), tensors) if bad]
    if found:
        raise _refusal(file, found)
    gib, seconds = sum(t.nbytes for t in tensors) / 2**30, time.perf_counter() - start
    left = len(file.tensors) - len(tensors)
    but = f"; {left} that are not used have types that are not known" if left else ""
    return (
        f"--check-tensors: no NaN or Inf in {len(tensors)} tensors, {gib:.2f} GiB "
        f"({seconds:.1f} s{but})"
    )


def _refusal(file: GGUFFile, found: list[Bad]) -> ModelError:
    """As many of the tensors as one line has room for."""
    field = f"{len(found)} tensor{'s' if len(found) > 1 else ''} with NaN or Inf"
    shown = ""
    room = LINE_LIMIT - len(printable(str(file.path), 80)) - len(field) - len(": : and 65536 more")
    for n, bad in enumerate(found):
        text = f"{', ' if n else ''}{printable(bad.name, 63)}{str(bad)[len(bad.name) :]}"
        if len(shown) + len(text) > room:
            shown += f" and {len(found) - n} more"
            break
        shown += text
    return model_error(file.path, field, shown)


def find_bad(file: GGUFFile, tensor: TensorInfo) -> Bad | None:
    """The blocks of a tensor that are not finite; None if all are.

    Raises ModelError for a type whose blocks are not known.
    """
    fmt = format_of(file.path, tensor)
    rows = file.data(tensor.name).reshape(tensor.n_rows, tensor.row_bytes)
    per_row = tensor.shape[0] // fmt.size
    count, first = 0, -1
    step = max(1, _PART // tensor.row_bytes)
    for start in range(0, tensor.n_rows, step):
        wrong = wrong_blocks(rows[start : start + step], fmt, per_row)
        n = int(np.count_nonzero(wrong))
        if n and first < 0:
            first = start * per_row + int(wrong.argmax())
        count += n
    return Bad(tensor.name, count, tensor.n_rows * per_row, first) if count else None


def wrong_blocks(rows: npt.NDArray[np.uint8], fmt: BlockFormat, per_row: int) -> Any:
    """Which blocks of these rows are not finite, flat."""
    header, blocks = split_rows(rows, fmt)
    wrong = np.zeros((len(rows), per_row), np.bool_)
    for bits in (*_exponents(header, fmt.header), *_exponents(blocks, fmt.fields)):
        wrong |= bits
    return wrong.reshape(-1)


def _exponents(parts: Any, fields: Any) -> Iterator[Any]:
    """Of each float field: whether its exponent is all ones."""
    for each in fields:
        known = _EXPONENTS.get((each.type.kind, each.type.bits))
        if known:
            code, mask = known
            yield parts[each.name].view(code) & mask == mask
