"""Data for the attention tests: caches of several sequences, stored rows, float64 attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.formats import BF16, F16, F32, Q8_KV, BlockFormat
from mlacli.gguf.quants import dequantise, quantise

Array = NDArray[Any]
SCALE = 0.17
# Rounding in f32 against f64; other caches are compared with what they decode to.
LIMIT = 1e-12
# Codes of n bits below a largest one that is r times the root mean square: (r / 2^n)^2 / 12, for q,
# keys, values and weights each, and as much again for scores of some size. A tenth of the error of
# storing in the format or less: f16 4e-8, bf16 3e-6, 8 bits 3e-5.
CODE_LIMITS = {F32: LIMIT, F16: 5e-9, BF16: 3e-7, Q8_KV: 1e-8}
BLOCK_LIMIT = 5e-7
TOKENS, CELLS = (1, 2, 7, 33), (1, 31, 33, 257, 700)


def limit(fmt: BlockFormat) -> float:
    """How far attention over such a cache may be from float64."""
    return CODE_LIMITS.get(fmt, BLOCK_LIMIT)


@dataclass(frozen=True)
class Cache:
    """Cells with two interleaved sequences and holes, and a batch of tokens that looks at them."""

    cell_pos: Array  # (n_kv,)
    cell_seq: Array
    pos: Array  # (n_tokens,)
    seq: Array
    visible: Array  # (n_tokens, n_kv)

    @property
    def used(self) -> Array:
        """Cells that some token sees."""
        return np.asarray(self.visible.any(axis=0))


def make_cache(n_tokens: int, n_kv: int, seed: int = 0) -> Cache:
    rng = np.random.default_rng(seed)
    cell_seq = rng.choice([0, 1, 3, -1], n_kv, p=[0.5, 0.3, 0.05, 0.15]).astype(np.int32)
    cell_pos = np.full(n_kv, -1, np.int32)
    for s in (0, 1, 3):
        cell_pos[cell_seq == s] = rng.permutation(np.count_nonzero(cell_seq == s))
    seq = rng.integers(0, 2, n_tokens, dtype=np.int32)
    pos = rng.integers(max(0, n_kv // 3 - n_tokens), n_kv // 3 + 1, n_tokens, dtype=np.int32)
    if n_tokens > 2:
        seq[-1] = 7  # a token that sees nothing
    visible = (cell_seq == seq[:, None]) & (cell_pos <= pos[:, None])
    return Cache(cell_pos, cell_seq, pos, seq, visible)


def stored(values: Array, fmt: BlockFormat, used: Array) -> tuple[Array, Array]:
    """(bytes, what they decode to) of rows [cells][...][width]; cells not used hold only NaN."""
    width = values.shape[-1]
    rows = quantise(values.reshape(-1, width).astype(np.float32), fmt)
    decoded = dequantise(rows, fmt, width).reshape(values.shape).astype(np.float64)
    rows = rows.reshape(*values.shape[:-1], -1)
    rows[~used] = 0xFF
    return np.ascontiguousarray(rows), decoded


def softmax_values(scores: Array, visible: Array, values: Array) -> Array:
    """(heads, tokens, cells) scores to (tokens, heads, d_v); `values` is (cells, heads, d_v)."""
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-1e300)
    weights = np.where(visible, np.exp(scores - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.asarray(np.einsum("htj,jhd->thd", weights, values))


def attention(q: Array, keys: Array, values: Array, visible: Array) -> Array:
    """float64 attention; keys (cells, heads, d_k), values (cells, heads, d_v)."""
    return softmax_values(SCALE * np.einsum("thd,jhd->htj", q, keys), visible, values)


@dataclass(frozen=True)
class Case:
    args: dict[str, Any]
    expected: Array
