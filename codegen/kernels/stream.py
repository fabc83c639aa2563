"""Streaming weight rows: which rows come next, and asking for their memory in time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.dtypes import i64
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

# Memory is asked for twice before it is used. The far request brings it to the second-level cache
# and, walking on in order, makes that level's own prefetcher run ahead; the near one brings it to
# the first level, so that no load waits and the loop runs on to the next far request.
FAR_BYTES, NEAR_BYTES = 16384, 4096
L1, L2 = 3, 2
TILE_BYTES, MAX_GROUPS = 36864, 16  # what a thread takes at a time: long enough a walk


@dataclass(frozen=True)
class Stream:
    """A group of rows, and the address of the group that is read after it."""

    first: Pointer
    n_rows: Value | int  # 1 .. lanes
    following: Pointer

    def ahead(self, k: Kernel, row: Value, n_bytes: int, pitch: int) -> Pointer:
        """Where the row lies that is read about `n_bytes` after `row`."""
        distance = -(-n_bytes // pitch)
        behind = row + distance - self.n_rows
        within = self.first.bytes((row + distance) * pitch)
        return k.select_pointer(behind < 0, within, self.following.bytes(behind * pitch))


def ask(k: Kernel, far: Pointer, near: Pointer, at: Value, n_bytes: int) -> None:
    """Ask for `n_bytes` from byte `at` on of a far and a near row. Called along a row. The far walk
    may step over a line now and then, what it sets going does not; the near one takes every line.
    """
    line = k.target.cache_line
    for start in range(0, max(1, n_bytes - line // 2), line):
        k.prefetch(far.bytes(at).bytes(start), L2)
    for start in range(0, n_bytes, line):
        k.prefetch(near.bytes(at).bytes(start), L1)


@contextmanager
def tiles_ahead(k: Kernel, n: Any) -> Iterator[tuple[Value, Value]]:
    """Tiles of range(n) as `k.tiles` hands them out, each with the one this thread has after it;
    behind the last tile that is the last one again. So what comes next can be asked for."""
    counter, n = k.counter(), k.const(n, i64)
    tile = k.var(k.fetch_add(counter, 1))
    with k.when((tile.get() < n) & k.cancelled().eq(0)):
        with k.repeat_while() as go_on:
            following = k.fetch_add(counter, 1)
            yield tile.get(), k.minimum(following, n - 1)
            tile.set(following)
            go_on((following < n) & k.cancelled().eq(0))


def tile_rows(k: Kernel, pitch: int) -> int:
    """Rows of `pitch` bytes that a thread takes at a time: whole groups."""
    n = k.target.lanes
    return n * max(1, min(MAX_GROUPS, TILE_BYTES // (n * pitch)))


def group_size(k: Kernel, first: Value, n_rows: int) -> Value | int:
    """How many of a group's rows there are, from row `first` on."""
    n = k.target.lanes
    return k.minimum(n_rows - first, n) if n_rows % n else n
