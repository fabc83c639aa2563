"""Encode and decode the storage formats in numpy: the oracle that kernels are held against.

Driven by the data in codegen/formats.py. Rounding follows ggml's reference functions: the inverse
of the f32 scale multiplies the values *before* the scale is rounded to f16; 8-bit codes round half
to even, as ggml's vector code and every kernel here do; lower ones are trunc(x / d + offset + 1/2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from codegen.dtypes import DType
from codegen.formats import RUN, BlockFormat, Field, Groups
from mlacli.gguf.parse import format_of
from mlacli.gguf.reader import GGUFFile

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint8]


def tensor_values(file: GGUFFile, name: str) -> Floats:
    """A tensor of a model decoded to f32, in numpy's dimension order (slowest first).

    Raises KeyError for an unknown name, ModelError for a type that has no format here.
    """
    tensor = file.tensors[name]
    rows = file.data(name).reshape(tensor.n_rows, tensor.row_bytes)
    values = dequantise(rows, format_of(file.path, tensor), tensor.shape[0])
    return values.reshape(tensor.shape[::-1])


def dequantise(data: Bytes, fmt: BlockFormat, n: int) -> Floats:
    """Decode rows: (rows, fmt.row_bytes(n)) bytes to (rows, n) floats.

    Raises ValueError when the bytes of a row are not those of `n` values.
    """
    if data.ndim != 2 or data.shape[1] != fmt.row_bytes(n):
        raise ValueError(f"{fmt.name}: rows of {n} values are not bytes of shape {data.shape}")
    header, blocks = split_rows(data, fmt)
    with np.errstate(invalid="ignore", over="ignore"):  # blocks may hold NaN and Inf
        values = _decode(blocks, fmt)  # (rows, blocks, size)
        if fmt.groups:
            values = _scaled_groups(values, blocks, fmt.groups)
        elif fmt.header:
            values = values * header["d"][:, :, None]
        elif fmt.has("d"):
            values = values * blocks["d"].astype(np.float32)[:, :, None]
    return values.reshape(data.shape[0], n)


def quantise(x: Floats, fmt: BlockFormat) -> Bytes:
    """Encode rows: (rows, n) floats to (rows, fmt.row_bytes(n)) bytes; `n` a multiple of the block.

    IQ4_NL takes the nearest code at the scale that makes the largest value exact. Raises ValueError
    for super-blocks: they are only read.
    """
    if fmt.groups:
        raise ValueError(f"{fmt.name}: only read, never written")
    n_rows, n = x.shape
    data = np.zeros((n_rows, fmt.row_bytes(n)), np.uint8)
    header, blocks = split_rows(data, fmt)
    groups = x.astype(np.float32).reshape(n_rows, n // fmt.size, fmt.size)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if not fmt.is_quantised:
            blocks["qs"] = _encode_float(groups, fmt.fields[0].type)
        elif fmt.header:
            signed, d = _eight_bit(x.astype(np.float32))
            blocks["qs"] = signed.reshape(groups.shape)
            header["d"] = d
            header["sum"] = signed.sum(axis=1, keepdims=True, dtype=np.int32)
        elif not _is_nibbles(fmt):
            blocks["qs"], d = _eight_bit(groups)
            blocks["d"] = d[:, :, 0].astype(np.float16)
        else:
            codes, d = _table_codes(groups, fmt) if fmt.table else _offset_codes(groups, fmt)
            blocks["d"] = d[:, :, 0].astype(np.float16)
            blocks["qs"] = codes[..., :16] & 15 | codes[..., 16:] << 4
            if fmt.high_bits:
                blocks["qh"] = _PACK_HIGH[fmt.high_bits](codes >> np.uint8(4))
    return data


def split_rows(data: Bytes, fmt: BlockFormat) -> tuple[Any, Any]:
    """Structured views of the row headers (rows, 1) and blocks (rows, blocks)."""
    if not data.flags.c_contiguous:
        data = np.ascontiguousarray(data)
    n_rows, row_bytes = data.shape
    n_blocks = (row_bytes - fmt.header_bytes) // fmt.block_bytes
    row = np.dtype([("header", _struct(fmt.header)), ("blocks", _struct(fmt.fields), (n_blocks,))])
    rows = data.reshape(-1).view(row).reshape(n_rows, 1)
    return rows["header"], rows["blocks"].reshape(n_rows, n_blocks)


def _struct(fields: tuple[Field, ...]) -> np.dtype[Any]:
    return np.dtype([(f.name, _code(f.type), (f.count,) if f.count > 1 else ()) for f in fields])


def _code(dtype: DType) -> str:
    kind = {"f": "f", "g": "u", "i": "i", "u": "u"}[dtype.kind]  # bf16 as its 16 bits
    return f"<{kind}{dtype.nbytes}"


def _is_nibbles(fmt: BlockFormat) -> bool:
    return bool(fmt.table) or fmt.offset != 0


def _decode(blocks: Any, fmt: BlockFormat) -> Floats:
    """The codes of all blocks as floats, (rows, blocks, size)."""
    qs = blocks["qs"]
    if not fmt.is_quantised:
        qs = qs[:, :, None]
        if fmt.fields[0].type.kind == "g":
            return np.asarray((qs.astype(np.uint32) << 16).view(np.float32))
    if fmt.groups:
        return _run_codes(blocks, fmt, fmt.groups)
    if not _is_nibbles(fmt):
        return np.asarray(qs, np.float32)
    codes = np.concatenate([qs & 15, qs >> 4], axis=-1)
    if fmt.high_bits:
        codes |= _UNPACK_HIGH[fmt.high_bits](blocks["qh"]) << 4
    if fmt.table:
        return np.asarray(np.asarray(fmt.table, np.float32)[codes], np.float32)
    return np.asarray(codes.astype(np.float32) + np.float32(fmt.offset))


def _run_codes(blocks: Any, fmt: BlockFormat, groups: Groups) -> Floats:
    """The codes of super-blocks as floats, run after run."""
    runs = []
    for run in range(fmt.size // RUN):
        start, shift = groups.low_place(run)
        codes = blocks["qs"][..., start : start + RUN] >> shift & 15
        if fmt.high_bits:
            start, shift = groups.high_place(run, fmt.high_bits)
            high = blocks["qh"][..., start : start + RUN] >> shift & (1 << fmt.high_bits) - 1
            codes |= high << 4
        runs.append(codes)
    return np.asarray(np.concatenate(runs, axis=-1).astype(np.float32) + np.float32(fmt.offset))


def _scaled_groups(codes: Floats, blocks: Any, groups: Groups) -> Floats:
    """d * scale * code - dmin * minimum, group by group."""
    scales, minima = blocks["scales"], None
    if "dmin" in blocks.dtype.names:
        scales, minima = _six_bits(scales)
    values = codes.reshape(*codes.shape[:2], -1, groups.size)
    values = values * (_wide(blocks["d"])[..., None] * scales.astype(np.float32))[..., None]
    if minima is not None:
        values = values - (_wide(blocks["dmin"])[..., None] * minima.astype(np.float32))[..., None]
    return np.asarray(values.reshape(codes.shape))


def _wide(half: npt.NDArray[np.float16]) -> Floats:
    return half.astype(np.float32)


def _six_bits(packed: Bytes) -> tuple[Codes, Codes]:
    """8 scales and 8 minima out of 12 bytes; see codegen/formats.py."""
    first, second, third = np.split(packed, 3, axis=-1)
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales, minima


def _unpack_q5(qh: Bytes) -> Codes:
    """Bit j of the four bytes belongs to value j."""
    return np.unpackbits(qh, axis=-1, bitorder="little")


def _pack_q5(high: Codes) -> Bytes:
    return np.packbits(high, axis=-1, bitorder="little")


def _unpack_q6(qh: Bytes) -> Codes:
    """Byte j: two bits each of values j, j + 16, j + 8 and j + 24, from the lowest."""
    return np.concatenate([qh & 3, qh >> 4 & 3, qh >> 2 & 3, qh >> 6], axis=-1)


def _pack_q6(high: Codes) -> Bytes:
    first, second, third, fourth = np.split(high, 4, axis=-1)
    return np.asarray(first | third << 2 | second << 4 | fourth << 6, np.uint8)


_UNPACK_HIGH = {1: _unpack_q5, 2: _unpack_q6}
_PACK_HIGH = {1: _pack_q5, 2: _pack_q6}


def _encode_float(x: Floats, dtype: DType) -> npt.NDArray[Any]:
    """f32 as is, f16 and bf16 rounded to nearest even; NaN stays NaN. (rows, blocks, 1) -> 2-D."""
    x = x[:, :, 0]
    if dtype.kind != "g":
        return x.astype(_code(dtype))
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # no finite value or Inf wraps
    quiet = bits >> 16 | 0x40
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16)


def _inverse(d: Floats) -> Floats:
    """1 / d, and 0 where d is 0 or so small that the inverse overflows: such blocks become 0."""
    inverse = np.float32(1.0) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0.0))


def _eight_bit(x: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Codes -127..127 and the scale max|x| / 127 over the last axis."""
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127.0)
    return np.rint(x * _inverse(d)).astype(np.int8), d


def _largest(x: Floats) -> Floats:
    """The value of largest magnitude, with its sign; the first of equals."""
    at = np.abs(x).argmax(axis=-1, keepdims=True)
    return np.take_along_axis(x, at, axis=-1)


def _offset_codes(x: Floats, fmt: BlockFormat) -> tuple[Codes, Floats]:
    """Unsigned codes whose middle is -offset; the largest value gets code 0."""
    d = _largest(x) / np.float32(fmt.offset)
    codes = np.trunc(x * _inverse(d) + np.float32(0.5 - fmt.offset))
    return codes.clip(0, -2 * fmt.offset - 1).astype(np.uint8), d


def _table_codes(x: Floats, fmt: BlockFormat) -> tuple[Codes, Floats]:
    """Indices of the nearest table values (of two as near, the lower)."""
    table = np.asarray(fmt.table, np.float32)
    d = _largest(x) / table[0]
    middles = (table[1:] + table[:-1]) / np.float32(2.0)
    return np.searchsorted(middles, x * _inverse(d)).astype(np.uint8), d
