"""--check-tensors: exactly the blocks that decode to NaN or Inf are found, in every format."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from codegen.formats import CACHE_FORMATS, WEIGHT_FORMATS, BlockFormat
from mlacli.__main__ import main
from mlacli.gguf.finite import check_values, find_bad, wrong_blocks
from mlacli.gguf.quants import dequantise
from mlacli.gguf.reader import open_gguf
from tests.conftest import TinyModel

FORMATS = {f.name: f for f in (*WEIGHT_FORMATS.values(), *CACHE_FORMATS.values()) if not f.header}
N_ROWS, PER_ROW = 7, 3


@pytest.mark.parametrize("name", FORMATS)
def test_against_the_decoder(name: str) -> None:
    """Random bytes: about one scale in thirty is NaN or Inf (and one float in 500)."""
    fmt, rng = FORMATS[name], np.random.default_rng(1)
    per_row = PER_ROW if fmt.size > 1 else 64
    n = per_row * fmt.size
    found = 0
    for _ in range(40):
        rows = rng.integers(0, 256, (N_ROWS, fmt.row_bytes(n)), np.uint8)
        wrong = wrong_blocks(rows, fmt, per_row)
        finite = np.isfinite(decoded(rows, fmt, n)).reshape(-1, fmt.size).all(axis=1)
        np.testing.assert_array_equal(wrong, ~finite)
        found += int(wrong.sum())
    assert 0 < found < 40 * N_ROWS * per_row


def decoded(rows: Any, fmt: BlockFormat, n: int) -> Any:
    with np.errstate(all="ignore"):
        try:
            kind = gguf.GGMLQuantizationType(fmt.ggml_type)
        except ValueError:  # ik_llama.cpp's, which gguf does not know
            return dequantise(rows, fmt, n)
        return gguf.dequantize(rows, kind)


def test_a_sound_model(tiny_model: TinyModel) -> None:
    file = open_gguf(tiny_model("tiny-odd", "IQ4_NL"))
    assert all(find_bad(file, tensor) is None for tensor in file.tensors.values())
    assert "no NaN or Inf in" in check_values(file, 2)


@pytest.mark.parametrize("flags", ["", "--no-mmap", "-rtr", "-vq"])
def test_the_command(flags: str, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_model("tiny-odd", "IQ4_NL")
    path = source.with_name("bad.gguf")
    data, file = bytearray(source.read_bytes()), open_gguf(source)
    for name, blocks, scale in (
        ("blk.1.ffn_down_exps.weight", (5, 9), b"\x00\x7c"),  # f16 infinity
        ("blk.2.attn_norm.weight", (3,), b"\x00\x00\xc0\x7f"),  # f32 NaN
    ):
        tensor = file.tensors[name]
        block = 18 if tensor.type_name == "IQ4_NL" else 4
        for number in blocks:
            start = tensor.offset + number * block
            data[start : start + len(scale)] = scale
    path.write_bytes(data)
    line = f"run -m {path} -p x -n 1 --check-tensors {flags}"
    assert main(line.split()) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"error: {path}: 2 tensors with NaN or Inf: blk.1.ffn_down_exps.weight "
        f"(2 of {file.tensors['blk.1.ffn_down_exps.weight'].n_rows * 3} blocks, first 5), "
        "blk.2.attn_norm.weight (1 of 320 blocks, first 3)\n"
    )
