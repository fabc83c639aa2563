"""Keys and values expanded from cached rows, and the whole expanded attention, against numpy.

For quantised weights the latent rows are quantised per 32 values first, as the kernels do; what is
left is f32 rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen.formats import F16, F32, IQ4_NL, Q8_0, Q8_KV, BlockFormat
from codegen.kernels.activations import row_bytes
from codegen.kernels.attention_expanded import Expanded
from codegen.kernels.expand import HEAD_CHUNK, Part, expand_head, latent_pitch
from codegen.kernels.expand_codes import STAGE_ROWS
from codegen.kernels.flash_expanded import flash_expanded, layout, rows_per_chunk
from codegen.kernels.panel import panel_bytes
from codegen.targets.base import Target
from mlacli.gguf.quants import dequantise, quantise
from tests.kernels import numpy_ops
from tests.kernels.attention_cases import (
    BLOCK_LIMIT,
    SCALE,
    Array,
    attention,
    limit,
    make_cache,
    stored,
)
from tests.kernels.harness import (
    assert_threads_agree,
    each_target,
    host_targets,
    nmse,
    run_guarded,
    run_kernel,
)

N_HEAD, NOPE, ROPE, VALUE, LORA = 3, 64, 32, 32, 96
LIMIT = 1e-11
WEIGHTS = [F32, F16, Q8_0, IQ4_NL]
each_weight = pytest.mark.parametrize("fmt", WEIGHTS, ids=lambda f: f.name)


def matrices(rng: np.random.Generator, fmt: BlockFormat, n_rows: int) -> tuple[Array, Array]:
    """(bytes, values) of N_HEAD matrices (n_rows, LORA), that make keys and values of about 1."""
    values = rng.standard_normal((N_HEAD * n_rows, LORA)) / np.sqrt(LORA)
    data = quantise(values.astype(np.float32), fmt)
    return data, dequantise(data, fmt, LORA).reshape(N_HEAD, n_rows, LORA).astype(np.float64)


def as_read(rows: Array, fmt: BlockFormat, target: Target) -> Array:
    """Latent rows as the matrices see them."""
    if not fmt.integer_dot:
        return rows
    codes, d, _ = numpy_ops.quantize(rows.astype(np.float32), target.weight_bias)
    return (codes.reshape(len(rows), -1, 32) * d[..., None].astype(np.float64)).reshape(rows.shape)


def aligned(n: int) -> int:
    return -(-n // 64) * 64


@each_target
@each_weight
@pytest.mark.parametrize(("n_kv", "with_rope"), [(1, True), (33, False), (HEAD_CHUNK + 7, True)])
def test_expand_head(target: Target, fmt: BlockFormat, n_kv: int, with_rope: bool) -> None:
    rng = np.random.default_rng(n_kv)
    data, values = matrices(rng, fmt, NOPE)
    used = np.ones(n_kv, bool)
    cache, decoded = stored(rng.standard_normal((n_kv, LORA + ROPE)), Q8_KV, used)
    panel = aligned(panel_bytes(target, fmt, LORA))
    part = Part(1, NOPE, LORA, 0, fmt)
    spec = expand_head(part=part, n_rope=ROPE, with_rope=with_rope, fmt=Q8_KV, panel_bytes=panel)
    width = NOPE + ROPE * with_rope
    args: dict[str, Any] = {
        "out": np.zeros((n_kv, width), np.float32),
        "cache": cache,
        "w": data[:NOPE],
        "rows": np.zeros(HEAD_CHUNK * latent_pitch(fmt, LORA), np.uint8),
        "panels": np.zeros(2 * panel, np.uint8),
        "n_kv": n_kv,
    }
    updates = ("rows", "panels")
    found = run_guarded(spec, target, args, outputs=("out",), updates=updates)["out"]
    expected = as_read(decoded[:, :LORA], fmt, target) @ values[0].T
    if with_rope:
        expected = np.concatenate([expected, decoded[:, LORA:]], axis=1)
    assert nmse(found, expected) <= LIMIT


def expanded_case(
    target: Target,
    fmt: BlockFormat,
    n_tokens: int,
    n_kv: int,
    chunk: int,
    n_threads: int,
    cached: BlockFormat = Q8_KV,
) -> tuple[Any, dict[str, Any], Array]:
    """(spec, args, expected) of a whole expanded attention: weights in `fmt`, cache in `cached`."""
    rng = np.random.default_rng(n_kv)
    cache = make_cache(n_tokens, n_kv, seed=n_kv)
    rows, decoded = stored(rng.standard_normal((n_kv, LORA + ROPE)), cached, cache.used)
    q = rng.standard_normal((n_tokens, N_HEAD, NOPE + ROPE)).astype(np.float32)
    uk_data, uk = matrices(rng, fmt, NOPE)
    uv_data, uv = matrices(rng, fmt, VALUE)
    latent = as_read(np.nan_to_num(decoded[:, :LORA]), fmt, target)
    keys = np.einsum("hnl,jl->jhn", uk, latent)
    k_pe = np.repeat(np.nan_to_num(decoded[:, None, LORA:]), N_HEAD, axis=1)
    values = np.einsum("hvl,jl->jhv", uv, latent)
    expected = attention(q, np.concatenate([keys, k_pe], axis=2), values, cache.visible)
    expanded = Expanded(N_HEAD, NOPE, ROPE, VALUE, LORA, n_tokens)
    parts = (
        Part(N_HEAD, NOPE, LORA, NOPE * fmt.row_bytes(LORA), fmt),
        Part(N_HEAD, VALUE, LORA, VALUE * fmt.row_bytes(LORA), fmt),
    )
    at = layout(target, expanded, parts, chunk, n_threads, cached)
    spec = flash_expanded(
        expanded=expanded,
        parts=parts,
        fmt=cached,
        scale=SCALE,
        chunk_rows=chunk,
        panel_bytes=at.panel_bytes,
    )
    ends = dict(
        zip(
            ("attend", "state", "rows", "kv", "panels"),
            np.diff([at.attend, at.state, at.rows, at.kv, at.panels, at.size]),
            strict=True,
        )
    )
    args: dict[str, Any] = {
        "q": q,
        "cache": rows,
        "w_uk": uk_data,
        "v_b": uv_data,
        "pos": cache.pos,
        "seq": cache.seq,
        "cell_pos": cache.cell_pos,
        "cell_seq": cache.cell_seq,
        "out": np.zeros(expected.shape, np.float32),
        "attend": np.full(ends["attend"] // 4, np.nan, np.float32),
        "state": np.full(ends["state"] // 4, np.nan, np.float32),
        "rows": np.zeros(ends["rows"], np.uint8),
        "kv": np.full(ends["kv"] // 4, np.nan, np.float32),
        "panels": np.zeros(ends["panels"], np.uint8),
        "n_tokens": n_tokens,
        "n_kv": n_kv,
    }
    return spec, args, expected


SCRATCH = ("attend", "state", "rows", "kv", "panels")


@each_target
def test_expanded_attention_of_one_token_over_one_row(target: Target) -> None:
    check_expanded(target, IQ4_NL, 1, 1)


@each_target
@each_weight
@pytest.mark.parametrize(("n_tokens", "n_kv"), [(7, 257), (33, 150)])
def test_expanded_attention_over_several_chunks(
    target: Target, fmt: BlockFormat, n_tokens: int, n_kv: int
) -> None:
    check_expanded(target, fmt, n_tokens, n_kv)


def check_expanded(target: Target, fmt: BlockFormat, n_tokens: int, n_kv: int) -> None:
    for cached in (F32, F16, Q8_KV):
        spec, args, expected = expanded_case(target, fmt, n_tokens, n_kv, 64, 2, cached)
        found = run_guarded(spec, target, args, outputs=("out",), updates=SCRATCH)["out"]
        exact = cached is F32 or n_tokens == 1
        rough = BLOCK_LIMIT if fmt.integer_dot or cached is Q8_KV else limit(cached)
        assert nmse(found, expected) <= (LIMIT if exact else rough), cached.name


def test_a_chunk_of_many_rows_is_made_in_stages() -> None:
    target = host_targets()[0]
    spec, args, expected = expanded_case(target, Q8_0, 7, STAGE_ROWS + 37, 1024, 2)
    run_kernel(spec, target, args, 2)
    assert nmse(args["out"], expected) <= BLOCK_LIMIT


def test_expanded_attention_does_not_depend_on_threads() -> None:
    target = host_targets()[0]
    spec, _, _ = expanded_case(target, Q8_0, 33, 257, 64, 5)

    def make() -> dict[str, Any]:
        return expanded_case(target, Q8_0, 33, 257, 64, 5)[1]

    assert_threads_agree(spec, target, make, ("out",))


def test_chunks_fit_their_budget() -> None:
    assert rows_per_chunk(32 << 20, 16, 128, 128, 65536) == 2048  # V2-Lite: 16 KiB a row
    assert rows_per_chunk(32 << 20, 128, 128, 128, 65536) == 256  # V3
    assert rows_per_chunk(32 << 20, 16, 128, 128, 256) == 256  # no larger than the context
    assert rows_per_chunk(1 << 10, 128, 128, 128, 65536) == 64
    assert latent_pitch(Q8_0, LORA) == row_bytes(LORA)
