"""The GGUF reader on good files, and on files made to hurt it (each refused in one line, < 1 s)."""

from __future__ import annotations

import os
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlacli.errors import ModelError
from mlacli.gguf.parse import MAX_ARRAY_LENGTH, MAX_KEYS, MAX_STRING_BYTES, MAX_TENSORS
from mlacli.gguf.problem import LINE_LIMIT
from mlacli.gguf.reader import GGUFFile, open_gguf
from tests.conftest import TinyModel
from tests.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U32,
    U64,
    RawTensor,
    array,
    encoded,
    header,
    key,
    padded,
    text,
    u32,
    u64,
    with_data,
)

T = RawTensor
BIG = 2**64 - 1
ALIGN = "general.alignment"


def nested(depth: int) -> bytes:
    return key("deep", ARRAY, array(ARRAY, 1) * depth + array(U8, 0))


# name -> (file, words that the message must contain)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "G01 empty": (b"", "empty"),
    "G02 three bytes": (b"GGU", "magic not a GGUF file"),
    "G03 magic only": (b"GGUF", "version ends inside"),
    "G04 wrong magic": (b"ABCDEFGH" * 8, "magic not a GGUF file got ABCD"),
    "G04 old GGML": (b"tjgg" + bytes(60), "old GGML"),
    "G04 safetensors": (u64(64) + b'{"a":1}' + bytes(60), "safetensors"),
    "G04 zip": (b"PK\x03\x04" + bytes(60), "zip"),
    "G04 HTML": (b"<!DOCTYPE html><html>" + bytes(60), "HTML"),
    "G04 LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
    "G05 version 0": (header(version=0), "version got 0"),
    "G06 version 1": (header(version=1), "version got 1"),
    "G07 version 99": (header(version=99), "version got 99"),
    "G08 big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "G09 header cut": (header()[:20], "n_kv ends inside"),
    "G10 n_kv 2^63": (header(n_keys=2**63), "n_kv too many 9223372036854775808 65536"),
    "G11 n_kv 2^64-1": (header(n_keys=BIG), "n_kv too many"),
    "G12 n_tensors 2^64-1": (header(n_tensors=BIG), "n_tensors too many"),
    "G13 n_kv 10^9": (header(n_keys=10**9) + bytes(4096), "n_kv too many"),
    "G13 n_kv over the file": (header(n_keys=60000) + bytes(4096), "n_kv rest of the file"),
    "G14 n_tensors 10^9": (header(n_tensors=10**9) + bytes(4096), "n_tensors too many"),
    "G14 n_tensors over the file": (header(n_tensors=60000) + bytes(4096), "n_tensors rest"),
    "G15 key length 2^64-1": (header([text(b"k" * 20, BIG)]), "metadata key 0 too long"),
    "G16 key length 2^63-1": (header([text(b"k" * 20, 2**63 - 1)]), "metadata key 0 too long"),
    "G17 key past the end": (header([text(b"k" * 20, 999)]), "metadata key 0 ends inside 999"),
    "G18 empty key": (header([encoded("", 1)]), "metadata key 0 empty"),
    "G19 key not UTF-8": (header([key(b"a\xffb", U32, u32(1))]), r"metadata key 0 a\xffb"),
    "G20 NUL in key": (header([encoded("a\0b", 1)]), r"metadata key 0 control a\x00b"),
    "G21 duplicate key": (header([encoded("twice", 1)] * 2), "twice occurs twice"),
    "G22 unknown type": (header([key("odd", 13, bytes(64))]), "odd unknown value type got 13"),
    "G23 value cut": (header([key("cut", U64, bytes(4))]), "cut ends inside"),
    "G24 string 2^62": (header([key("long", STRING, text(b"abc", 2**62))]), "long too long"),
    "G24 string past the end": (header([key("long", STRING, text(b"abc", 4000))]), "long ends"),
    "G25 value not UTF-8": (header([key("bad", STRING, text(b"a\xff"))]), r"bad UTF-8 a\xff"),
    "G26 u8 array 2^64-1": (header([key("arr", ARRAY, array(U8, BIG))]), "arr too many"),
    "G27 u8 array 10^9": (header([key("arr", ARRAY, array(U8, 10**9))]), "arr too many"),
    "G27 u8 array past the end": (header([key("arr", ARRAY, array(U8, 9999))]), "arr rest"),
    "G28 string array 10^9": (header([key("arr", ARRAY, array(STRING, 10**9))]), "arr too many"),
    "G28 string array past the end": (
        header([key("arr", ARRAY, array(STRING, 3, text("a") + text("b", 700) + bytes(8)))]),
        "arr ends inside",
    ),
    "G28 last string past the end": (
        header([key("arr", ARRAY, array(STRING, 1, text("ab", 700)))]),
        "arr ends inside",
    ),
    "G28 element too long": (
        header([key("arr", ARRAY, array(STRING, 1, text("ab", 2**40)))]),
        "arr element too long",
    ),
    "G29 element type": (header([key("arr", ARRAY, array(77, 1, bytes(64)))]), "arr element 77"),
    "G30 nested 10": (header([nested(10)]), "deep nested"),
    "G31 nested 5,000": (header([nested(5000)]), "deep nested"),
    "G32 nested 100,000": (header([nested(100_000)]), "deep nested"),
    "G33 10^9 empty arrays": (header([key("deep", ARRAY, array(ARRAY, 10**9))]), "deep nested"),
    "G34 bool 7": (header([key("flag", BOOL, b"\x07")]), "flag bool got 7"),
    "G34 bool array": (header([key("flags", ARRAY, array(BOOL, 3, b"\0\1\2"))]), "flags bool 2"),
    "G35 alignment 0": (with_data([encoded(ALIGN, 0)], [T()]), f"{ALIGN} range 0"),
    "G36 alignment 3": (with_data([encoded(ALIGN, 24)], [T()]), f"{ALIGN} power of two 24"),
    "G37 alignment 2^31": (with_data([encoded(ALIGN, 2**31)], [T()]), f"{ALIGN} 1048576"),
    "G38 alignment type": (with_data([encoded(ALIGN, "32")], [T()]), f"{ALIGN} wrong type string"),
    "G38 alignment u64": (with_data([key(ALIGN, U64, u64(32))], [T()]), f"{ALIGN} wrong type u64"),
    "G39 alignment 1": (with_data([encoded(ALIGN, 1)], [T()]), f"{ALIGN} range 1 8"),
    "G40 n_dims 2^32-1": (with_data([], [T(n_dims=2**32 - 1)]), "t dimensions 4294967295 1..4"),
    "G41 n_dims 5": (with_data([], [T(shape=(1,) * 5)]), "t dimensions 5"),
    "G42 n_dims 100": (with_data([], [T(shape=(1,) * 100)]), "t dimensions 100"),
    "G43 n_dims 0": (with_data([], [T(shape=())]), "t dimensions 0"),
    "G44 zero dimension": (with_data([], [T(shape=(32, 0))]), "t dimension zero 0"),
    "G45 negative dimension": (with_data([], [T(shape=(BIG, 2))]), "t dimension negative"),
    "G46 product wraps to 0": (with_data([], [T(shape=(2**32, 2**32))]), "t past the end"),
    "G47 product wraps to 32": (with_data([], [T(shape=(2**59 + 1, 32))]), "t past the end"),
    "G48 2^40 elements": (with_data([], [T(shape=(2**20, 2**20))]), "t past the end 4398046511104"),
    "G49 bytes wrap": (with_data([], [T(shape=(2**62,))]), "t past the end"),
    "G50 type 9999": (with_data([], [T(type=9999)]), "t unknown tensor type 9999"),
    "G50 ik type": (with_data([], [T(type=139)]), "t unknown tensor type ik_llama.cpp 139"),
    "G51 removed type 4": (with_data([], [T(type=4)]), "t unknown tensor type 4"),
    "G52 row not blocks": (with_data([], [T(shape=(33,), type=8)]), "t Q8_0 33 32"),
    "G53 total is blocks": (with_data([], [T(shape=(16, 2), type=8)]), "t Q8_0 16 32"),
    "G53 k-quant row": (with_data([], [T(shape=(128,), type=12)]), "t Q4_K 128 256"),
    "G54 offset past the end": (with_data([], [T(offset=2**20)]), "t past the end"),
    "G55 offset wraps to header": (with_data([], [T(offset=2**64 - 64)]), "t past the end"),
    "G56 offset wraps to data": (
        with_data([], [T("a"), T("b", offset=2**64 - 32)]),
        "b past the end",
    ),
    "G57 unaligned": (with_data([], [T(offset=4)], 256), "t not aligned 4 32"),
    "G58 overlap by half": (
        with_data([], [T("a"), T("b", offset=64)], 512),
        "b overlaps a",
    ),
    "G59 same offset": (with_data([], [T("a"), T("b")], 512), "b overlaps a"),
    "G60 duplicate tensor": (
        with_data([], [T("a"), T("a", offset=128)], 512),
        "a occurs twice",
    ),
    "G61 empty name": (with_data([], [T("")]), "tensor 0 empty"),
    "G62 name of 64 bytes": (with_data([], [T("n" * 64)]), "tensor 0 too long 64 bytes 63"),
    "G63 name of 1 MB": (with_data([], [T("n" * 2**20)]), "tensor 0 too long 63"),
    "G64 name not UTF-8": (with_data([], [T(b"a\xc3(")]), r"tensor 0 UTF-8 a\xc3("),
    "G65 escapes in name": (
        with_data([], [T("a\x1b[31mred\u202e")]),
        r"tensor 0 control a\x1b[31mred\u202e",
    ),
    "G66 data missing": (header([], [T()]), "t past the end"),
    "G67 data short by 1 byte": (with_data([], [T()])[:-1], "t past the end"),
    "G68 info cut": (header([], [T(shape=(32, 1, 1, 1))])[:-6], "t: ends inside"),
    "G70 300,000 keys": (
        header([encoded(f"key.{i:06d}", i) for i in range(300_000)]),
        "n_kv too many 300000 65536",
    ),
    "G73 200,000 tensors": (
        header([], [T(f"tensor.{i:06d}") for i in range(200_000)]),
        "n_tensors too many 200000 65536",
    ),
}


