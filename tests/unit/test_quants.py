"""Formats in numpy against gguf's own code, and against blocks written out by hand."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as GGMLType

from codegen.formats import (
    BF16,
    CACHE_FORMATS,
    F16,
    F32,
    IQ4_NL,
    IQ4_NL_VALUES,
    Q4_0,
    Q4_K,
    Q5_0,
    Q5_K,
    Q6_0,
    Q6_K,
    Q8_0,
    Q8_KV,
    WEIGHT_FORMATS,
    BlockFormat,
)
from mlacli.gguf.quants import dequantise, quantise, tensor_values
from mlacli.gguf.reader import open_gguf
from tests.conftest import TinyModel

ALL = {f.name: f for f in (*WEIGHT_FORMATS.values(), *CACHE_FORMATS.values())}
SUPER = [f for f in ALL.values() if f.groups]
WRITTEN = [f for f in ALL.values() if not f.groups]
KNOWN_TO_GGUF = [F32, F16, BF16, Q8_0, Q4_0, Q5_0, IQ4_NL]
# Largest error of a value as a fraction of the largest in its block (or row, or of itself).
STEP = {
    "F32": 0.0,
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q8_0": 0.5 / 127,
    "Q8_KV": 0.5 / 127,
    "Q6_0": 1 / 32,
    "Q5_0": 1 / 16,
    "Q4_0": 1 / 8,
    "IQ4_NL": 0.12,
}


def values(rows: int = 5, n: int = 96, seed: int = 0) -> npt.NDArray[np.float32]:
    """Normal values over a wide range of block sizes, with zero blocks among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, n)) * np.exp(rng.uniform(-4, 4, (rows, 1)))
    x[1, :32] = 0.0
    return x.astype(np.float32)


def ids(fmt: BlockFormat) -> str:
    return fmt.name


@pytest.mark.parametrize("fmt", [*KNOWN_TO_GGUF, *SUPER], ids=ids)
def test_decodes_any_bytes_as_gguf_does(fmt: BlockFormat) -> None:
    rng, n = np.random.default_rng(1), 768 if fmt.groups else 96
    data = rng.integers(0, 256, (99, fmt.row_bytes(n)), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.quants.dequantize(data, GGMLType(fmt.ggml_type))
    decoded = dequantise(data, fmt, n)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, expected.astype(np.float32).reshape(99, n))


@pytest.mark.parametrize("fmt", [F16, BF16, Q8_0, Q4_0, Q5_0], ids=ids)
def test_encodes_as_gguf_does(fmt: BlockFormat) -> None:
    x = values(9, 256)
    expected = np.ascontiguousarray(gguf.quants.quantize(x, GGMLType(fmt.ggml_type)))
    np.testing.assert_array_equal(quantise(x, fmt), expected.view(np.uint8).reshape(9, -1))


@pytest.mark.parametrize("fmt", WRITTEN, ids=ids)
def test_round_trip_is_within_a_step(fmt: BlockFormat) -> None:
    x = values(11, 160)
    data = quantise(x, fmt)
    assert data.shape == (11, fmt.row_bytes(160))
    error = np.abs(dequantise(data, fmt, 160) - x)
    group = 160 if fmt.header else fmt.size
    largest = np.abs(x).reshape(11, -1, group).max(axis=-1, keepdims=True)
    assert (
        error.reshape(11, -1, group) <= largest * (STEP[fmt.name] + 2**-10 * (fmt.size > 1))
    ).all()
    assert fmt is F32 or error.max() > 0


@pytest.mark.parametrize("fmt", WRITTEN, ids=ids)
def test_encoding_what_was_decoded_changes_nothing(fmt: BlockFormat) -> None:
    once = dequantise(quantise(values(4, 64, seed=3), fmt), fmt, 64)
    twice = dequantise(quantise(once, fmt), fmt, 64)
    np.testing.assert_allclose(twice, once, rtol=2e-3, atol=0)


