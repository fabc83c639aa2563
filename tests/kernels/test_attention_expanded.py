"""Expanded attention, chunk by chunk, against float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen.formats import Q8_KV
from codegen.kernels.attention_expanded import (
    Expanded,
    expanded_state_bytes,
    flash_expanded_chunk,
)
from codegen.targets.base import Target
from tests.kernels.attention_cases import LIMIT, SCALE, Array, attention, make_cache, stored
from tests.kernels.harness import each_target, host_targets, nmse, run_kernel

N_HEAD = 5


def run_chunks(
    target: Target, n_tokens: int, n_kv: int, chunk: int, n_threads: int, widths: dict[str, int]
) -> tuple[Array, Array]:
    """(found, expected) when the cells are attended `chunk` at a time."""
    n_nope, n_rope, n_value, n_lora = widths.values()
    rng = np.random.default_rng(n_kv)
    cache = make_cache(n_tokens, n_kv, seed=n_kv)
    q = rng.standard_normal((n_tokens, N_HEAD, n_nope + n_rope)).astype(np.float32)
    c, decoded = stored(rng.standard_normal((n_kv, n_lora + n_rope)), Q8_KV, cache.used)
    k_nope = rng.standard_normal((n_kv, N_HEAD, n_nope)).astype(np.float32)
    v = rng.standard_normal((n_kv, N_HEAD, n_value)).astype(np.float32)
    k_pe = np.repeat(decoded[:, None, n_lora:], N_HEAD, axis=1)
    keys = np.concatenate([k_nope, k_pe], axis=2)
    expected = attention(q, keys, v.astype(np.float64), cache.visible)
    k_nope[~cache.used], v[~cache.used] = np.nan, np.nan
    exact = Expanded(N_HEAD, n_nope, n_rope, n_value, n_lora, n_tokens).exact
    n_state = expanded_state_bytes(n_tokens, n_head=N_HEAD)
    args: dict[str, Any] = {
        "q": q,
        "cache": c,
        "pos": cache.pos,
        "seq": cache.seq,
        "cell_pos": cache.cell_pos,
        "cell_seq": cache.cell_seq,
        "out": np.full(expected.shape, np.nan, np.float32),
        "state": np.full(n_state // 4, np.nan, np.float32),
        "scratch": np.full(n_threads * exact.thread_words, np.nan, np.float32),
        "n_tokens": n_tokens,
        "n_kv": n_kv,
    }
    sizes = {"n_head": N_HEAD, **widths, "max_tokens": n_tokens}
    spec = flash_expanded_chunk(**sizes, fmt=Q8_KV, scale=SCALE)
    for start in range(0, n_kv, chunk):
        stop = min(start + chunk, n_kv)
        part = {"k_nope": k_nope[start:stop].copy(), "v": v[start:stop].copy()}
        run_kernel(spec, target, {**args, **part, "start": start, "stop": stop}, n_threads)
    return args["out"], expected


ODD_WIDTHS = {"n_nope": 96, "n_rope": 32, "n_value": 160, "n_lora": 160}
FULL_WIDTHS = {"n_nope": 128, "n_rope": 64, "n_value": 128, "n_lora": 512}


@each_target
@pytest.mark.parametrize("widths", [ODD_WIDTHS, FULL_WIDTHS], ids=["odd", "full"])
def test_chunks_carry_on_from_one_another(target: Target, widths: dict[str, int]) -> None:
    for n_tokens, n_kv, chunk in ((1, 33, 10), (7, 257, 100), (33, 257, 257), (7, 1, 5)):
        found, expected = run_chunks(target, n_tokens, n_kv, chunk, 2, widths)
        assert nmse(found, expected) <= LIMIT


def test_chunks_do_not_depend_on_threads() -> None:
    target = host_targets()[0]
    first, _ = run_chunks(target, 33, 257, 100, 1, ODD_WIDTHS)
    for n_threads in (2, 3, 5):
        found, _ = run_chunks(target, 33, 257, 100, n_threads, ODD_WIDTHS)
        assert found.tobytes() == first.tobytes()
