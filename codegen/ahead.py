"""Asking for the first weights of the launch to come, while a thread waits for the others.

Between two launches memory would idle: threads meet at barriers, norms and codes of a few tokens
take microseconds. So a launch that reads weights may name the walk of the next one that does: as
soon as a thread is done with its part, it asks for the beginning of its part there.

A walk is WALK_WORDS words: `n` matrices of `parts` tiles each, matrix i `pitch` bytes times i (or
times ids[i], the chosen experts) behind `base`, a matrix's tiles `part_bytes` apart. Thread t
begins at tile t * n * parts // n_threads (kernels/stream.py). A request is a hint: where more
tokens or threads make a kernel begin elsewhere, a few lines have been read in vain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from codegen.dtypes import i32, i64, u8
from codegen.values import Pointer, Value

if TYPE_CHECKING:
    from codegen.builder import Kernel

WALK_WORDS = 6
BASE, MATRICES, PARTS, PITCH, PART_BYTES, IDS = range(WALK_WORDS)
AHEAD_BYTES = 16384  # of each thread's part
L2 = 2


def emit_ahead(k: Kernel, thread: Value, walk: Pointer) -> None:
    """Ask for the first AHEAD_BYTES of the thread's part of a walk."""
    tile = thread * (walk[MATRICES] * walk[PARTS]) // k.n_threads
    index = k.var(tile // walk[PARTS])
    with k.when(walk[IDS].ne(0)):
        index.set(k.load_pointer(walk.at(IDS), i32)[index.get()].to(i64))
    first = k.load_pointer(walk.at(BASE), u8).bytes(index.get() * walk[PITCH])
    start = first.bytes(tile % walk[PARTS] * walk[PART_BYTES])
    with k.loop(0, AHEAD_BYTES, k.target.cache_line) as at:
        k.prefetch(start.bytes(at), L2)