@pytest.mark.parametrize("fmt", WRITTEN, ids=ids)
def test_zeros_and_tiny_values(fmt: BlockFormat) -> None:
    zeros = np.zeros((2, 32), np.float32)
    np.testing.assert_array_equal(dequantise(quantise(zeros, fmt), fmt, 32), zeros)
    tiny = np.full((2, 32), 1e-44, np.float32)
    assert np.abs(dequantise(quantise(tiny, fmt), fmt, 32)).max() <= 1e-43


def test_q8_0_rounds_by_the_scale_before_f16() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, 0], x[0, 1] = 1000.0, -996.07
    block = quantise(x, Q8_0)[0]
    scale = block[:2].view(np.float16)[0]
    assert scale == np.float16(1000 / 127)
    assert block[2:4].view(np.int8).tolist() == [127, -127]  # -126.5009; by the f16 scale -126


def test_q8_0_halves_round_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = [127, 2.5, 3.5, -2.5, -3.5]
    assert quantise(x, Q8_0)[0, 2:7].view(np.int8).tolist() == [127, 2, 4, -2, -4]


def test_q6_0_layout_by_hand() -> None:
    """The formula of the format's description, value by value, on a block of random bytes."""
    block = np.random.default_rng(5).integers(0, 256, 26, np.uint8)
    block[:2] = np.array([0.5], np.float16).view(np.uint8)
    qh, qs = block[2:10].astype(int), block[10:].astype(int)
    expected = np.zeros(32)
    for j in range(16):
        h = qh[j % 8] >> (4 if j >= 8 else 0)
        expected[j] = 0.5 * ((qs[j] & 15 | (h & 3) << 4) - 32)
        expected[j + 16] = 0.5 * ((qs[j] >> 4 | (h >> 2 & 3) << 4) - 32)
    np.testing.assert_array_equal(dequantise(block[None], Q6_0, 32)[0], expected)


def test_q6_0_codes() -> None:
    """-32 at the largest value, every other code reachable, in order."""
    x = (np.arange(32, dtype=np.float32) * 2 - 32)[None]
    data = quantise(x, Q6_0)
    assert data[0, :2].view(np.float16)[0] == 1.0
    np.testing.assert_array_equal(dequantise(data, Q6_0, 32), x)


def test_q8_kv_layout_by_hand() -> None:
    """f32 scale, i32 sum of the codes, then the codes of the whole row."""
    x = np.zeros((2, 64), np.float32)
    x[0, :4] = [12.7, -6.35, 0.1, 0.26]
    data = quantise(x, Q8_KV)
    assert data.shape == (2, 72)
    assert data[0, :4].view(np.float32)[0] == np.float32(12.7) / np.float32(127)
    codes = data[0, 8:].view(np.int8)
    assert codes[0] == 127 and codes[2:4].tolist() == [1, 3] and not codes[4:].any()
    assert data[0, 4:8].view(np.int32)[0] == codes.astype(int).sum()
    assert not data[1].any()
    np.testing.assert_allclose(dequantise(data, Q8_KV, 64)[0, :4], x[0, :4], atol=0.05)


def test_q8_kv_sum_of_a_long_row_needs_more_than_16_bits() -> None:
    data = quantise(np.ones((1, 4096), np.float32), Q8_KV)
    assert data[0, 4:8].view(np.int32)[0] == 127 * 4096


def test_iq4_nl_takes_the_nearest_code() -> None:
    x = values(6, 64, seed=7)
    blocks = quantise(x, IQ4_NL).reshape(-1, 18)
    for block, group in zip(blocks, x.reshape(-1, 32), strict=True):
        largest = group[np.abs(group).argmax()]
        if largest == 0:
            continue
        scale = largest / np.float32(IQ4_NL_VALUES[0])
        codes = np.concatenate([block[2:] & 15, block[2:] >> 4])
        distance = np.abs(group[:, None] / scale - np.array(IQ4_NL_VALUES))
        chosen = np.take_along_axis(distance, codes[:, None].astype(int), axis=1)[:, 0]
        np.testing.assert_allclose(chosen, distance.min(axis=1), atol=1e-4)


