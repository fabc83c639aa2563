"""Saved sessions (--prompt-cache): the tokens of a context and what the cache holds of them.

    magic | version u32 | bytes of the header u32 | header, JSON | tokens i32 | positions i32
          | per layer and kind the cells, one after another | sha256 of everything before

All numbers are little-endian. The header names what the rows belong to, so that a file is refused
for another model, cache type or mode, and says why. A file is written under another name, synced
and renamed: what bears the name is always whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mlacli import __version__
from mlacli.cache import EMPTY, Cache
from mlacli.engine import Engine
from mlacli.errors import SessionError, SpaceError
from mlacli.files import Data, write_whole
from mlacli.gguf.reader import GGUFFile
from mlacli.progress import Progress

MAGIC, VERSION = b"mlaSESSN", 2
_PEERS = (b"ggsn", b"nsgg", b"ggsq", b"qsgg")
_MAX_HEADER = 1 << 20
_DIGEST = hashlib.sha256().digest_size
_SAMPLE = 1 << 20
_NAMES = {
    "model": "the model",
    "overrides": "metadata (--override-kv, --rope-*, --yarn-*)",
    "mla": "-mla",
    "ser": "-ser",
    "kernels": "kernels of one's own",
    "flash_attn": "-fa",
    "type_k": "-ctk",
    "type_v": "-ctv",
    "n_layer": "layers",
    "cell_bytes": "bytes per token",
}


def identity(engine: Engine) -> dict[str, Any]:
    """What has to be the same for rows to mean the same."""
    settings, layout = engine.settings, engine.plan.layout
    return {
        "model": model_digest(engine.model.file),
        "overrides": list(engine.model.overrides),
        "kernels": engine.own_kernels(),
        "mla": settings.mla,
        "ser": list(settings.ser) if settings.ser else None,
        "flash_attn": settings.flash_attn,
        "type_k": layout.fmt_k.name,
        "type_v": layout.fmt_v.name if not layout.latent else None,
        "n_layer": layout.n_layer,
        "cell_bytes": {kind: parts * n for kind, (parts, n) in layout.cells().items()},
    }


def model_digest(file: GGUFFile) -> str:
    """sha256 of each file's header, size, and the first and last MiB of its data."""
    digest = hashlib.sha256()
    for part in file.files:
        data = part.bytes[part.data_start :]
        for piece in (part.header, data[:_SAMPLE], data[max(0, data.size - _SAMPLE) :]):
            digest.update(piece.data)
        digest.update(part.bytes.size.to_bytes(8, "little"))
    return digest.hexdigest()


# -- writing --------------------------------------------------------------------------------------


def save_session(
    path: Path, engine: Engine, tokens: Sequence[int], progress: Progress | None = None
) -> int:
    """Write the cells of these tokens; returns the file's size. `progress` is told bytes.

    Raises SpaceError naming the file when it cannot be written: then what was there stays.
    """
    cells = np.flatnonzero(engine.cache.seq != EMPTY)
    header = identity(engine) | {"n_tokens": len(tokens), "n_cells": len(cells)}
    header["mlacli"] = __version__
    text = json.dumps(header).encode()
    parts: list[Data] = [MAGIC, _u32(VERSION), _u32(len(text)), text]
    parts += [np.array(tokens, "<i4").data, engine.cache.pos[cells].astype("<i4").data]
    rows = _told(_rows(engine.cache, cells), _row_bytes(engine.cache, len(cells)), progress)
    try:
        return write_whole(path, _with_digest(chain(parts, rows)))
    except OSError as problem:
        raise SpaceError(f"--prompt-cache: {path}: {problem.strerror}") from problem


def _row_bytes(cache: Cache, n_cells: int) -> int:
    per_cell = sum(parts * n for parts, n in cache.layout.cells().values())
    return per_cell * cache.layout.n_layer * n_cells


def _told(parts: Iterable[Data], total: int, progress: Progress | None) -> Iterator[Data]:
    done = 0
    for part in parts:
        yield part
        done += len(part)
        if progress:
            progress(done, total)


def _rows(cache: Cache, cells: npt.NDArray[np.intp]) -> Iterator[Data]:
    for layer in range(cache.layout.n_layer):
        for kind in cache.layout.cells():
            yield cache.parts(kind, layer)[:, cells].reshape(-1).data


def _with_digest(parts: Iterable[Data]) -> Iterator[Data]:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        yield part
    yield digest.digest()


def _u32(n: int) -> bytes:
    return n.to_bytes(4, "little")


