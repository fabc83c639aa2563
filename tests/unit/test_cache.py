"""The cache: which row belongs to whom, and how many bytes it takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from codegen.formats import BF16, CACHE_FORMATS, F16, F32, Q8_0, Q8_KV
from mlacli.cache import EMPTY, Cache, CacheLayout
from mlacli.errors import SpaceError
from mlacli.memory import MIB

SMALL = CacheLayout(
    n_layer=3,
    n_ctx=8,
    n_head=4,
    kv_lora_rank=64,
    n_rope=32,
    n_nope=32,
    n_v=64,
    fmt_k=F16,
    fmt_v=F16,
    latent=True,
    transposed=False,
)


def test_a_latent_cache_has_one_row_for_all_heads() -> None:
    assert SMALL.bytes_per_layer() == {"c": 8 * 2 * 96}
    assert SMALL.nbytes() == {"c": 3 * 8 * 2 * 96}
    assert SMALL.bytes_per_token == 3 * 2 * 96


def test_the_transposed_copy_is_f16_beside_all_but_f32_rows() -> None:
    layout = replace(SMALL, fmt_k=Q8_KV, transposed=True)
    assert layout.bytes_per_layer() == {"c": 8 * (8 + 96), "kv_t": 8 * 2 * 64}
    layout = replace(SMALL, fmt_k=BF16, transposed=True)
    assert layout.bytes_per_layer() == {"c": 8 * 2 * 96, "kv_t": 8 * 2 * 64}
    layout = replace(SMALL, fmt_k=F32, transposed=True)
    assert layout.bytes_per_layer() == {"c": 8 * 4 * 96, "kv_t": 8 * 4 * 64}


def test_k_and_v_have_a_row_per_head() -> None:
    layout = replace(SMALL, latent=False, fmt_k=Q8_KV, fmt_v=Q8_0)
    k, v = 4 * (8 + 64), 4 * (64 // 32 * 34)
    assert layout.bytes_per_layer() == {"k": 8 * k, "v": 8 * v}
    assert layout.bytes_per_token == 3 * (k + v)


def test_v_is_transposed_without_flash_attention() -> None:
    layout = replace(SMALL, latent=False, fmt_k=F32, transposed=True)
    assert layout.bytes_per_layer() == {"k": 8 * 4 * 4 * 64, "v_t": 8 * 2 * 4 * 64}
    layout = replace(SMALL, latent=False, fmt_v=F32, transposed=True)
    assert layout.bytes_per_layer() == {"k": 8 * 2 * 4 * 64, "v_t": 8 * 4 * 4 * 64}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("f32", 2304),
        ("f16", 1152),
        ("bf16", 1152),
        ("q8_0", 612),
        ("q8_KV", 584),
        ("q6_0", 468),
    ],
)
def test_bytes_of_a_deepseek_row(name: str, row: int) -> None:
    layout = replace(SMALL, kv_lora_rank=512, n_rope=64, fmt_k=CACHE_FORMATS[name], n_layer=1)
    assert layout.bytes_per_token == row


@pytest.mark.parametrize("layout", [SMALL, replace(SMALL, latent=False, transposed=True)])
def test_every_kind_and_layer_has_memory_of_its_own(layout: CacheLayout) -> None:
    cache = Cache(layout)
    spans = sorted(
        (cache.address(kind, layer), n)
        for kind, n in layout.bytes_per_layer().items()
        for layer in range(layout.n_layer)
    )
    assert all(start % 64 == 0 for start, _ in spans)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))


def test_memory_that_cannot_be_had_is_refused_with_its_size() -> None:
    for rank in (2**44, 2**61):  # more than fits any address space; more than 64 bits
        layout = replace(SMALL, kv_lora_rank=rank)
        with pytest.raises(SpaceError, match=r"^-c 8: the cache needs (\d+)\.\d\d MiB") as caught:
            Cache(layout)
        assert f"{sum(layout.nbytes().values()) / MIB:.2f} MiB" in str(caught.value)


def test_cells_are_taken_lowest_first() -> None:
    cache = Cache(SMALL)
    assert cache.n_used == cache.n_rows == 0
    assert cache.allocate([0, 1, 2], [0, 0, 7]).tolist() == [0, 1, 2]
    assert cache.pos.tolist() == [0, 1, 2] + [EMPTY] * 5
    assert cache.seq.tolist() == [0, 0, 7] + [EMPTY] * 5
    cache.release(np.array([1]))
    assert (cache.n_used, cache.n_rows) == (2, 3)
    assert cache.allocate([3, 4], [0, 0]).tolist() == [1, 3]
    assert cache.pos.tolist() == [0, 3, 2, 4] + [EMPTY] * 4


def test_a_full_cache_takes_nothing() -> None:
    cache = Cache(SMALL)
    cache.allocate(range(6), [0] * 6)
    before = cache.pos.tolist(), cache.seq.tolist()
    with pytest.raises(SpaceError, match=r"6 of 8 cells are in use, 3 more are needed \(-c\)"):
        cache.allocate([6, 7, 8], [0] * 3)
    assert (cache.pos.tolist(), cache.seq.tolist()) == before
    assert cache.allocate([6, 7], [0, 0]).tolist() == [6, 7]
    assert cache.n_used == cache.n_rows == 8


def test_truncate_forgets_the_end_of_one_sequence_only() -> None:
    cache = Cache(SMALL)
    cache.allocate([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1])
    cache.truncate(0, 1)
    assert cache.seq.tolist() == [0, 1, EMPTY, 1, EMPTY, 1, EMPTY, EMPTY]
    assert cache.pos.tolist() == [0, 0, EMPTY, 1, EMPTY, 2, EMPTY, EMPTY]
    assert (cache.n_used, cache.n_rows) == (4, 6)
    cache.truncate(1, 0)
    assert (cache.n_used, cache.n_rows) == (1, 1)


def test_released_cells_leave_no_trace() -> None:
    cache = Cache(SMALL)
    cache.allocate([0, 1], [0, 0])
    before = cache.pos.tolist(), cache.seq.tolist()
    cache.release(cache.allocate([2, 3, 4], [0, 0, 0]))
    assert (cache.pos.tolist(), cache.seq.tolist()) == before


def test_clear_empties_every_cell() -> None:
    cache = Cache(SMALL)
    cache.allocate(range(8), [1] * 8)
    cache.clear()
    assert (cache.n_used, cache.n_rows) == (0, 0)
    assert set(cache.pos.tolist()) == set(cache.seq.tolist()) == {EMPTY}