def refused(path: Path, words: str) -> str:
    """The one line that `path` is refused with, which must contain all of `words`."""
    start = time.thread_time()
    with pytest.raises(ModelError) as caught:
        open_gguf(path)
    assert time.thread_time() - start < 1.0
    line = str(caught.value)
    assert len(line) <= LINE_LIMIT and line.isprintable(), line
    for word in words.split():
        assert word in line.partition(": ")[2], f"{word!r} is not in {line!r}"
    return line


def write(folder: Path, data: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, words = HOSTILE[case]
    line = refused(write(tmp_path, data), words)
    assert "model.gguf: " in line


def test_line_has_the_form_of_the_contract(tmp_path: Path) -> None:
    path = write(tmp_path, header(n_keys=10**9))
    assert refused(path, "n_kv").endswith(
        "model.gguf: n_kv: too many (got 1000000000, limit 65536)"
    )


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("x" * 65_000, b"\xff" * 1000, "..."),
        ("\u202e" + "k" * 100, b"v", r"\u202e"),
    ],
)
def test_long_and_wild_fields_stay_within_the_line(
    field: str, value: bytes, words: str, tmp_path: Path
) -> None:
    refused(write(tmp_path, header([key(field, STRING, text(value))] * 2)), words)


def test_opening_allocates_little_for_what_a_file_only_declares(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for case in (
            "G10 n_kv 2^63",
            "G14 n_tensors 10^9",
            "G26 u8 array 2^64-1",
            "G24 string 2^62",
        ):
            refused(write(tmp_path, HOSTILE[case][0]), "")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


# Legal files


def opened(folder: Path, data: bytes) -> GGUFFile:
    path = write(folder, data)
    start = time.thread_time()
    file = open_gguf(path)
    assert time.thread_time() - start < 2.0
    return file


def test_values_of_every_type(tmp_path: Path) -> None:
    payloads = {
        "u8": (0, "<B", 255),
        "i8": (1, "<b", -3),
        "u16": (2, "<H", 65535),
        "i16": (3, "<h", -300),
        "u32": (4, "<I", 2**32 - 1),
        "i32": (5, "<i", -(2**31)),
        "f32": (6, "<f", 0.5),
        "u64": (10, "<Q", BIG),
        "i64": (11, "<q", -(2**63)),
        "f64": (12, "<d", 1e300),
        "bool": (7, "<?", True),
    }
    keys = [key(n, t, struct.pack(code, value)) for n, (t, code, value) in payloads.items()]
    keys += [
        key(n + ".list", ARRAY, array(t, 2, struct.pack(code, value) * 2))
        for n, (t, code, value) in payloads.items()
    ]
    keys += [encoded("text", "grün"), key("empty", ARRAY, array(STRING, 0))]
    keys += [key("texts", ARRAY, array(STRING, 3, text("a") + text("") + text("ü")))]
    metadata = opened(tmp_path, header(keys)).metadata
    for name, (_, _, value) in payloads.items():
        assert metadata[name] == value and metadata.type_name(name) == name
        assert metadata[name + ".list"].tolist() == [value, value]
        assert metadata.type_name(name + ".list") == f"array of {name}"
    assert metadata["text"] == "grün"
    assert metadata["texts"] == metadata.strings("texts") == ["a", "", "ü"]
    assert metadata["empty"] == [] and metadata.count("texts") == 3
    assert len(metadata) == len(keys) and "absent" not in metadata


def test_typed_getters_name_file_key_and_type(tmp_path: Path) -> None:
    keys = [encoded("n", 7), encoded("x", 1.5), encoded("s", "t"), encoded("b", True)]
    keys += [
        encoded("list", [1, 2]),
        key("bad", ARRAY, array(STRING, 2, text("a") + text(b"\xff"))),
    ]
    metadata = opened(tmp_path, header(keys)).metadata
    assert (metadata.integer("n"), metadata.number("n"), metadata.number("x")) == (7, 7.0, 1.5)
    assert metadata.text("s") == "t" and metadata.flag("b") is True
    assert metadata.integer("absent", 3) == 3 and metadata.text("absent", "d") == "d"
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: metadata.integer("absent"), "absent: missing"),
        (lambda: metadata.integer("s"), "s: has the wrong type (got string, limit an integer)"),
        (lambda: metadata.integer("b"), "b: has the wrong type (got bool"),
        (lambda: metadata.integer("x"), "x: has the wrong type (got f32"),
        (lambda: metadata.integer("n", high=6), "n: out of range (got 7, limit 0..6)"),
        (lambda: metadata.number("s"), "limit a number"),
        (lambda: metadata.flag("n"), "limit a bool"),
        (lambda: metadata.text("n"), "limit a string"),
        (lambda: metadata.text("list"), "got array of i32"),
        (lambda: metadata.strings("n"), "limit an array)"),
        (lambda: metadata.strings("list"), "limit an array of strings"),
        (lambda: metadata.numbers("bad"), "limit an array of numbers"),
        (lambda: metadata.numbers("absent"), "absent: missing"),
        (lambda: metadata.strings("bad"), r"bad: element 1 is not UTF-8 (got \xff)"),
    ]
    for get, words in wrong:
        with pytest.raises(ModelError) as caught:
            get()
        assert words in str(caught.value) and "model.gguf: " in str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
