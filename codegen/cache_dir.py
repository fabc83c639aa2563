"""Compiled code on disk. LLVM aborts the process on a damaged object, so nothing leaves here
unless its digest is right.

An entry is one file: magic, schema, key, payload length, sha256 of the payload, payload. The
digest stops corruption and mixed-up versions; only the folder's permissions stop an attacker, so
a folder that others can write to is not used at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import tempfile
import time
from pathlib import Path

SCHEMA = 1
MAX_BYTES = 256 << 20
_MAGIC = b"mlacobj\n"
_HEADER = struct.Struct("<8sI32sQ32s")
_STALE_SECONDS = 3600
_SUFFIX, _TEMPORARY = ".obj", ".tmp"


class ObjectCache:
    """Payloads by key, in `folder` (made with mode 0700 when missing).

    No method raises for a folder that is missing, full, read-only or unsafe: the cache is then
    empty, and `notes` says once why. Many processes may use one folder at the same time.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.notes: list[str] = []
        self._reads = self._writes = self._is_safe()

    def get(self, key: str) -> bytes | None:
        """The payload of `key` (a sha256 in hex), or None. A damaged entry is deleted."""
        if not self._reads:
            return None
        path = self._path(key)
        try:
            entry = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as problem:
            self._note(f"cannot be read ({problem.strerror})")
            return None
        payload = _unpack(entry, key)
        with contextlib.suppress(OSError):  # a read-only folder still serves what is right
            if payload is None:
                path.unlink()
            else:
                os.utime(path)  # the least recently used entries go first
        return payload

    def put(self, key: str, payload: bytes) -> None:
        """Store `payload`; readers see all of it or nothing. Sometimes drops the oldest entries."""
        if not self._writes or len(payload) > self.max_bytes:
            return
        try:
            self._write(key, _pack(key, payload))
        except OSError as problem:
            self._writes = False
            self._note(f"cannot be written ({problem.strerror})")
            return
        if key.startswith("0"):  # one in 16: listing a full folder takes longer than a write
            self.prune()

    def size(self) -> tuple[int, int]:
        """(number, bytes) of the entries."""
        found = [status for path, status in _files(self.folder) if path.endswith(_SUFFIX)]
        return len(found), sum(status.st_size for status in found)

    def prune(self) -> None:
        """Drop the least recently used entries above `max_bytes`, and what dead writers left."""
        entries, total = [], 0
        for path, status in _files(self.folder):
            if path.endswith(_TEMPORARY):
                if abs(time.time() - status.st_mtime) > _STALE_SECONDS:
                    _remove(path)
            elif path.endswith(_SUFFIX):
                entries.append((status.st_mtime_ns, status.st_size, path))
                total += status.st_size
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            _remove(path)
            total -= size

    def _path(self, key: str) -> Path:
        if len(bytes.fromhex(key)) != 32:
            raise ValueError(f"key {key!r} is not a sha256 in hex")
        return self.folder / (key + _SUFFIX)

    def _write(self, key: str, entry: bytes) -> None:
        path = self._path(key)
        descriptor, temporary = tempfile.mkstemp(suffix=_TEMPORARY, dir=self.folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(entry)
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise

    def _is_safe(self) -> bool:
        """Whether the folder is ours alone, so that nobody else can plant code in it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.lstat()
        except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
            self._note(f"cannot be made ({getattr(problem, 'strerror', None) or problem})")
            return False
        wrong = ""
        if not stat.S_ISDIR(status.st_mode):
            wrong = "is not a folder" if not stat.S_ISLNK(status.st_mode) else "is a symbolic link"
        elif hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            wrong = "belongs to another user"
        elif os.name == "posix" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            wrong = "can be written by others"
        if wrong:
            self._note(wrong)
        return not wrong

    def _note(self, why: str) -> None:
        if not self.notes:
            self.notes.append(f"object cache {self.folder} {why}: compiling without it")


def _pack(key: str, payload: bytes) -> bytes:
    digest = hashlib.sha256(payload).digest()
    return _HEADER.pack(_MAGIC, SCHEMA, bytes.fromhex(key), len(payload), digest) + payload


def _unpack(entry: bytes, key: str) -> bytes | None:
    """The payload of a whole and right entry, else None."""
    payload = entry[_HEADER.size :]
    return payload if entry == _pack(key, payload) else None


def _files(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Path and status of each file; others may be deleting meanwhile."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found.append((entry.path, entry.stat(follow_symlinks=False)))
    return found


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
