"""Open a GGUF model, alone or split into shards, as read-only memory maps.

`open_gguf` is the one gate that every byte of a model passes through: what it returns is
structurally sound (see parse.py), so that kernels may trust offsets and sizes.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlacli.errors import ModelError
from mlacli.gguf.metadata import Metadata
from mlacli.gguf.parse import Header, TensorInfo, parse_header
from mlacli.gguf.problem import model_error
from mlacli.memory import ask_for_huge_pages

__all__ = ["GGUFFile", "MappedFile", "Metadata", "TensorInfo", "open_gguf"]

MAX_SHARDS = 1_024
_SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.S)
_SPLIT_NUMBER, _SPLIT_COUNT = "split.no", "split.count"
_SPLIT_TENSORS = "split.tensors.count"
# What people hand over instead of a GGUF file, by its first bytes.
_OTHER_FILES = (
    (b"version https://git-lfs", "a git-lfs pointer: fetch the real file with `git lfs pull`"),
    (b"lmgg", "an old GGML file: convert it to GGUF"),
    (b"fmgg", "an old GGML file: convert it to GGUF"),
    (b"tjgg", "an old GGML file: convert it to GGUF"),
    (b"GGML", "an old GGML file: convert it to GGUF"),
    (b"PK\x03\x04", "a zip archive (perhaps a PyTorch checkpoint)"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"<!DOCTYPE", "an HTML page: the download failed"),
    (b"<!doctype", "an HTML page: the download failed"),
    (b"<html", "an HTML page: the download failed"),
    (b"FUGG", "byte-swapped (big-endian)"),
)


@dataclass(frozen=True)
class MappedFile:
    """One file of a model: its read-only shared mapping and the place where tensor data starts."""

    path: Path
    bytes: npt.NDArray[np.uint8]
    data_start: int

    @property
    def header(self) -> npt.NDArray[np.uint8]:
        """Everything before the tensor data: what identifies the model's shape and vocabulary."""
        return self.bytes[: self.data_start]


@dataclass(frozen=True)
class GGUFFile:
    """An open model. `metadata` is the first shard's, `tensors` are those of all shards.

    `notes` are oddities that do no harm (for stderr). The maps live as long as this object or any
    array that `data` gave out.
    """

    path: Path
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    files: tuple[MappedFile, ...]
    notes: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.bytes.size for file in self.files)

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, flat, as a view of the mapped file. Raises KeyError."""
        tensor = self.tensors[name]
        return self.files[tensor.file_index].bytes[tensor.offset : tensor.offset + tensor.nbytes]

    def address(self, name: str) -> int:
        """The address in memory of the tensor's first byte. Raises KeyError."""
        tensor = self.tensors[name]
        return int(self.files[tensor.file_index].bytes.ctypes.data) + tensor.offset


def open_gguf(path: Path) -> GGUFFile:
    """Map and parse the model at `path`; of a split model, `path` is the first shard.

    Raises ModelError with one line that names the file, the field or tensor, and what is wrong.
    """
    path = Path(path)
    file, header = _open_one(path, 0)
    n_shards = _shard_count(path, header)
    if n_shards == 1:
        return GGUFFile(path, header.metadata, header.tensors, (file,), header.notes)
    files, tensors, notes = [file], dict(header.tensors), list(header.notes)
    for index in range(1, n_shards):
        shard_path = _shard_path(path, index, n_shards)
        shard_file, shard = _open_one(shard_path, index)
        _check_shard(shard_path, shard, header, index)
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise model_error(shard_path, name, "the tensor is in an earlier shard, too")
            tensors[name] = tensor
        files.append(shard_file)
        notes += shard.notes
    total = header.metadata.integer(_SPLIT_TENSORS, len(tensors))
    if total != len(tensors):
        problem = "the shards do not hold the declared number of tensors"
        raise model_error(path, _SPLIT_TENSORS, problem, got=len(tensors), limit=total)
    return GGUFFile(path, header.metadata, tensors, tuple(files), tuple(notes))


