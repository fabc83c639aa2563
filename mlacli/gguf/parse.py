"""A bounded parser of one GGUF file's header (versions 2 and 3, little-endian).

Nothing is allocated from a count that the file declares before that many elements are known to fit
into the bytes that remain, every sum is done in Python's unbounded integers, and the caps below
hold. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import Any, NoReturn

import numpy as np

from codegen.formats import CACHE_FORMATS, WEIGHT_FORMATS, BlockFormat
from mlacli.gguf.metadata import (
    ARRAY,
    BOOL,
    SCALAR_CODES,
    STRING,
    TYPE_NAMES,
    ArrayRef,
    Metadata,
    Scalar,
)
from mlacli.gguf.problem import model_error, printable

MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 16 * 2**20
MAX_TEMPLATE_BYTES = 2**20
MAX_ARRAY_LENGTH = 2**24
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MIN_ALIGNMENT, MAX_ALIGNMENT, DEFAULT_ALIGNMENT = 8, 2**20, 32
MAX_METADATA_BYTES = 256 * 2**20

_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one character, type, one byte of value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name, n_dims, one dimension, type, offset
_U32, _U64 = Struct("<I"), Struct("<Q")
_SCALARS = {type_: Struct("<" + code) for type_, code in SCALAR_CODES.items()}
_FORMATS = {f.ggml_type: f for f in (*CACHE_FORMATS.values(), *WEIGHT_FORMATS.values())}
_DIMENSIONS = [Struct(f"<{n}Q") for n in range(MAX_DIMENSIONS + 1)]
_ALIGNMENT_KEY = "general.alignment"
_TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` is GGUF's (ne: fastest dimension first), `offset` is in bytes
    from the start of its file, which is number `file_index` of the split."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    type_name: str
    offset: int
    nbytes: int
    file_index: int = 0

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.n_rows


# Offset from the start of the data, bytes, (name, shape, type, type name), file index.
_Declared = tuple[int, int, tuple[str, tuple[int, ...], int, str], int]


@dataclass(frozen=True)
class Header:
    """What one file declares; tensor data starts at byte `data_start`."""

    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    data_start: int
    notes: tuple[str, ...]


def has_format(tensor: TensorInfo) -> bool:
    """Whether `format_of` knows the tensor's type."""
    return tensor.ggml_type in _FORMATS


def format_of(path: Path, tensor: TensorInfo) -> BlockFormat:
    """The storage format of a tensor. Raises ModelError for a type that mlacli cannot decode."""
    if tensor.ggml_type in _FORMATS:
        return _FORMATS[tensor.ggml_type]
    supported = " ".join(f.name for f in _FORMATS.values())
    problem = "tensor type not supported"
    raise model_error(path, tensor.name, problem, got=tensor.type_name, limit=supported)