# -- reading --------------------------------------------------------------------------------------


def load_session(path: Path, engine: Engine, progress: Progress | None = None) -> list[int] | None:
    """Fill the empty cache from a file; returns its tokens, None if there is no such file.
    `progress` is told bytes.

    Raises SessionError with one line that says what is wrong: then the cache is empty again.
    """
    try:
        with path.open("rb") as stream:
            return _Reader(path, stream, engine, progress).read()
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise SessionError(f"--prompt-cache: {path}: {problem.strerror}") from problem
    except BaseException:
        engine.cache.clear()
        raise


class _Reader:
    def __init__(
        self, path: Path, stream: BinaryIO, engine: Engine, progress: Progress | None
    ) -> None:
        self._path, self._stream, self._engine = path, stream, engine
        self._digest, self._progress = hashlib.sha256(), progress
        self._size = self._left = os.fstat(stream.fileno()).st_size

    def read(self) -> list[int]:
        header = self._header()
        n_tokens, n_cells = (self._count(header, name) for name in ("n_tokens", "n_cells"))
        cache = self._engine.cache
        expected = 4 * (n_tokens + n_cells) + _row_bytes(cache, n_cells) + _DIGEST
        if self._left != expected:
            raise self._problem(f"has {self._left} bytes behind its header, not {expected}")
        tokens = np.frombuffer(self._take(4 * n_tokens), "<i4")
        positions = np.frombuffer(self._take(4 * n_cells), "<i4")
        self._check(tokens, positions)
        for layer in range(cache.layout.n_layer):
            for kind, (parts, n_bytes) in cache.layout.cells().items():
                block = np.frombuffer(self._take(parts * n_bytes * n_cells), np.uint8)
                cache.parts(kind, layer)[:, :n_cells] = block.reshape(parts, n_cells, n_bytes)
        found = self._digest.digest()
        if self._take(_DIGEST) != found:
            raise self._problem("is damaged: its checksum is wrong")
        cache.pos[:n_cells], cache.seq[:n_cells] = positions, 0
        return [int(token) for token in tokens]

    def _header(self) -> dict[str, Any]:
        if not self._left:
            raise self._problem("is empty")
        magic = self._take(len(MAGIC))
        if magic[:4] in _PEERS:
            raise self._problem("is a session of llama.cpp, which mlacli cannot read")
        if magic != MAGIC:
            raise self._problem("is not a session of mlacli")
        version = int.from_bytes(self._take(4), "little")
        if version != VERSION:
            raise self._problem(f"has version {version} of the format (known: {VERSION})")
        size = int.from_bytes(self._take(4), "little")
        if size > _MAX_HEADER:
            raise self._problem(f"has a header of {size} bytes (limit {_MAX_HEADER})")
        try:
            header = json.loads(
                self._take(size), object_pairs_hook=_no_twins, parse_constant=_no_constant
            )
        except (ValueError, RecursionError):
            raise self._problem("has a header that is not JSON") from None
        if not isinstance(header, dict):
            raise self._problem("has a header that is not an object")
        for name, here in identity(self._engine).items():
            there = header.get(name)
            if there != here:
                shown = "another one" if name == "model" else f"{_short(there)}, not {_short(here)}"
                raise self._problem(f"belongs to {_NAMES[name]} {shown}")
        return header

    def _count(self, header: dict[str, Any], name: str) -> int:
        value = header.get(name)
        limit = self._engine.n_ctx
        if type(value) is not int or not 1 <= value <= limit:
            raise self._problem(f"{name} is {str(value)[:40]} (limit -c {limit})")
        return value

    def _check(self, tokens: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]) -> None:
        n_vocab = self._engine.model.config.n_vocab
        wrong = (tokens < 0) | (tokens >= n_vocab)
        if wrong.any():
            token = int(tokens[wrong.argmax()])
            raise self._problem(f"has token {token}, outside the vocabulary (0 to {n_vocab - 1})")
        if sorted(positions.tolist()) != list(range(len(tokens))):
            raise self._problem("its positions are not those of its tokens")

    def _take(self, n: int) -> bytes:
        data = self._stream.read(n) if n <= self._left else b""
        if len(data) != n:
            raise self._problem("ends too early")
        self._left -= n
        self._digest.update(data)
        if self._progress:
            self._progress(self._size - self._left, self._size)
        return data

    def _problem(self, problem: str) -> SessionError:
        return SessionError(f"--prompt-cache: {self._path}: {problem}")


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) or "unchanged" if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(text)
