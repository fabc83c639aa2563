"""The object cache: what it hands out is right or nothing, whatever happens to the folder."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codegen.cache_dir import ObjectCache

KEY = hashlib.sha256(b"kernel").hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()
PAYLOAD = bytes(range(256)) * 5


@pytest.fixture
def cache(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "objects")


def _entry(cache: ObjectCache) -> Path:
    cache.put(KEY, PAYLOAD)
    (path,) = cache.folder.iterdir()
    return path


def test_round_trip_in_a_private_folder(cache: ObjectCache) -> None:
    assert cache.get(KEY) is None
    cache.put(KEY, PAYLOAD)
    assert cache.get(KEY) == PAYLOAD
    assert ObjectCache(cache.folder).get(KEY) == PAYLOAD
    assert cache.get(OTHER) is None
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert cache.notes == []


def test_empty_payload_and_overwrite(cache: ObjectCache) -> None:
    cache.put(KEY, b"")
    assert cache.get(KEY) == b""
    cache.put(KEY, PAYLOAD)
    assert cache.get(KEY) == PAYLOAD


@pytest.mark.parametrize("length", [0, 10, 64, 80, 81, 84, 200, 500, 1279])
def test_cut_entry_is_deleted(cache: ObjectCache, length: int) -> None:
    path = _entry(cache)
    path.write_bytes(path.read_bytes()[:length])
    assert cache.get(KEY) is None
    assert not path.exists()


@pytest.mark.parametrize("content", [bytes(2000), b"\x7fELF" + bytes(500), b"text\n" * 100])
def test_foreign_content_is_deleted(cache: ObjectCache, content: bytes) -> None:
    path = _entry(cache)
    path.write_bytes(content)
    assert cache.get(KEY) is None
    assert not path.exists()


def test_every_flipped_bit_is_seen(cache: ObjectCache) -> None:
    path = _entry(cache)
    whole = path.read_bytes()
    rng = random.Random(1)
    header_bits = range(8 * (len(whole) - len(PAYLOAD)))
    for bit in [*header_bits, *rng.sample(range(8 * len(whole)), 500)]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert cache.get(KEY) is None, bit
    path.write_bytes(whole)
    assert cache.get(KEY) == PAYLOAD


def test_trailing_bytes_are_refused(cache: ObjectCache) -> None:
    path = _entry(cache)
    path.write_bytes(path.read_bytes() + b"\0")
    assert cache.get(KEY) is None


def test_entry_under_another_key_is_refused(cache: ObjectCache) -> None:
    path = _entry(cache)
    path.rename(path.with_name(path.name.replace(KEY, OTHER)))
    assert cache.get(OTHER) is None
    assert list(cache.folder.iterdir()) == []


def test_key_must_be_a_digest(cache: ObjectCache) -> None:
    for key in ("../../etc/passwd", "abcd", ""):
        with pytest.raises(ValueError):
            cache.put(key, PAYLOAD)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folder_that_others_can_write_is_not_used(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(0o700)
    ObjectCache(tmp_path).put(KEY, PAYLOAD)
    tmp_path.chmod(mode)
    cache = ObjectCache(tmp_path)
    assert cache.get(KEY) is None
    cache.put(OTHER, PAYLOAD)
    assert len(list(tmp_path.iterdir())) == 1
    assert cache.notes == [
        f"object cache {tmp_path} can be written by others: compiling without it"
    ]


def test_symbolic_link_is_not_used(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    ObjectCache(real).put(KEY, PAYLOAD)
    link.symlink_to(real)
    cache = ObjectCache(link)
    assert cache.get(KEY) is None
    assert "is a symbolic link" in cache.notes[0]


def test_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ObjectCache(tmp_path / "c").put(KEY, PAYLOAD)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    cache = ObjectCache(tmp_path / "c")
    assert cache.get(KEY) is None
    assert "belongs to another user" in cache.notes[0]


@pytest.mark.parametrize("name", ["file", "file/below", "nul\0name", "x" * 300])
def test_folder_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    cache = ObjectCache(tmp_path / name)
    cache.put(KEY, PAYLOAD)
    assert cache.get(KEY) is None
    assert len(cache.notes) == 1 and "compiling without it" in cache.notes[0]


def _fail(code: int) -> object:
    def action(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return action


@pytest.mark.parametrize("step", ["tempfile.mkstemp", "os.replace"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_failed_write_is_noted_once_and_leaves_nothing(
    cache: ObjectCache, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    cache.put(KEY, PAYLOAD)
    monkeypatch.setattr(step, _fail(code))
    cache.put(OTHER, PAYLOAD)
    cache.put(OTHER, PAYLOAD)
    assert len(cache.notes) == 1 and os.strerror(code) in cache.notes[0]
    assert cache.get(KEY) == PAYLOAD
    assert len(list(cache.folder.iterdir())) == 1


_SHORT_OF_SPACE = """
import resource, sys
from pathlib import Path
from codegen.cache_dir import ObjectCache
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
cache = ObjectCache(Path(sys.argv[1]))
cache.put(sys.argv[2], bytes(100_000))
assert len(cache.notes) == 1 and "cannot be written" in cache.notes[0], cache.notes
assert cache.get(sys.argv[2]) is None
"""


def test_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    subprocess.run([sys.executable, "-c", _SHORT_OF_SPACE, str(folder), KEY], check=True)
    assert list(folder.iterdir()) == []


_WRITER = """
import hashlib, sys
from pathlib import Path
from codegen.cache_dir import ObjectCache
def payload(i): return hashlib.sha256(b"%d" % i).digest() * 2000
def key(i): return hashlib.sha256(b"key%d" % i).hexdigest()
cache = ObjectCache(Path(sys.argv[1]))
rounds = int(sys.argv[2])
while rounds:
    rounds -= 1
    for i in range(20):
        found = cache.get(key(i))
        assert found in (None, payload(i)), i
        if found is None or rounds % 2:
            cache.put(key(i), payload(i))
