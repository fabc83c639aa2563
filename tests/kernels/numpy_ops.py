"""What the small kernels compute, said in numpy: the tests' other half, one function per kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.kernels.router import Routing

Array = NDArray[Any]
MAGIC = np.float32(1.5 * 2**23)


def split_a8(rows: Array, n: int) -> tuple[Array, Array, Array]:
    """(codes i8 [rows, n], d f32 [rows, n / 32], s i32 [rows, n / 32]) of a8 rows (bytes), where
    s = start - the bits of MAGIC."""
    size = 4 * (n // 32)
    codes = np.ascontiguousarray(rows[:, :n]).view(np.int8)
    d, start, offset = (
        np.ascontiguousarray(rows[:, n + i * size : n + (i + 1) * size]) for i in range(3)
    )
    np.testing.assert_array_equal(offset.view(np.float32), d.view(np.float32) * -MAGIC)
    return codes, d.view(np.float32), start.view(np.int32) - MAGIC.view(np.int32)


def join_a8(codes: Array, d: Array, s: Array, pitch: int) -> Array:
    """a8 rows (bytes), padding zero."""
    rows = np.zeros((len(codes), pitch), np.uint8)
    parts = (codes, d, s + MAGIC.view(np.int32), d * -MAGIC)
    packed = np.concatenate([part.view(np.uint8) for part in parts], axis=1)
    rows[:, : packed.shape[1]] = packed
    return rows


def quantize(x: Array, weight_bias: int) -> tuple[Array, Array, Array]:
    """(codes, d, s) of f32 rows: d = max|x| / 127 over 32 values without its last two bits,
    codes = round(x / d)."""
    blocks = x.reshape(len(x), -1, 32)
    d = np.abs(blocks).max(axis=-1) / np.float32(127)
    d = (d.view(np.uint32) & np.uint32(0xFFFFFFFC)).view(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
    codes = np.rint(blocks * inverse[..., None]).astype(np.int8)
    sums = -weight_bias * codes.sum(axis=-1, dtype=np.int32)
    return codes.reshape(x.shape), d, sums


def rms_norm(x: Array, w: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * w over the last axis, in f64."""
    wide = x.astype(np.float64)
    normed: Array = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + eps) * w
    return normed


def rope(x: Array, table: Array) -> Array:
    """x [tokens, ..., n] with its adjacent pairs turned by table [tokens, n] = (cos, sin) pairs."""
    wide = x.astype(np.float64)
    shape = (len(x), *(1,) * (x.ndim - 2), -1)
    cos, sin = table[:, 0::2].reshape(shape), table[:, 1::2].reshape(shape)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape)


def rope_table(n_tokens: int, n_rope: int, seed: int = 0) -> Array:
    """f32 [tokens, n_rope] of random angles, (cos, sin) per pair."""
    angles = np.random.default_rng(seed).uniform(0, 6.28, (n_tokens, n_rope // 2))
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return table.reshape(n_tokens, n_rope).astype(np.float32)


def silu(x: Array) -> Array:
    """x / (1 + e^-x) in f64."""
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        result: Array = wide / (1 + np.exp(-wide))
    return result


def route(logits: Array, bias: Array | None, r: Routing) -> tuple[Array, Array]:
    """(ids, weights) [tokens, n_used]; gates in f32, where equal logits give equal scores."""
    wide = logits.astype(np.float64)
    if r.gating == "sigmoid":
        probs = 1 / (1 + np.exp(-wide))
    else:
        probs = np.exp(wide - wide.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
    scores = probs if bias is None else probs + bias
    if r.n_group > 1:
        grouped = scores.reshape(len(scores), r.n_group, -1)
        n_best = 2 if r.group_score == "top2" else 1
        strength = np.sort(grouped, axis=-1)[..., -n_best:].sum(axis=-1)
        order = np.argsort(-strength, axis=-1, kind="stable")[:, : r.n_group_used]
        kept = np.zeros(strength.shape, np.bool_)
        np.put_along_axis(kept, order, True, axis=-1)
        scores = np.where(kept[..., None], grouped, -np.inf).reshape(scores.shape)
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, : r.n_used]
    weights = np.take_along_axis(probs, ids, axis=-1)
    if r.ser_min:
        chosen = np.take_along_axis(scores, ids, axis=-1)
        dropped = chosen <= chosen[:, :1] * r.ser_threshold
        dropped[:, : r.ser_min] = False
        ids, weights = np.where(dropped, -1, ids), np.where(dropped, 0, weights)
    if r.normalise:
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 6.1e-5)
    return ids.astype(np.int32), weights * r.scale


def group_tokens(ids: Array, n_expert: int) -> tuple[Array, Array, Array]:
    """(offsets, order, place) of the slots sorted by expert; dropped slots (-1) have no place."""
    flat = ids.ravel()
    slots = np.flatnonzero(flat >= 0)
    slots = slots[np.argsort(flat[slots], kind="stable")]
    counts = np.bincount(flat[slots], minlength=n_expert)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    order = np.full(flat.size, -1, np.int32)
    order[: slots.size] = slots
    place = np.full(flat.size, -1, np.int32)
    place[slots] = np.arange(slots.size)
    return offsets, order, place
