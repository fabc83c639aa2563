"""mlacli tokenize: llama-tokenize's output for the same flags."""

from __future__ import annotations

import ast
import io
import re
import sys
from pathlib import Path

import pytest

from mlacli.__main__ import main
from mlacli.gguf.reader import open_gguf
from mlacli.settings import default_model
from mlacli.text.tokenizer import Tokenizer, tokenizer_data
from tests.conftest import TinyModel

Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture, *words: str) -> str:
    assert main(["tokenize", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def ids(capsys: Capture, *words: str) -> list[int]:
    found = ast.literal_eval(shown(capsys, "--ids", *words))
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_data(open_gguf(default_model()).metadata))


def test_a_line_for_each_token(capsys: Capture, tokenizer: Tokenizer) -> None:
    out = shown(capsys, "-p", "def f(x):\\n    return 2", "--log-disable")
    rows = re.findall(r"^ *(\d+) -> '(.*?)'$", out, re.M | re.S)
    assert "".join(piece for _, piece in rows) == "def f(x):\n    return 2"
    assert [int(token) for token, _ in rows] == ids(capsys, "-p", "def f(x):\\n    return 2")
    assert all(line.index(" -> ") == 6 for line in out.splitlines() if " -> " in line)
    assert tokenizer.decode(int(token) for token, _ in rows) == b"def f(x):\n    return 2"


def test_bytes_and_controls_are_escaped(capsys: Capture) -> None:
    out = shown(capsys, "-p", "€\x1b[2J\u202e")
    assert "'\\xe2'" in out and "\\x1b" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_the_count(capsys: Capture) -> None:
    found = ids(capsys, "-p", "one two")
    assert shown(capsys, "-p", "one two", "--ids", "--show-count") == (
        f"{found}\nTotal number of tokens: {len(found)}\n"
    )
    assert shown(capsys, "-p", "", "--ids") == "[]\n"


def test_escapes_are_read_in_p_only(tmp_path: Path, capsys: Capture, tokenizer: Tokenizer) -> None:
    path = tmp_path / "text"
    path.write_text("a\\tb\n")
    assert tokenizer.decode(ids(capsys, "-p", "a\\tb")) == b"a\tb"
    assert tokenizer.decode(ids(capsys, "-p", "a\\tb", "--no-escape")) == b"a\\tb"
    assert tokenizer.decode(ids(capsys, "-f", str(path))) == b"a\\tb\n"


def test_stdin(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    data = "ß\n\n".encode() + b"\xff"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert tokenizer.decode(ids(capsys, "--stdin")) == data


def test_control_tokens(capsys: Capture, tokenizer: Tokenizer) -> None:
    spelled = tokenizer.eos_text
    assert ids(capsys, "-p", spelled) == [tokenizer.eos]
    as_text = ids(capsys, "-p", spelled, "--no-parse-special")
    assert tokenizer.eos not in as_text and tokenizer.decode(as_text) == spelled.encode()


def test_bos(tiny_model: TinyModel, capsys: Capture) -> None:
    path = tiny_model("tiny-v3", "F16", sparse=True)
    data = tokenizer_data(open_gguf(path).metadata)
    assert data.add_bos
    with_bos, without = (
        ids(capsys, "-m", str(path), "-p", "hi", *more) for more in ([], ["--no-bos"])
    )
    assert with_bos == [data.bos, *without]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "tokenize: give one of -p TEXT, -f FILE and --stdin"),
        (["-p", "x", "--stdin"], "tokenize: give one of -p TEXT, -f FILE and --stdin"),
        (["-f", "missing"], "-f: missing: No such file or directory"),
    ],
)
def test_refused(words: list[str], line: str, capsys: Capture) -> None:
    assert main(["tokenize", *words]) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")