def test_tensor_data_is_a_view_of_the_file(version: int, tmp_path: Path) -> None:
    values = np.arange(96, dtype=np.float32)
    tensors = [T("a", (32,)), T("b", (32, 2), offset=128)]
    file = opened(tmp_path, padded(header([], tensors, version=version)) + values.tobytes())
    assert file.data("b").view(np.float32).tolist() == values[32:].tolist()
    assert not file.data("b").flags.writeable and not file.data("b").flags.owndata
    assert file.address("b") == file.data("b").ctypes.data
    assert file.address("b") - file.address("a") == 128
    info = file.tensors["b"]
    assert (info.shape, info.type_name, info.nbytes) == ((32, 2), "F32", 256)
    assert (info.n_rows, info.row_bytes) == (2, 128)
    assert file.size_bytes == file.path.stat().st_size and file.notes == ()
    assert file.files[0].header.size == info.offset - 128


def test_trailing_bytes_are_noted(tmp_path: Path) -> None:  # G69
    file = opened(tmp_path, with_data([], [T()]) + b"tail")
    assert [note.rpartition(": ")[2] for note in file.notes] == ["4 bytes after the last tensor"]


def test_last_padding_may_be_absent_and_order_is_free(tmp_path: Path) -> None:
    tensors = [T("b", (33,), offset=128), T("a", (32,))]
    file = opened(tmp_path, padded(header([], tensors)) + bytes(128 + 132))
    assert file.notes == () and set(file.tensors) == {"a", "b"}


