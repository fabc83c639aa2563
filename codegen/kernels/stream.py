"""Streaming weight rows: which rows come next, and asking for their memory in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.dtypes import i64
from codegen.kernels.blocks import BLOCK
from codegen.targets.base import Target
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

# Memory is asked for twice before it is used. The far request brings it to the second-level cache
# and, walking on in order, makes that level's own prefetcher run ahead; the near one brings it to
# the first level, so that no load waits and the loop runs on to the next far request.
FAR_BYTES, NEAR_BYTES = 16384, 4096
L1, L2 = 3, 2
TILE_BYTES, MAX_TILE_ROWS = 36864, 256  # what a thread takes at a time: long enough a walk
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
def tiles_ahead(k: Kernel, n: Any, *, one_by_one: bool = False) -> Iterator[tuple[Value, Value]]:
    """Tiles of range(n), each with the one this thread has after it, so that what comes next can be
    asked for; behind the last tile that is the last one again.

    Each thread has a part of the range to itself and helps with the others' when it is done. So it
    walks on in memory, as prefetchers expect: whatever they bring too early is used. Tiles that
    take long, or some of them longer than others, are claimed `one_by_one`.
    """
    shares = _Shares(k, k.const(n, i64), fraction=None if one_by_one else CLAIM)
    left = k.var(k.const(0, i64))
    stop = k.var(k.const(0, i64))

    def take() -> Value:
        with k.when(left.get() >= stop.get()):
            first, behind = shares.claim()
            left.set(first)
            stop.set(behind)
        taken = left.get()
        left.set(taken + 1)
        return taken

    with _each_ahead(k, shares, take) as (tile, following):
        yield tile, following


@contextmanager
def parts_ahead(k: Kernel, n: Any, *, most: int) -> Iterator[tuple[Value, Value, Value]]:
    """(first, stop, first of this thread's next part) of parts of range(n), large ones first: half
    of what is left, at most `most`. For work that is cheaper by the part."""
    shares = _Shares(k, k.const(n, i64), fraction=2, most=most)
    stop = k.var(k.const(0, i64))
    next_stop = k.var(k.const(0, i64))

    def take() -> Value:
        stop.set(next_stop.get())
        first, behind = shares.claim()
        next_stop.set(behind)
        return first

    with _each_ahead(k, shares, take) as (first, following):
        yield first, stop.get(), following


@contextmanager
def _each_ahead(
    k: Kernel, shares: _Shares, take: Callable[[], Value]
) -> Iterator[tuple[Value, Value]]:
    """(what was taken, what is taken next or, if that is nothing, the same) until nothing is."""
    current = k.var(take())
    with k.when((current.get() < shares.n) & k.cancelled().eq(0)):
        with k.repeat_while() as go_on:
            following = take()
            yield current.get(), k.select(following < shares.n, following, current.get())
            current.set(following)
            go_on((following < shares.n) & k.cancelled().eq(0))


class _Shares:
    """range(n) in a part per thread; above SHARES threads, some have one together.

    Numbers are claimed one at a time, or `fraction` of what is left of a part: an atomic addition
    waits for all loads before it, which costs as much as a few hundred bytes of a stream.
    """

    def __init__(
        self, k: Kernel, n: Value, *, fraction: int | None, most: int | None = None
    ) -> None:
        self.k, self.n, self.fraction, self.most = k, n, fraction, most
        self.count = k.minimum(k.n_threads, SHARES)
        self.counters = k.counter(SHARES)
        self.done = k.var(k.const(0, i64))

    def claim(self) -> tuple[Value, Value]:
        """(first, stop) of the next numbers, of this thread's part if there are any left; first is
        n when there are none."""
        k, first, stop = self.k, self.k.var(self.n), self.k.var(self.n)
        with k.when(self.done.get() < self.count), k.repeat_while() as go_on:
            part = (k.thread + self.done.get()) % self.count
            start, counter = part * self.n // self.count, self.counters.at(part)
            size = (part + 1) * self.n // self.count - start
            count = self._size_of_claim(size, counter)
            claimed = k.fetch_add(counter, count)
            is_empty = claimed >= size
            first.set(k.select(is_empty, self.n, start + claimed))
            stop.set(start + k.minimum(claimed + count, size))
            self.done.set(k.select(is_empty, self.done.get() + 1, self.done.get()))
            go_on(is_empty & (self.done.get() < self.count))
        return first.get(), stop.get()

    def _size_of_claim(self, size: Value, counter: Pointer) -> Value | int:
        k = self.k
        if self.fraction is None:
            return 1
        count = k.maximum((size - k.load_atomic(counter)) // self.fraction, 1)
        return count if self.most is None else k.minimum(count, self.most)


def tile_rows(target: Target, pitch: int) -> int:
    """Rows of `pitch` bytes that a thread takes at a time: whole groups, and whole blocks of what
    they give."""
    n = max(target.lanes, BLOCK)
    return n * max(1, min(MAX_TILE_ROWS, TILE_BYTES // pitch) // n)


def group_size(k: Kernel, first: Value, n_rows: int) -> Value | int:
    """How many of a group's rows there are, from row `first` on."""
    n = k.target.lanes
    return k.minimum(n_rows - first, n) if n_rows % n else n
