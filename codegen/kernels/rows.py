"""Handing out rows of a tensor to threads, and walking along one row in registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from codegen.dtypes import f32, i64
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

TILE_VALUES = 4096  # work behind one turn of the shared tile counter, so that its cost is lost


@contextmanager
def row_tiles(
    k: Kernel, n_rows: Any, width: int, tile_values: int = TILE_VALUES
) -> Iterator[Value]:
    """Each row 0 .. n_rows - 1 once, on some thread; narrow rows are handed out several at a time.

    What a row's code computes must depend on the row only, never on the rows before it.
    """
    n_rows, per_tile = k.const(n_rows, i64), max(1, tile_values // width)
    with k.tiles((n_rows + (per_tile - 1)) // per_tile) as tile:
        stop = k.minimum((tile + 1) * per_tile, n_rows)
        with k.loop(tile * per_tile, stop) as row:
            yield row


def vectors(k: Kernel, p: Pointer, n: int) -> list[Value]:
    """The first n f32 values at `p` in registers of the target's width, in order."""
    return [p.at(i).load(f32 * k.target.lanes) for i in range(0, n, k.target.lanes)]


def store_vectors(p: Pointer, values: list[Value]) -> None:
    """Store vectors one after another."""
    at = 0
    for value in values:
        p.at(at).store(value)
        at += value.type.lanes


def tree(k: Kernel, values: list[Value], op: str) -> Value:
    """One number out of all lanes of all vectors ("add" or "max"), always in the same order."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [a + b if op == "add" else k.maximum(a, b) for a, b in pairs]
    return k.reduce(op, values[0])