assert not cache.notes
"""


def _writer(folder: Path, rounds: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _WRITER, str(folder), str(rounds)])


def test_sixteen_processes_never_see_a_partial_entry(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    writers = [_writer(folder, rounds=6) for _ in range(16)]
    assert [writer.wait(60) for writer in writers] == [0] * 16
    assert len(list(folder.iterdir())) == 20


def test_killed_writers_leave_nothing_broken(tmp_path: Path) -> None:
    folder, rng = tmp_path / "c", random.Random(2)
    for _ in range(8):
        writer = _writer(folder, rounds=-1)
        while not folder.exists() or not any(folder.iterdir()):
            time.sleep(0.005)
        time.sleep(rng.uniform(0.05, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert _writer(folder, rounds=1).wait(60) == 0
    for left in folder.glob("*.tmp"):
        os.utime(left, (0, 0))
    ObjectCache(folder).prune()
    assert len(list(folder.iterdir())) == 20


def _fill(cache: ObjectCache, count: int, size: int) -> list[str]:
    """Entries 0..count-1, each used one second after the one before."""
    keys = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(count)]
    for i, key in enumerate(keys):
        cache.put(key, bytes(size))
        os.utime(cache.folder / f"{key}.obj", (i, i))
    return keys


def test_prune_drops_the_least_recently_used(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "c", max_bytes=20_000)
    keys = _fill(ObjectCache(cache.folder), 20, 1900)
    assert cache.get(keys[0]) is not None  # used now, so it is the youngest
    cache.prune()
    kept = [key for key in keys if cache.get(key) is not None]
    assert kept == [keys[0], *keys[-9:]]


def test_writing_keeps_the_size_near_the_cap(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "c", max_bytes=50_000)
    _fill(cache, 400, 1000)
    sizes = [path.stat().st_size for path in cache.folder.iterdir()]
    assert sum(sizes) < 3 * cache.max_bytes
    cache.prune()
    assert len(list(cache.folder.iterdir())) == 46  # 1081 bytes each


def test_payload_above_the_cap_is_not_kept(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "c", max_bytes=100)
    cache.put(KEY, bytes(101))
    assert list(cache.folder.iterdir()) == []


def test_future_times_do_no_harm(cache: ObjectCache) -> None:
    path = _entry(cache)
    later = time.time() + 10**7
    os.utime(path, (later, later))
    cache.prune()
    assert cache.get(KEY) == PAYLOAD


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "c", max_bytes=10)
    (cache.folder / "README").write_text("x" * 100)
    (cache.folder / "young.tmp").write_text("being written")
    cache.prune()
    assert sorted(path.name for path in cache.folder.iterdir()) == ["README", "young.tmp"]


def test_start_is_fast_in_a_full_folder(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    ObjectCache(folder).put(KEY, PAYLOAD)
    for i in range(20_000):
        (folder / f"{i:064x}.obj").touch()
    best = 1.0
    for _ in range(3):
        start = time.perf_counter()
        assert ObjectCache(folder).get(KEY) == PAYLOAD
        best = min(best, time.perf_counter() - start)
    assert best < 0.05