def test_keys_named_like_the_header_do_not_collide(tmp_path: Path) -> None:  # G74
    keys = [encoded("GGUF.version", 7), encoded("GGUF.tensor_count", 9)]
    assert opened(tmp_path, header(keys)).metadata["GGUF.version"] == 7


def test_types_that_cannot_run_are_listed(tmp_path: Path) -> None:
    file = opened(tmp_path, with_data([], [T("q", (256,), type=12)], 160))
    assert (file.tensors["q"].type_name, file.tensors["q"].nbytes) == ("Q4_K", 144)


@pytest.mark.parametrize("alignment", [8, 2**20])
def test_alignments_at_the_cap(alignment: int, tmp_path: Path) -> None:
    data = padded(header([encoded(ALIGN, alignment)], [T()]), alignment) + bytes(128)
    assert opened(tmp_path, data).tensors["t"].offset % alignment == 0
    refused(write(tmp_path, header([encoded(ALIGN, 2**21)], [])), ALIGN)
    refused(write(tmp_path, header([encoded(ALIGN, 4)], [])), ALIGN)


def test_names_at_the_cap(tmp_path: Path) -> None:
    file = opened(tmp_path, with_data([encoded("k" * 65_535, 1)], [T("n" * 63, (2, 2, 2, 4))]))
    assert list(file.tensors) == ["n" * 63] and list(file.metadata) == ["k" * 65_535]
    refused(write(tmp_path, header([encoded("k" * 65_536, 1)])), "metadata key 0 too long 65535")


