"""GGUF headers byte by byte, right or wrong on purpose: what a well-meant writer cannot produce."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlacli.gguf.metadata import VALUE_TYPES, Metadata
from mlacli.gguf.reader import open_gguf

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
TYPE_OF_NAME = {name: number for number, (name, _) in VALUE_TYPES.items()}
Value = int | float | bool | str | bytes | Sequence[int]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(data: str | bytes, length: int | None = None) -> bytes:
    """A string; `length` is what it claims to be."""
    raw = data.encode() if isinstance(data, str) else data
    return u64(len(raw) if length is None else length) + raw


def key(name: str | bytes, type_: int, value: bytes) -> bytes:
    return text(name) + u32(type_) + value


def array(element_type: int, count: int, payload: bytes = b"") -> bytes:
    return u32(element_type) + u64(count) + payload


def encoded(name: str, value: Value) -> bytes:
    """A key with the type its value suggests: u32, f32, bool, string, array of i32."""
    if isinstance(value, bool):
        return key(name, BOOL, bytes([value]))
    if isinstance(value, int):
        return (
            key(name, U32, u32(value)) if value >= 0 else key(name, I32, struct.pack("<i", value))
        )
    if isinstance(value, float):
        return key(name, F32, struct.pack("<f", value))
    if isinstance(value, str | bytes):
        return key(name, STRING, text(value))
    return key(name, ARRAY, array(I32, len(value), struct.pack(f"<{len(value)}i", *value)))


@dataclass(frozen=True)
class RawTensor:
    """A tensor's entry; nothing about it need be true."""

    name: str | bytes = "t"
    shape: tuple[int, ...] = (32,)
    type: int = 0
    offset: int = 0
    n_dims: int | None = None

    def entry(self) -> bytes:
        n_dims = len(self.shape) if self.n_dims is None else self.n_dims
        dims = b"".join(u64(size) for size in self.shape)
        return text(self.name) + u32(n_dims) + dims + u32(self.type) + u64(self.offset)


def header(
    keys: Iterable[bytes] = (),
    tensors: Iterable[RawTensor] = (),
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    keys, entries = list(keys), [tensor.entry() for tensor in tensors]
    n_keys = len(keys) if n_keys is None else n_keys
    n_tensors = len(entries) if n_tensors is None else n_tensors
    start = b"GGUF" + u32(version) + u64(n_tensors) + u64(n_keys)
    return start + b"".join(keys) + b"".join(entries)


def padded(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


def with_data(
    keys: Iterable[bytes] = (), tensors: Iterable[RawTensor] = (), n_bytes: int = 128
) -> bytes:
    """A header and `n_bytes` of data: what one F32 tensor of 32 values needs."""
    return padded(header(keys, tensors)) + bytes(n_bytes)


def edited_model(
    source: Path,
    target: Path,
    changes: Mapping[str, Value | None] = {},
    *,
    tensors: Mapping[str, tuple[tuple[int, ...], int] | None] = {},
) -> Path:
    """A copy of a model's header with keys and tensors changed, added or (None) left out.

    Tensor data is a hole, and the tokenizer's keys are left out.
    """
    file = open_gguf(source)
    keys = []
    for name in file.metadata:
        if name not in changes and not name.startswith("tokenizer."):
            keys.append(_copied(file.metadata, name))
    keys += [encoded(name, value) for name, value in changes.items() if value is not None]
    shapes: dict[str, tuple[tuple[int, ...], int] | None] = {
        name: (tensor.shape, tensor.ggml_type) for name, tensor in file.tensors.items()
    }
    shapes |= tensors
    entries, offset = [], 0
    for name, described in shapes.items():
        if described is None:
            continue
        entries.append(RawTensor(name, described[0], described[1], offset))
        n_bytes = 4
        for size in described[0]:
            n_bytes *= size  # enough for every type
        offset += -(-n_bytes // 32) * 32
    head = padded(header(keys, entries))
    with target.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + offset)
    return target


def _copied(metadata: Metadata, name: str) -> bytes:
    type_name = metadata.type_name(name)
    if type_name == "string":
        return encoded(name, metadata.text(name))
    type_ = TYPE_OF_NAME[type_name]
    return key(name, type_, struct.pack("<" + VALUE_TYPES[type_][1], metadata[name]))