def _open_one(path: Path, index: int) -> tuple[MappedFile, Header]:
    mapped = _map(path)
    view = memoryview(mapped)
    _check_magic(path, bytes(view[:64]))
    header = parse_header(path, view, index)
    return MappedFile(path, np.frombuffer(mapped, np.uint8), header.data_start), header


def _map(path: Path) -> mmap.mmap:
    """A read-only shared map of a regular file; never blocks on a FIFO or reads a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as problem:
        raise _cannot_open(path, problem) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise model_error(path, "file", f"is {kind}; a GGUF file is needed")
        if status.st_size == 0:
            raise model_error(path, "file", "is empty", got="0 bytes")
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        ask_for_huge_pages(mapped)
        return mapped
    except OSError as problem:
        raise _cannot_open(path, problem) from None
    finally:
        os.close(descriptor)


def _cannot_open(path: Path, problem: Exception) -> ModelError:
    reason = problem.strerror if isinstance(problem, OSError) else str(problem)
    return model_error(path, "file", f"cannot be opened: {reason}")


def _check_magic(path: Path, head: bytes) -> None:
    if head[:4] == b"GGUF":
        return
    if len(head) < 4:
        raise model_error(path, "magic", "not a GGUF file", got=f"{len(head)} bytes", limit="24")
    for start, what in _OTHER_FILES:
        if head.startswith(start):
            raise model_error(path, "magic", f"not a GGUF file but {what}")
    if head[8:9] == b"{":
        raise model_error(path, "magic", "not a GGUF file but safetensors: convert it to GGUF")
    shown = head[:4].decode(errors="surrogateescape")
    raise model_error(path, "magic", "not a GGUF file", got=shown, limit="GGUF")


def _shard_count(path: Path, header: Header) -> int:
    """1 for a model in one file. Merged files carry split.count 0, which is harmless."""
    metadata = header.metadata
    named = _SHARD_NAME.fullmatch(path.name)
    if _SPLIT_COUNT not in metadata:
        return 1
    count = metadata.integer(_SPLIT_COUNT, low=1 if named else 0, high=MAX_SHARDS)
    if count <= 1:
        return 1
    if not named or int(named["count"]) != count:
        wanted = f"NAME-00001-of-{count:05d}.gguf"
        raise model_error(
            path, _SPLIT_COUNT, "does not agree with the file name", got=path.name, limit=wanted
        )
    number = metadata.integer(_SPLIT_NUMBER, low=0, high=count - 1)
    if int(named["number"]) != 1:
        raise model_error(
            path,
            _SPLIT_NUMBER,
            f"this is shard {number + 1} of {count}: give the first one",
            got=path.name,
            limit=_shard_path(path, 0, count).name,
        )
    if number != 0:
        problem = "the first shard has another shard's number"
        raise model_error(path, _SPLIT_NUMBER, problem, got=number, limit=0)
    return count


def _shard_path(first: Path, index: int, count: int) -> Path:
    named = _SHARD_NAME.fullmatch(first.name)
    stem = named["stem"] if named else first.stem
    return first.with_name(f"{stem}-{index + 1:05d}-of-{count:05d}.gguf")


def _check_shard(path: Path, shard: Header, first: Header, index: int) -> None:
    """A later shard must be the wanted one, and of the same model as the first."""
    number = shard.metadata.integer(_SPLIT_NUMBER)
    if number != index:
        problem = "the shard has another shard's number"
        raise model_error(path, _SPLIT_NUMBER, problem, got=number, limit=index)
    for key in shard.metadata:
        if key == _SPLIT_NUMBER or key not in first.metadata or shard.metadata.is_array(key):
            continue
        ours, theirs = first.metadata[key], shard.metadata[key]
        if not isinstance(ours, np.ndarray | list) and ours != theirs:
            raise model_error(
                path, key, "the shard is of another model than the first", got=theirs, limit=ours
            )