def test_strings_at_the_cap(tmp_path: Path) -> None:
    fits = "s" * MAX_STRING_BYTES
    assert opened(tmp_path, header([encoded("s", fits)])).metadata["s"] == fits
    refused(write(tmp_path, header([encoded("s", fits + "s")])), "s: too long 16777216")
    template = "tokenizer.chat_template"
    assert opened(tmp_path, header([encoded(template, "t" * 2**20)])).metadata.count(template) == 1
    refused(write(tmp_path, header([encoded(template, "t" * (2**20 + 1))])), f"{template} 1048576")


def test_arrays_at_the_cap(tmp_path: Path) -> None:
    arrays = [key("a", ARRAY, array(U8, MAX_ARRAY_LENGTH, bytes(MAX_ARRAY_LENGTH)))]
    assert opened(tmp_path, header(arrays)).metadata.count("a") == 2**24
    n = MAX_ARRAY_LENGTH + 1
    refused(write(tmp_path, header([key("a", ARRAY, array(U8, n, bytes(n)))])), "a too many")


def test_counts_at_the_cap(tmp_path: Path) -> None:
    keys = [encoded(f"key.{i}", i) for i in range(MAX_KEYS)]
    tensors = [T(f"t{i}", (8,), offset=32 * i) for i in range(MAX_TENSORS)]
    file = opened(tmp_path, header(keys))
    assert file.metadata["key.65535"] == 65535
    file = opened(tmp_path, padded(header([], tensors)) + bytes(32 * MAX_TENSORS))
    assert len(file.tensors) == MAX_TENSORS
    refused(write(tmp_path, header([*keys, encoded("more", 1)])), "n_kv too many 65537")
    refused(write(tmp_path, header([], [*tensors, T("more")])), "n_tensors too many 65537")


