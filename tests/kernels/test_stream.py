"""Tiles handed out in shares: each one once, whatever the threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from codegen.dtypes import i64
from codegen.kernel import kernel, ptr, value
from codegen.kernels.stream import SHARES, tiles_ahead
from codegen.targets.base import Target
from codegen.values import Pointer, Value
from tests.kernels.harness import each_target, run_kernel

if TYPE_CHECKING:
    from codegen.builder import Kernel


@kernel(seen=ptr(i64), following=ptr(i64), owner=ptr(i64), n=value(i64))
def mark(k: Kernel, seen: Pointer, following: Pointer, owner: Pointer, n: Value) -> None:
    """seen[tile] += 1, following[tile] = the one after it, owner[tile] = the thread."""
    with tiles_ahead(k, n) as (tile, after):
        k.fetch_add(seen.at(tile), 1)
        following.at(tile).store(after)
        owner.at(tile).store(k.thread)


@each_target
@pytest.mark.parametrize("n_threads", [1, 2, 3, 5, SHARES + 3])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 64, 1000])
def test_every_tile_once(target: Target, n_threads: int, n: int) -> None:
    args: dict[str, Any] = {
        name: np.full(max(n, 1), start, np.int64)
        for name, start in (("seen", 0), ("following", -1), ("owner", -1))
    } | {"n": n}
    run_kernel(mark(), target, args, n_threads=n_threads)
    np.testing.assert_array_equal(args["seen"][:n], 1)
    tiles, after = np.arange(n), args["following"][:n]
    last = after == tiles
    owners = args["owner"][:n]
    np.testing.assert_array_equal(owners[after], owners)  # a thread asks for what it comes to
    # Per thread, everything but its first tile is announced once, and its last announces itself.
    assert last.sum() == len(set(owners))
    assert len(set(after[~last])) == n - last.sum()