def test_bf16_keeps_nan_and_rounds_to_even() -> None:
    x = np.array([[np.nan, np.inf, 1.00390625, 1.01171875]], np.float32)  # ties: 1+1/256, 1+3/256
    decoded = dequantise(quantise(x, BF16), BF16, 4)[0]
    assert np.isnan(decoded[0]) and np.isinf(decoded[1])
    assert decoded[2:].tolist() == [1.0, 1.015625]


def test_q6_k_layout_by_hand() -> None:
    """Value by value after the comments of ggml's block_q6_K."""
    block = np.random.default_rng(6).integers(0, 256, 210, np.uint8)
    block[208:] = np.array([0.5], np.float16).view(np.uint8)
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales = block[192:208].view(np.int8).astype(int)
    expected = np.zeros(256)
    for j in range(256):
        half, quarter, i = j // 128, j % 128 // 32, j % 32
        nibble = low[64 * half + 32 * (quarter % 2) + i] >> 4 * (quarter // 2) & 15
        code = (nibble | (high[32 * half + i] >> 2 * quarter & 3) << 4) - 32
        expected[j] = 0.5 * scales[j // 16] * code
    np.testing.assert_array_equal(dequantise(block[None], Q6_K, 256)[0], expected)


@pytest.mark.parametrize("fmt", [Q4_K, Q5_K], ids=ids)
def test_six_bit_scales_by_hand(fmt: BlockFormat) -> None:
    """One group after another has the only scale, the only minimum, and codes of 1."""
    for group in range(8):
        block = np.zeros(fmt.block_bytes, np.uint8)
        block[:4] = np.array([1.0, 0.25], np.float16).view(np.uint8)
        scales = block[4:16]
        if group < 4:
            scales[group], scales[group + 4] = 45, 38
        else:
            scales[group - 4], scales[group], scales[group + 4] = 2 << 6, 2 << 6, 13 | 6 << 4
        block[fmt.field_offset("qs") :] = 0x11
        expected = np.zeros((8, 32))
        expected[group] = 45 - 38 * 0.25
        np.testing.assert_array_equal(dequantise(block[None], fmt, 256)[0], expected.reshape(-1))


def test_super_blocks_are_only_read() -> None:
    with pytest.raises(ValueError, match="Q6_K: only read"):
        quantise(np.zeros((1, 256), np.float32), Q6_K)
    with pytest.raises(ValueError, match="multiple of 256"):
        dequantise(np.zeros((1, 210), np.uint8), Q6_K, 288)


@pytest.mark.parametrize("fmt", [Q8_0, Q8_KV, Q6_0], ids=ids)
def test_wrong_row_sizes_are_refused(fmt: BlockFormat) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantise(np.zeros((1, 33), np.float32), fmt)
    with pytest.raises(ValueError, match="bytes of shape"):
        dequantise(np.zeros((1, 35), np.uint8), fmt, 32)


def test_rows_may_be_a_strided_view() -> None:
    x = values(6, 64)
    data = np.zeros((6, 100), np.uint8)
    data[:, 20:88] = quantise(x, Q8_0)
    np.testing.assert_array_equal(
        dequantise(data[:, 20:88], Q8_0, 64), dequantise(quantise(x, Q8_0), Q8_0, 64)
    )


def test_flavours_of_one_model_hold_the_same_kv_b(tiny_model: TinyModel) -> None:
    joint = open_gguf(tiny_model("tiny-odd", "F32", "joint"))
    split = open_gguf(tiny_model("tiny-odd", "F32", "split"))
    kv_b = tensor_values(joint, "blk.0.attn_kv_b.weight").reshape(5, 96 + 160, 160)
    k_b = tensor_values(split, "blk.0.attn_k_b.weight")  # (heads, kv_lora, nope)
    np.testing.assert_array_equal(kv_b[:, :96].transpose(0, 2, 1), k_b)
    np.testing.assert_array_equal(kv_b[:, 96:], tensor_values(split, "blk.0.attn_v_b.weight"))
