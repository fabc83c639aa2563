"""Saved sessions: the same continuation in every mode, and no damaged or foreign file accepted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen.formats import CACHE_FORMATS, LATENT_CACHE_TYPES
from mlacli.engine import Engine
from mlacli.errors import SessionError, SpaceError
from mlacli.session_file import MAGIC, load_session, save_session
from tests.conftest import TinyModel
from tests.engines import make_engine

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


def filled(path: Path, **flags: Any) -> Engine:
    engine = make_engine(path, **flags)
    engine.eval(TOKENS, range(len(TOKENS)))
    return engine


def continuation(engine: Engine) -> list[bytes]:
    start = len(TOKENS)
    return [engine.eval([t], [start + i])[-1].tobytes() for i, t in enumerate((7, 11, 2))]


def modes() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for mla in (0, 1, 2, 3):
        types = LATENT_CACHE_TYPES if mla else tuple(CACHE_FORMATS)
        found += [{"mla": mla, "type_k": t} for t in types]
        found += [{"mla": mla, "flash_attn": False, "type_k": t} for t in ("f32", "f16", "q8_0")]
    found += [{"mla": 0, "type_v": t} for t in CACHE_FORMATS]
    return found


@pytest.mark.parametrize("flags", modes(), ids=str)
def test_a_restored_session_goes_on_bit_for_bit(
    flags: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    engine = filled(tiny_model("tiny-odd"), **flags)
    size = save_session(path, engine, TOKENS)
    assert size == path.stat().st_size and path.stat().st_mode & 0o777 == 0o600
    expected = continuation(engine)
    fresh = make_engine(tiny_model("tiny-odd"), n_ctx=512, **flags)
    assert load_session(path, fresh) == TOKENS
    assert continuation(fresh) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_no_file_is_no_session(tiny_model: TinyModel, tmp_path: Path) -> None:
    assert load_session(tmp_path / "none", make_engine(tiny_model("tiny-odd"))) is None


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"type_k": "q8_0"}, r"belongs to -ctk F16, not Q8_0$"),
        ({"mla": 1}, r"belongs to -mla 3, not 1$"),
        ({"flash_attn": False}, r"belongs to -fa True, not False$"),
        ({"ser": (1, 0.5)}, r"belongs to -ser None, not 1, 0\.5$"),
    ],
)
def test_a_session_of_other_settings(
    flags: dict[str, Any], line: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    save_session(tmp_path / "s", filled(tiny_model("tiny-odd")), TOKENS)
    with pytest.raises(SessionError, match=line):
        load_session(tmp_path / "s", make_engine(tiny_model("tiny-odd"), **flags))


def test_a_session_of_another_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    save_session(tmp_path / "s", filled(tiny_model("tiny-odd")), TOKENS)
    data = bytearray(tiny_model("tiny-odd").read_bytes())
    data[-1] ^= 1
    other = tmp_path / "other.gguf"
    other.write_bytes(data)
    with pytest.raises(SessionError, match=r"belongs to the model another one$"):
        load_session(tmp_path / "s", make_engine(other))


def test_a_session_longer_than_the_context(tiny_model: TinyModel, tmp_path: Path) -> None:
    engine = make_engine(tiny_model("tiny-odd"), n_ctx=512)
    tokens = [n % 50 for n in range(300)]
    engine.eval(tokens, range(300))
    save_session(tmp_path / "s", engine, tokens)
    with pytest.raises(SessionError, match=r"n_tokens is 300 \(limit -c 256\)$"):
        load_session(tmp_path / "s", make_engine(tiny_model("tiny-odd")))


def test_damage_is_noticed(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "s"
    save_session(path, filled(tiny_model("tiny-odd")), TOKENS)
    data, engine = path.read_bytes(), make_engine(tiny_model("tiny-odd"))
    chance = random.Random(5)
    damaged = []
    for place in (chance.randrange(8 * len(data)) for _ in range(200)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    sizes = (0, 3, 4, 8, 12, 16, 100, len(data) // 2, len(data) - 1)
    damaged += [data[:n] for n in sizes] + [data + b"\0", b"x" * 100, b"\0" * len(data)]
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(SessionError) as caught:
            load_session(path, engine)
        line = str(caught.value)
        assert line.startswith(f"--prompt-cache: {path}: ") and len(line) < 400 and "\n" not in line
        assert engine.cache.n_used == 0
    path.write_bytes(data)
    assert load_session(path, engine) == TOKENS


def rewritten(data: bytes, change: Any) -> bytes:
    """A file with another header and tokens, its checksum made right again."""
    size = int.from_bytes(data[12:16], "little")
    header, rest = json.loads(data[16 : 16 + size]), bytearray(data[16 + size : -32])
    text = change(header, rest)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    body = data[:12] + len(text).to_bytes(4, "little") + text + bytes(rest)
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda h, r: h.update(n_tokens=2**32 - 1), r"n_tokens is 4294967295 \(limit -c 256\)$"),
        (lambda h, r: h.update(n_tokens=0), r"n_tokens is 0 \(limit -c 256\)$"),
        (lambda h, r: h.update(n_tokens=True), r"n_tokens is True \(limit -c 256\)$"),
        (lambda h, r: h.pop("n_cells"), r"n_cells is None \(limit -c 256\)$"),
        (lambda h, r: h.update(n_cells=14), r"bytes behind its header, not \d+$"),
        (lambda h, r: r.__setitem__(slice(0, 4), b"\xff" * 4), r"has token -1, outside"),
        (lambda h, r: r.__setitem__(slice(60, 64), b"\5\0\0\0"), r"positions are not those"),
        (lambda h, r: b"[" * 100_000, r"header that is not JSON$"),
        (lambda h, r: b'{"mla": NaN}', r"header that is not JSON$"),
        (lambda h, r: b'{"mla": 1, "mla": 1}', r"header that is not JSON$"),
        (lambda h, r: b"[]", r"header that is not an object$"),
        (lambda h, r: b"{}", r"belongs to the model another one$"),
    ],
)
def test_a_forged_file_is_refused(
    change: Any, line: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    save_session(path, filled(tiny_model("tiny-odd")), TOKENS)
    path.write_bytes(rewritten(path.read_bytes(), change))
    with pytest.raises(SessionError, match=line):
        load_session(path, make_engine(tiny_model("tiny-odd")))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "is empty$"),
        (b"ggsn\x0a\0\0\0" + b"\0" * 99, "is a session of llama.cpp, which mlacli cannot read$"),
        (b"GGUF" + b"\0" * 99, "is not a session of mlacli$"),
        (MAGIC + b"\1\0\0\0" + b"\0" * 99, r"has version 1 of the format \(known: 2\)$"),
        (MAGIC + b"\2\0\0\0" + b"\xff" * 99, r"has a header of 4294967295 bytes"),
    ],
)
def test_other_files(data: bytes, line: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(data)
    with pytest.raises(SessionError, match=line):
        load_session(path, make_engine(tiny_model("tiny-odd")))


def test_a_folder_is_no_session(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"Is a directory$"):
        load_session(tmp_path, make_engine(tiny_model("tiny-odd")))


@pytest.mark.parametrize("n", range(8))
def test_a_disk_that_fills_leaves_what_was_there(
    n: int, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call number n that touches the disk fails."""
    path, calls = tmp_path / "s", [0]
    path.write_bytes(b"old")
    engine = filled(tiny_model("tiny-odd"))

    def failing(real: Any) -> Any:
        def call(*words: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == n + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*words, **more)

        return call

    class Stream:
        def __init__(self, real: Any) -> None:
            self.real = real
            self.write, self.flush = failing(real.write), failing(real.flush)
            self.fileno, self.tell = real.fileno, real.tell

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: object) -> None:
            self.real.close()

    real_open, real_replace = os.fdopen, os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda *w: Stream(real_open(*w)))
        patch.setattr(os, "replace", failing(real_replace))
        with pytest.raises(SpaceError, match=f"^--prompt-cache: {path}: No space left on device$"):
            for _ in range(20):  # so that any number of calls is reached
                save_session(path, engine, TOKENS)
                path.write_bytes(b"old")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_folder_that_is_not_there(tiny_model: TinyModel, tmp_path: Path) -> None:
    engine = filled(tiny_model("tiny-odd"))
    with pytest.raises(SpaceError, match=r"No such file or directory$"):
        save_session(tmp_path / "none" / "s", engine, TOKENS)


def test_a_link_is_replaced_not_followed(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "s").symlink_to(tmp_path / "target")
    save_session(tmp_path / "s", filled(tiny_model("tiny-odd")), TOKENS)
    assert (tmp_path / "target").read_bytes() == b"mine" and not (tmp_path / "s").is_symlink()


def test_what_is_not_a_number_is_noticed_when_used(tiny_model: TinyModel, tmp_path: Path) -> None:
    """With a right checksum nothing can be said when it is loaded."""
    engine = filled(tiny_model("tiny-odd"), type_k="f32")
    engine.cache.parts("c", 0)[...] = 0xFF
    save_session(tmp_path / "s", engine, TOKENS)
    fresh = make_engine(tiny_model("tiny-odd"), type_k="f32")
    assert load_session(tmp_path / "s", fresh) == TOKENS
    assert not np.isfinite(fresh.eval([1], [len(TOKENS)])).all()
