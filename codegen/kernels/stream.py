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
SHARES = 32  # parts of a range at most: their counters are placed when building
CLAIM = 4  # a thread takes this fraction of what is left of a part


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
    """Tiles of range(n), each with the one this thread has after it, so that what comes next can be
    asked for; behind the last tile that is the last one again.

    Each thread has a part of the range to itself and helps with the others' when it is done. So it
    walks on in memory, as prefetchers expect: whatever they bring too early is used.
    """
    shares = _Shares(k, k.const(n, i64))
    tile = k.var(shares.take())
    with k.when((tile.get() < shares.n) & k.cancelled().eq(0)):
        with k.repeat_while() as go_on:
            following = shares.take()
            yield tile.get(), k.select(following < shares.n, following, tile.get())
            tile.set(following)
            go_on((following < shares.n) & k.cancelled().eq(0))


class _Shares:
    """range(n) in a part per thread; above SHARES threads, some have one together.

    Numbers are claimed a quarter of what is left of a part at a time: an atomic addition waits for
    all loads before it, which costs as much as a few hundred bytes of a stream.
    """

    def __init__(self, k: Kernel, n: Value) -> None:
        self.k, self.n = k, n
        self.count = k.minimum(k.n_threads, SHARES)
        self.counters = k.counter(SHARES)
        self.done, self.next, self.stop = (k.var(k.const(0, i64)) for _ in range(3))

    def take(self) -> Value:
        """The next number, of this thread's part if there is one left; n when there is none."""
        k, found = self.k, self.k.var(self.n)
        with k.when((self.next.get() >= self.stop.get()) & (self.done.get() < self.count)):
            self._claim()
        with k.when(self.next.get() < self.stop.get()):
            found.set(self.next.get())
            self.next.set(found.get() + 1)
        return found.get()

    def _claim(self) -> None:
        k = self.k
        with k.repeat_while() as go_on:
            part = (k.thread + self.done.get()) % self.count
            first, counter = part * self.n // self.count, self.counters.at(part)
            size = (part + 1) * self.n // self.count - first
            count = k.maximum((size - k.load_atomic(counter)) // CLAIM, 1)
            claimed = k.fetch_add(counter, count)
            self.next.set(first + claimed)
            self.stop.set(first + k.minimum(claimed + count, size))
            is_empty = claimed >= size
            self.done.set(k.select(is_empty, self.done.get() + 1, self.done.get()))
            go_on(is_empty & (self.done.get() < self.count))


def tile_rows(k: Kernel, pitch: int) -> int:
    """Rows of `pitch` bytes that a thread takes at a time: whole groups."""
    n = k.target.lanes
    return n * max(1, min(MAX_GROUPS, TILE_BYTES // (n * pitch)))


def group_size(k: Kernel, first: Value, n_rows: int) -> Value | int:
    """How many of a group's rows there are, from row `first` on."""
    n = k.target.lanes
    return k.minimum(n_rows - first, n) if n_rows % n else n