def parse_header(path: Path, buffer: memoryview, file_index: int = 0) -> Header:
    """The header of the file mapped at `buffer`, with every tensor's place checked against its end.

    Raises ModelError for anything malformed or over a cap. The caller has checked the magic.
    """
    cursor = _Cursor(path, buffer)
    version = _version(cursor)
    n_tensors = cursor.unsigned(_U64, "n_tensors")
    n_keys = cursor.unsigned(_U64, "n_kv")
    cursor.check_count("n_tensors", n_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES)
    cursor.check_count("n_kv", n_keys, MAX_KEYS, _MIN_KEY_BYTES)
    metadata = _metadata(cursor, n_keys)
    alignment = _alignment(path, metadata)
    declared = [_tensor(cursor, i, file_index, alignment) for i in range(n_tensors)]
    data_start = -(-cursor.at // alignment) * alignment
    tensors, data_end = _place(cursor, declared, data_start)
    trailing = len(buffer) - -(-data_end // alignment) * alignment
    note = f"{printable(str(path), 80)}: {trailing} bytes after the last tensor"
    notes = (note,) if trailing > 0 else ()
    return Header(version, metadata, tensors, data_start, notes)


class _Cursor:
    """A position in the file; every read says which field it is for."""

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path = path
        self.buffer = buffer[:MAX_METADATA_BYTES]
        self.file_size = len(buffer)
        self.at = 4  # the magic

    def fail(self, field: str, problem: str, got: object = None, limit: object = None) -> NoReturn:
        raise model_error(self.path, field, problem, got=got, limit=limit)

    def take(self, n: int, field: str) -> int:
        """The position of the next `n` bytes, which the cursor steps over."""
        start = self.at
        if n > len(self.buffer) - start:
            self.too_short(n, field)
        self.at = start + n
        return start

    def too_short(self, n: int, field: str) -> NoReturn:
        left = len(self.buffer) - self.at
        if self.file_size > len(self.buffer):
            self.fail(field, "the header is too large", f"{self.at + n} bytes", MAX_METADATA_BYTES)
        self.fail(field, "the file ends inside it", f"{n} bytes", f"{left} left")

    def unsigned(self, struct: Struct, field: str) -> int:
        return int(struct.unpack_from(self.buffer, self.take(struct.size, field))[0])

    def string(self, field: str, limit: int) -> bytes:
        length = self.unsigned(_U64, field)
        if length > limit:
            self.fail(field, "too long", f"{length} bytes", limit)
        start = self.take(length, field)
        return bytes(self.buffer[start : start + length])

    def text(self, field: str, limit: int) -> str:
        data = self.string(field, limit)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(field, "not UTF-8", data.decode(errors="surrogateescape"))

    def name(self, field: str, limit: int) -> str:
        """A key's or tensor's name: 1 to `limit` bytes of printable UTF-8."""
        name = self.text(field, limit)
        if not name:
            self.fail(field, "empty name", "0 bytes", f"1..{limit}")
        if not name.isprintable():
            self.fail(field, "the name has control characters", name)
        return name

    def check_count(self, field: str, count: int, cap: int, min_bytes: int) -> None:
        """Refuse a count over its cap, or that cannot fit into the rest of the file."""
        if count > cap:
            self.fail(field, "too many", count, cap)
        fits = (self.file_size - self.at) // min_bytes
        if count > fits:
            self.fail(field, "more than the rest of the file can hold", count, fits)


def _version(cursor: _Cursor) -> int:
    version = cursor.unsigned(_U32, "version")
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0 and version:
        cursor.fail("version", "big-endian GGUF files are not supported", version, "2..3")
    cursor.fail("version", "GGUF version not supported", version, "2..3")


def _metadata(cursor: _Cursor, n_keys: int) -> Metadata:
    values: dict[str, Scalar | ArrayRef] = {}
    types: dict[str, int] = {}
    for i in range(n_keys):
        key = cursor.name(f"metadata key {i}", MAX_KEY_BYTES)
        if key in values:
            cursor.fail(key, "the key occurs twice", f"key {i}")
        types[key] = cursor.unsigned(_U32, key)
        values[key] = _value(cursor, key, types[key])
    return Metadata(cursor.path, cursor.buffer, values, types)


def _value(cursor: _Cursor, key: str, type_: int) -> Scalar | ArrayRef:
    if type_ == STRING:
        return cursor.text(key, _string_cap(key))
    if type_ == ARRAY:
        return _array(cursor, key)
    struct = _SCALARS.get(type_)
    if struct is None:
        cursor.fail(key, "unknown value type", type_, f"0..{len(TYPE_NAMES) - 1}")
    value: Any = struct.unpack_from(cursor.buffer, cursor.take(struct.size, key))[0]
    if type_ == BOOL:
        if value > 1:
            cursor.fail(key, "not a bool", value, "0..1")
        return bool(value)
    return value  # type: ignore[no-any-return]


def _string_cap(key: str) -> int:
    return MAX_TEMPLATE_BYTES if key.startswith(_TEMPLATE_KEY) else MAX_STRING_BYTES


def _array(cursor: _Cursor, key: str) -> ArrayRef:
    element_type = cursor.unsigned(_U32, key)
    count = cursor.unsigned(_U64, key)
    if element_type == ARRAY:
        cursor.fail(key, "nested arrays are not supported", f"array of {count} arrays")
    if element_type != STRING and element_type not in _SCALARS:
        cursor.fail(key, "unknown array element type", element_type, f"0..{len(TYPE_NAMES) - 1}")
    min_bytes = 8 if element_type == STRING else _SCALARS[element_type].size
    cursor.check_count(key, count, MAX_ARRAY_LENGTH, min_bytes)
    start = cursor.at
    if element_type == STRING:
        _step_over_strings(cursor, key, count)
    else:
        cursor.take(count * min_bytes, key)
        if element_type == BOOL and count:
            largest = int(np.frombuffer(cursor.buffer[start : cursor.at], np.uint8).max())
            if largest > 1:
                cursor.fail(key, "an element is not a bool", largest, "0..1")
    return ArrayRef(element_type, count, start, cursor.at)


def _step_over_strings(cursor: _Cursor, key: str, count: int) -> None:
    """Find the end of `count` strings; this loop is most of the time to open a model."""
    buffer, cap = cursor.buffer, _string_cap(key)
    unpack = _U64.unpack_from
    at = cursor.at
    try:
        for _ in range(count):
            length = unpack(buffer, at)[0]
            if length > cap:
                cursor.fail(key, "an element is too long", f"{length} bytes", cap)
            at += 8 + length
    except StructError:
        at += 8  # the next length lies past the end: `take` says so
    cursor.take(at - cursor.at, key)


def _alignment(path: Path, metadata: Metadata) -> int:
    if _ALIGNMENT_KEY not in metadata:
        return DEFAULT_ALIGNMENT
    if metadata.type_name(_ALIGNMENT_KEY) != "u32":
        type_name = metadata.type_name(_ALIGNMENT_KEY)
        raise model_error(path, _ALIGNMENT_KEY, "has the wrong type", got=type_name, limit="u32")
    alignment = metadata.integer(_ALIGNMENT_KEY, low=MIN_ALIGNMENT, high=MAX_ALIGNMENT)
    if alignment & (alignment - 1):
        raise model_error(path, _ALIGNMENT_KEY, "not a power of two", got=alignment)
    return alignment


def _tensor(cursor: _Cursor, index: int, file_index: int, alignment: int) -> _Declared:
    """One tensor's entry, checked by itself: its offset, and what else a TensorInfo needs."""
    name = cursor.name(f"tensor {index}", MAX_TENSOR_NAME_BYTES)
    n_dims = cursor.unsigned(_U32, name)
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        cursor.fail(name, "number of dimensions", n_dims, f"1..{MAX_DIMENSIONS}")
    shape = _DIMENSIONS[n_dims].unpack_from(cursor.buffer, cursor.take(8 * n_dims, name))
    for size in shape:
        if not 1 <= size < 2**63:
            cursor.fail(name, "a dimension is zero or negative", size, f"1..{2**63 - 1}")
    ggml_type = cursor.unsigned(_U32, name)
    type_name, size, block_bytes, header_bytes = _type_layout(cursor, name, ggml_type)
    if shape[0] % size:
        cursor.fail(name, f"the row is no multiple of {type_name}'s blocks", shape[0], size)
    row_bytes = header_bytes + shape[0] // size * block_bytes
    offset = cursor.unsigned(_U64, name)
    if offset % alignment:
        cursor.fail(name, "the offset is not aligned", offset, alignment)
    return offset, math.prod(shape[1:]) * row_bytes, (name, shape, ggml_type, type_name), file_index


def _type_layout(cursor: _Cursor, name: str, ggml_type: int) -> tuple[str, int, int, int]:
    """(name, values per block, bytes per block, bytes of row header) of a tensor type."""
    known = _FORMATS.get(ggml_type)
    if known:
        return known.name, known.size, known.block_bytes, known.header_bytes
    from gguf.constants import GGML_QUANT_SIZES  # slow import; only for types we cannot run

    for other, (size, block_bytes) in GGML_QUANT_SIZES.items():
        if other.value == ggml_type:
            return str(other.name), size, block_bytes, 0
    owner = " (one of ik_llama.cpp's own)" if 97 <= ggml_type < 400 else ""
    cursor.fail(name, f"unknown tensor type{owner}", f"type {ggml_type}")


def _place(
    cursor: _Cursor, declared: list[_Declared], data_start: int
) -> tuple[dict[str, TensorInfo], int]:
    """Tensors by name with absolute offsets, and the end of the last one's data.

    Refuses data outside the file, tensors that share bytes, and a name that occurs twice.
    """
    tensors: dict[str, TensorInfo] = {}
    end, last = data_start, ""
    for relative, nbytes, described, file_index in sorted(declared, key=lambda entry: entry[0]):
        name = described[0]
        offset = data_start + relative
        if name in tensors:
            cursor.fail(name, "the tensor occurs twice")
        if offset < end:
            cursor.fail(name, f"overlaps tensor {last}", f"offset {offset}", f"from {end}")
        end, last = offset + nbytes, name
        if end > cursor.file_size:
            problem = "its data runs past the end of the file"
            cursor.fail(name, problem, f"{offset} + {nbytes} bytes", cursor.file_size)
        tensors[name] = TensorInfo(*described, offset, nbytes, file_index)
    return tensors, end