def test_whole_metadata_at_the_cap(tmp_path: Path) -> None:
    """Arrays of 16 MiB in a file of holes: 15 fit into 256 MiB, 16 do not."""
    path = tmp_path / "large.gguf"
    for n_arrays in (15, 16):
        with path.open("wb") as out:
            out.write(header(n_keys=n_arrays))
            for i in range(n_arrays):
                out.write(key(f"a{i}", ARRAY, array(U8, MAX_ARRAY_LENGTH)))
                out.seek(MAX_ARRAY_LENGTH, os.SEEK_CUR)
            out.truncate(out.tell())
        if n_arrays == 15:
            assert len(open_gguf(path).metadata) == 15
        else:
            refused(path, "a15 header too large 268435456")


def test_large_but_legal_arrays(tmp_path: Path) -> None:  # G71, G72
    tracemalloc.start()
    try:
        data = header([key("bytes", ARRAY, array(U8, 2_000_000, bytes(2_000_000)))])
        assert open_gguf(write(tmp_path, data)).metadata["bytes"].size == 2_000_000
        data = header([key("empty", ARRAY, array(STRING, 1_000_000, bytes(8_000_000)))])
        path = write(tmp_path, data)
        del data
        tracemalloc.reset_peak()
        assert open_gguf(path).metadata.count("empty") == 1_000_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    start = time.thread_time()
    assert open_gguf(path).metadata.strings("empty")[-1] == ""
    assert time.thread_time() - start < 1.0


def test_v3_sized_header_opens_in_time(tiny_model: TinyModel) -> None:
    path = tiny_model("v3", "IQ4_NL", "joint", sparse=True)
    start = time.thread_time()
    file = open_gguf(path)
    opened_in = time.thread_time() - start
    tokens = file.metadata.strings("tokenizer.ggml.tokens")
    merges = file.metadata.strings("tokenizer.ggml.merges")
    total = time.thread_time() - start
    assert len(file.tensors) == 1025 and len(tokens) == 129280 and merges[0]
    assert opened_in < 0.3 and total < 0.3
    assert path.stat().st_blocks * 512 < 2**24, "the model's data should be a hole"


@pytest.mark.parametrize("kv_b", ["joint", "both", "split"])
def test_agrees_with_ggufs_reader(kv_b: str, tiny_model: TinyModel) -> None:
    path = tiny_model("tiny-odd", "IQ4_NL", kv_b)
    theirs, ours = gguf.GGUFReader(path), open_gguf(path)
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape.tolist()) and info.offset == tensor.data_offset
        assert info.type_name == tensor.tensor_type.name
        np.testing.assert_array_equal(ours.data(tensor.name), tensor.data.view(np.uint8).ravel())
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            value, expected = ours.metadata[name], field.contents()
            assert (list(value) if isinstance(expected, list) else value) == expected, name


# Paths


