"""mlacli info: what it says against gguf's own reader, and files that mean harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from mlacli.__main__ import main
from mlacli.settings import default_model
from tests.conftest import TinyModel
from tests.gguf_bytes import I32, STRING, RawTensor, array, encoded, header, key, text, with_data

ROOT = Path(__file__).resolve().parent.parent
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def reader() -> GGUFReader:
    return GGUFReader(default_model())


def shown(capsys: Capture, *words: object) -> str:
    assert main(["info", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def as_json(capsys: Capture, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown(capsys, "--json", *words))
    return found


def test_the_tensors_are_those_of_another_reader(capsys: Capture, reader: GGUFReader) -> None:
    found = as_json(capsys, "--tensors", default_model())
    assert found["tensors"] == [
        {"name": t.name, "type": t.tensor_type.name, "shape": t.shape.tolist(), "nbytes": t.n_bytes}
        for t in reader.tensors
    ]
    assert found["n_params"] == sum(int(t.n_elements) for t in reader.tensors)
    n_bits = 8 * sum(int(t.n_bytes) for t in reader.tensors)
    assert found["bits_per_weight"] == pytest.approx(n_bits / found["n_params"])
    lines = shown(capsys, "--tensors").splitlines()
    assert len(lines) - len(shown(capsys).splitlines()) == len(reader.tensors) + 3


def test_the_keys_are_those_of_another_reader(capsys: Capture, reader: GGUFReader) -> None:
    theirs = {k: v for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    ours = as_json(capsys, "--kv")["kv"]
    assert list(ours) == list(theirs)
    for name, field in theirs.items():
        contents = field.contents()
        if isinstance(contents, list):
            assert (ours[name]["count"], ours[name]["head"]) == (len(contents), contents[:16])
        else:
            assert ours[name]["value"] == contents


def test_lines_of_the_loader(capsys: Capture) -> None:
    lines = shown(capsys, "--kv").splitlines()
    assert (
        "llama_model_loader: - kv   0:                       general.architecture str              "
        "= deepseek2"
    ) in lines
    start = "llama_model_loader: - kv  38:                      tokenizer.ggml.tokens "
    assert start + 'arr[str,4096]    = ["!", "\\"", "#", "$", "%", "&", "\'", ...' in lines
    assert any(line.endswith("f32              = 10000.000000") for line in lines)
    assert any(line.endswith("bool             = true") for line in lines)


def test_the_text(capsys: Capture) -> None:
    facts = dict(line.split(maxsplit=1) for line in shown(capsys).splitlines() if line[0] != " ")
    assert facts["layers"] == "6: 1 dense (768 wide), 5 with experts"
    assert facts["attention"] == "8 heads: nope 32, rope 32, v 32; kv_lora 128, q_lora 192"
    assert facts["positions"].endswith("YaRN factor 4 over 512, log multiplier 0.1")
    assert facts["tokenizer"] == "gpt2, deepseek-v3: 4096 tokens, BOS 4091, EOS 4092"
    # 6 layers: 160 latent values of 2 bytes; 8 heads of 64 + 32
    assert facts["KV"].startswith(f"per token   f16 {6 * 320 / 1024:.2f} KiB")
    assert facts["KV"].endswith(f"-mla 0: f16 {6 * 8 * 96 * 2 / 1024:.2f} KiB")


@pytest.mark.parametrize(
    ("kv_b", "attention"),
    [
        ("joint", ["attn_kv_b"]),
        ("split", ["attn_k_b", "attn_v_b"]),
        ("both", ["attn_kv_b", "attn_k_b", "attn_v_b"]),
    ],
)
def test_which_attention_tensors(
    tiny_model: TinyModel, capsys: Capture, kv_b: str, attention: list[str]
) -> None:
    path = tiny_model("tiny-v3", "F16", kv_b, sparse=True)
    assert as_json(capsys, path)["attention"] == attention
    assert f"the file has {', '.join(attention)}\n" in shown(capsys, path)


def test_a_file_that_cannot_be_run(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(with_data([encoded("general.architecture", "llama")], [RawTensor("t")]))
    text = shown(capsys, "-m", path, "--tensors", "--kv")
    assert "\ncannot be run  " in text and "arch llama is not supported" in text
    assert " = llama\n" in text and " 0  t         F32" in text
    assert as_json(capsys, path)["config"] is None


def test_what_a_file_says_is_escaped(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x.gguf"
    evil = "\x1b]0;owned\x07\u202e\nname"
    keys = [
        encoded("general.architecture", evil),
        encoded("general.name", evil),
        encoded("k", evil),
        key("bytes", 9, array(STRING, 2, text(b"\xff\x1b") + text("a\nb"))),
        key("many", 9, array(I32, 40, bytes(160))),
        encoded("nan", float("nan")),
        encoded("tokenizer.ggml.model", 7),
        encoded("tokenizer.chat_template", [1, 2]),
    ]
    path.write_bytes(with_data(keys, [RawTensor("t")]))
    printed = shown(capsys, path, "--kv", "--tensors")
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert r"\x1b]0;owned\x07\u202e\nname" in printed
    assert r'arr[str,2]       = ["\xff\x1b", "a\nb"]' in printed
    assert "arr[i32,40]      = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ..." in printed
    assert "chat template  no\n" in printed and "tokenizer      none: 0 tokens\n" in printed
    found = as_json(capsys, path, "--kv")
    assert found["kv"]["nan"]["value"] == "nan" and found["name"] == evil
    assert found["kv"]["many"] == {"type": "array of i32", "count": 40, "head": [0] * 16}


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["a", "b"], 2, "info: takes one file (got 2)"),
        (["missing.gguf"], 3, "missing.gguf: file: cannot be opened: No such file or directory"),
        (["cut.gguf"], 3, "cut.gguf: "),
    ],
)
def test_refused(
    words: list[str],
    code: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.gguf").write_bytes(header([encoded("general.name", "x")])[:-2])
    assert main(["info", *words]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {line}") and err.count("\n") == 1


def test_nothing_that_compiles_or_tokenises_is_loaded() -> None:
    program = (
        "import sys; from mlacli.__main__ import main; main(['info', '--kv']);"
        "heavy = {'llvmlite', 'tokenizers', 'jinja2', 'gguf', 'rich', 'pydantic', 'matplotlib'};"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                   env=os.environ)  # fmt: skip
