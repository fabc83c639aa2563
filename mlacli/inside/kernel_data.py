"""Made-up memory for kernels that are timed alone: valid numbers, as much of them as it takes that
they come from memory and not from a cache."""

from __future__ import annotations

import mmap
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.call import aligned_bytes
from codegen.formats import BlockFormat
from codegen.kernels.activations import MAGIC, MAGIC_BITS, row_bytes
from codegen.kernels.blocks import BLOCK
from mlacli.gguf.quants import quantise

Array = NDArray[Any]
PATTERN_BYTES = 1 << 20


@cache
def pattern(fmt: BlockFormat) -> Array:
    """About a megabyte of valid blocks: random bytes would hold denormals and NaN."""
    if fmt.interleaved:
        return _interleaved(fmt)
    n = max(fmt.size, BLOCK)
    rows = PATTERN_BYTES // fmt.row_bytes(n)
    values = np.random.default_rng(0).normal(size=(rows // 64, n)).astype(np.float32)
    return np.tile(quantise(values, fmt).reshape(-1), 64)


def _interleaved(fmt: BlockFormat) -> Array:
    """Groups of blocks: one scale for all rows, and codes, which may be any but -128."""
    rows, n_codes = fmt.interleaved, fmt.block_bytes - 2
    rng = np.random.default_rng(0)
    groups = PATTERN_BYTES // (rows * fmt.block_bytes)
    codes = rng.integers(1, 128, (groups, rows * n_codes)).astype(np.uint8)
    scales = np.full((groups, rows), 0.01, np.float16).view(np.uint8)
    return np.concatenate([scales, codes], axis=1).reshape(-1)


def weight_pool(fmt: BlockFormat, nbytes: int) -> Array:
    """In small pages, as a mapped file has them."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    data = np.frombuffer(memory, np.uint8)
    part = pattern(fmt)
    for start in range(0, nbytes, part.nbytes):
        data[start : start + part.nbytes] = part[: nbytes - start]
    return data


def coded_rows(n_rows: int, n: int) -> Array:
    """a8 rows of small numbers."""
    pitch = row_bytes(n)
    rows = aligned_bytes(n_rows * pitch)
    shaped = rows.reshape(n_rows, pitch)
    shaped[:, :n] = np.arange(n) % 100
    d, start, offset = (shaped[:, n + i * n // 8 : n + (i + 1) * n // 8] for i in range(3))
    d.view(np.float32)[:], offset.view(np.float32)[:] = 0.5, -0.5 * MAGIC
    start.view(np.int32)[:] = MAGIC_BITS
    return rows


def floats(*shape: int) -> Array:
    """Zeros, from a cache line on."""
    return aligned_bytes(4 * int(np.prod(shape))).view(np.float32).reshape(shape)


def cache_rows(fmt: BlockFormat, n_rows: int, n: int) -> Array:
    """Rows of a cache, alike by the dozen."""
    values = np.random.default_rng(0).normal(size=(64, n)).astype(np.float32)
    return np.resize(quantise(values, fmt), (n_rows, fmt.row_bytes(n)))


def routing(n_tokens: int, n_expert: int, n_used: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """(ids, offsets, order): tokens go to experts at random, all experts about equally often."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_tokens)]).astype(np.int32)
    order = np.argsort(ids.ravel(), kind="stable").astype(np.int32)
    counts = np.bincount(ids.ravel(), minlength=n_expert)
    return ids, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), order