def test_paths_that_are_no_files(tmp_path: Path) -> None:  # P05
    refused(tmp_path / "absent.gguf", "file opened No such file")
    refused(tmp_path, "directory")
    refused(Path("/dev/zero"), "not a regular file")
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    refused(fifo, "not a regular file")
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    refused(loop, "opened symbolic links")
    refused(Path("nul\0.gguf"), "opened null")
    refused(Path("n" * 300), "opened long")


def test_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # socket paths are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.gguf")
        refused(Path("s.gguf"), "opened")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path, header())
    path.chmod(0)
    refused(path, "Permission denied")


def test_wild_file_name_is_escaped(tmp_path: Path) -> None:  # P06
    line = refused(write(tmp_path, b"", "a\nb\x1b[31m.gguf"), "")
    assert r"a\x0ab\x1b[31m.gguf" in line


# Split models


def shard(index: int, count: int, *tensors: RawTensor, **changes: int | str) -> bytes:
    keys: dict[str, int | str] = {"split.no": index, "split.count": count}
    if index == 0:
        keys |= {"general.architecture": "deepseek2", "split.tensors.count": 3}
    keys |= changes
    return with_data([encoded(name, value) for name, value in keys.items()], tensors)


def split_model(folder: Path, shards: list[bytes], stem: str = "m") -> list[Path]:
    n = len(shards)
    return [
        write(folder, data, f"{stem}-{i + 1:05d}-of-{n:05d}.gguf") for i, data in enumerate(shards)
    ]


def three_shards() -> list[bytes]:
    return [shard(i, 3, T(name)) for i, name in enumerate("abc")]


def test_split_model_opens_as_one(tmp_path: Path) -> None:
    shards = [data[:-128] + bytes([i]) * 128 for i, data in enumerate(three_shards())]
    paths = split_model(tmp_path, shards)
    file = open_gguf(paths[0])
    assert [(t.name, t.file_index) for t in file.tensors.values()] == [("a", 0), ("b", 1), ("c", 2)]
    assert [file.data(name)[0] for name in "abc"] == [0, 1, 2]
    assert file.data("c").ctypes.data == file.address("c")
    assert file.size_bytes == sum(p.stat().st_size for p in paths)
    assert [f.path for f in file.files] == paths


