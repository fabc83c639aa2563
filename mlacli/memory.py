"""Memory by the page: anonymous blocks, huge pages, and keeping pages from being taken away.

What was asked for and what the system gave are two things; functions here return the latter.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlacli.errors import SpaceError

Block = npt.NDArray[np.uint8]
MIB = 2**20
_WINDOWS, _WINDOW = 1024, 256  # places, and pages looked at in each
_COPIED = 64 * MIB  # at once


def allocate(n: int, what: str, *, huge: bool = False) -> Block:
    """n zero bytes on a page boundary, not touched yet. Raises SpaceError.

    `huge` asks for transparent huge pages (madvise); `huge_bytes` tells how many there are.
    """
    try:
        block = mmap.mmap(-1, max(n, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError, MemoryError) as problem:
        raise SpaceError(f"{what} needs {n / MIB:.2f} MiB, more than there is") from problem
    if huge:
        ask_for_huge_pages(block)
    return np.frombuffer(block, np.uint8)[:n]


def lock(blocks: Sequence[Block]) -> str:
    """Keep blocks in memory (mlock). Returns "" or the reason why it could not be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    for block in blocks:
        address, size = ctypes.c_void_p(block.ctypes.data), ctypes.c_size_t(block.size)
        if libc.mlock(address, size):
            soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
            reason = os.strerror(ctypes.get_errno())
            return f"{reason} (RLIMIT_MEMLOCK: {limit}; raise it with ulimit -l)"
    return ""


def ask_for_huge_pages(block: mmap.mmap) -> None:
    """Before its pages are touched. Files get them too where the file system keeps large folios
    (ext4 since Linux 6.16, XFS, btrfs) and the page cache does not hold small ones already."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: huge_bytes will say 0
            block.madvise(mmap.MADV_HUGEPAGE)


def resident_share(block: Block) -> float | None:
    """How much of a mapped file is in memory, 0 to 1, from up to _WINDOWS places in it.

    None where the system does not tell. To whom a file does not belong, Linux says 1.
    """
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    n_pages = -(-block.size // page)
    places = np.unique(np.linspace(0, n_pages - 1, _WINDOWS).astype(int) // _WINDOW) * _WINDOW
    found = seen = 0
    for first in places.tolist():
        n = min(_WINDOW, n_pages - first)
        pages = (ctypes.c_ubyte * n)()
        address = ctypes.c_void_p(block.ctypes.data + first * page)
        if not n or libc.mincore(address, ctypes.c_size_t(n * page), pages):
            return None
        found, seen = found + sum(state & 1 for state in pages), seen + n
    return found / seen if seen else None


def huge_bytes() -> int:
    """Bytes of this process's memory and mapped files that lie in huge pages now (0 if unknown)."""
    found = _memory_map()
    return found.get("AnonHugePages", 0) + found.get("FilePmdMapped", 0)


def mostly_huge() -> bool:
    """Whether more than half of what is in memory lies in huge pages."""
    return 2 * huge_bytes() > _memory_map().get("Rss", 0)


def _memory_map() -> dict[str, int]:
    """Sums over this process's mappings, in bytes; empty where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        return {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
        }
    return {}


def copy_of(
    source: Block, what: str, *, huge: bool, done: Callable[[int], None] | None = None
) -> Block:
    """An anonymous copy, for --no-mmap; `done` is told now and then how many bytes there are.

    Raises SpaceError.
    """
    copy = allocate(source.size, what, huge=huge)
    for start in range(0, source.size, _COPIED):
        stop = min(start + _COPIED, source.size)
        copy[start:stop] = source[start:stop]
        if done:
            done(stop)
    return copy


def peak_memory() -> tuple[int, int | None]:
    """(greatest resident set so far, anonymous memory now or None where it is not told), in bytes.

    Linux carries getrusage's peak over from the process that started this one; VmHWM is its own.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/self/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)
        peak, anonymous = (1024 * int(found[name].split()[0]) for name in ("VmHWM", "RssAnon"))
        return peak, anonymous
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