def test_split_made_by_ggufs_writer(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "deepseek2", split_max_tensors=1)
    for i in range(3):
        writer.add_tensor(f"t{i}", np.full(32, i, np.float32))
    writer.write_header_to_file(tmp_path / "w.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "w-00001-of-00003.gguf")
    assert [file.data(f"t{i}").view(np.float32)[5] for i in range(3)] == [0, 1, 2]


def test_shard_missing_duplicated_or_misnumbered(tmp_path: Path) -> None:  # P01
    paths = split_model(tmp_path, three_shards())
    paths[1].write_bytes(paths[2].read_bytes())
    refused(paths[0], "split.no another shard's number got 2 1")
    paths[1].unlink()
    assert "m-00002-of-00003.gguf" in refused(paths[0], "opened No such file")
    paths[0].write_bytes(shard(1, 3, T("a")))
    refused(paths[0], "split.no got 1 0")


@pytest.mark.parametrize("count", [0, 2, 1025, 65_535])
def test_split_count_that_cannot_be(count: int, tmp_path: Path) -> None:
    paths = split_model(tmp_path, [shard(0, count, T("a")), *three_shards()[1:]])
    refused(paths[0], f"split.count {count}" if count != 2 else "split.count file name")


def test_split_count_needs_the_shard_name(tmp_path: Path) -> None:
    refused(write(tmp_path, shard(0, 3, T("a"))), "split.count NAME-00001-of-00003.gguf")


def test_merged_file_keeps_a_split_count_of_0(tmp_path: Path) -> None:
    assert set(opened(tmp_path, shard(0, 0, T("a"))).tensors) == {"a"}
    assert set(opened(tmp_path, shard(0, 1, T("a"))).tensors) == {"a"}


def test_total_of_tensors(tmp_path: Path) -> None:  # P02
    shards = three_shards()
    shards[0] = shard(0, 3, T("a"), **{"split.tensors.count": 4})
    refused(split_model(tmp_path, shards)[0], "split.tensors.count got 3 4")


def test_shards_of_two_models(tmp_path: Path) -> None:  # P03
    shards = three_shards()
    shards[2] = shard(2, 3, T("a"))
    refused(split_model(tmp_path, shards)[0], "a: earlier shard")
    shards[2] = shard(2, 3, T("c"), **{"general.architecture": "llama"})
    refused(split_model(tmp_path, shards)[0], "general.architecture another model llama deepseek2")
    shards[2] = shard(2, 4, T("c"))
    refused(split_model(tmp_path, shards)[0], "split.count another model 4 3")


def test_first_argument_is_shard_2(tmp_path: Path) -> None:  # P04
    refused(split_model(tmp_path, three_shards())[1], "split.no shard 2 of 3 m-00001-of-00003.gguf")


def test_the_most_shards(tmp_path: Path) -> None:
    shards = [
        with_data([encoded("split.no", i), encoded("split.count", 1024)], [T(f"t{i}")])
        for i in range(1024)
    ]
    assert len(open_gguf(split_model(tmp_path, shards)[0]).files) == 1024


# Mutations

BASE = with_data(
    [
        encoded("general.architecture", "deepseek2"),
        encoded(ALIGN, 32),
        encoded("deepseek2.block_count", 2),
        key("eps", F32, struct.pack("<f", 1e-6)),
        encoded("flag", True),
        key("tokens", ARRAY, array(STRING, 4, text("a") + text("bc") + text("") + text("ü"))),
        encoded("types", [1, 2, 3]),
    ],
    [T("one", (32,)), T("two", (32, 2), 8, 128), T("three", (8, 2, 2), 1, 224)],
    n_bytes=288,
)
INTERESTING = [0, 1, 2**7, 2**8 - 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, BIG]
EDITS = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, len(BASE) - 1), st.integers(0, 255)),
    st.tuples(st.just("word"), st.integers(0, len(BASE) - 8), st.sampled_from(INTERESTING)),
    st.tuples(st.just("cut"), st.integers(0, len(BASE)), st.just(0)),
    st.tuples(st.just("insert"), st.integers(0, len(BASE)), st.integers(1, 64)),
    st.tuples(st.just("delete"), st.integers(0, len(BASE)), st.integers(1, 64)),
)


def mutated(edits: list[tuple[str, int, int]]) -> bytes:
    data = bytearray(BASE)
    for kind, at, value in edits:
        if kind == "byte":
            data[at : at + 1] = bytes([value])
        elif kind == "word":
            data[at : at + 8] = u64(value)
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = bytes(value)
        else:
            del data[at : at + value]
    return bytes(data)


def use_everything(file: GGUFFile) -> None:
    for name, tensor in file.tensors.items():
        assert file.files[0].data_start <= tensor.offset
        assert file.data(name).size == tensor.nbytes
        int(file.data(name).sum())
    for name in file.metadata:
        file.metadata.type_name(name)
        assert file.metadata[name] is not None


@settings(max_examples=800, derandomize=True, deadline=5000, database=None)
@given(st.lists(EDITS, min_size=1, max_size=4))
def test_mutated_files_open_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[str, int, int]]
) -> None:
    path = write(tmp_path_factory.getbasetemp(), mutated(edits), "mutated.gguf")
    try:
        use_everything(open_gguf(path))
    except ModelError as problem:
        line = str(problem)
        assert len(line) <= LINE_LIMIT and line.isprintable() and "mutated.gguf: " in line


def test_the_base_of_the_mutations_is_legal(tmp_path: Path) -> None:
    file = opened(tmp_path, BASE)
    use_everything(file)
    assert len(file.tensors) == 3 and file.notes == ()
