"""The maker of random models: same arguments, same bytes; three flavours, one model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlacli.gguf.quants import tensor_values
from mlacli.gguf.reader import open_gguf
from scripts.make_model import PRESETS, make_model
from tests.conftest import TinyModel


def test_equal_arguments_give_equal_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    first = tiny_model("tiny-odd", "IQ4_NL", "split").read_bytes()
    path = tmp_path / "again.gguf"
    make_model(path, preset="tiny-odd", type="IQ4_NL", kv_b="split")
    assert path.read_bytes() == first
    make_model(path, preset="tiny-odd", type="IQ4_NL", kv_b="split", seed=2)
    assert path.stat().st_size == len(first) and path.read_bytes() != first


@pytest.mark.parametrize("type_", ["Q8_0", "F16"])
def test_sparse_files_differ_by_their_data_only(
    type_: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    whole = tiny_model("tiny-v3", type_, "both")
    path = tmp_path / "sparse.gguf"
    size = make_model(path, preset="tiny-v3", type=type_, kv_b="both", sparse=True)
    assert size == whole.stat().st_size
    data_start = open_gguf(whole).files[0].data_start
    assert path.read_bytes()[:data_start] == whole.read_bytes()[:data_start]
    assert not any(path.read_bytes()[data_start:])


@pytest.mark.parametrize("type_", ["IQ4_NL", "Q8_0", "Q4_0", "BF16", "F16", "F32"])
def test_weights_have_the_wanted_spread(type_: str, tiny_model: TinyModel) -> None:
    values = tensor_values(open_gguf(tiny_model("tiny-odd", type_)), "blk.1.ffn_up_exps.weight")
    assert values.shape == (16, 96, 320)
    assert values.std() == pytest.approx(1 / np.sqrt(320), rel=0.05)


@pytest.mark.parametrize("type_", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_centred_and_short_rows_become_q8_0(type_: str, tmp_path: Path) -> None:
    path = tmp_path / "k.gguf"
    make_model(path, preset="tiny-v3", type=type_, kv_b="split", overrides={"kv_lora": 256})
    file = open_gguf(path)
    values = tensor_values(file, "blk.1.ffn_up_exps.weight")
    assert values.std() == pytest.approx(1 / 16, rel=0.05)
    assert abs(values.mean()) < 0.002
    names = ("ffn_up_exps", "attn_v_b", "attn_k_b", "ffn_down_exps")
    types = [file.tensors[f"blk.1.{name}.weight"].type_name for name in names]
    assert types == [type_, type_, "Q8_0", "Q8_0"]


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "cli.gguf"
    command = [sys.executable, "-m", "scripts.make_model", str(path), "--preset", "tiny-odd"]
    command += ["--sparse", "--type", "Q8_0", "--set", "n_layer=2", "--set", "norm=0"]
    command += ["--set", "scale=1.25"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.startswith(f"{path} ") and result.stdout.endswith(" MiB sparse\n")
    metadata = open_gguf(path).metadata
    assert metadata.integer("deepseek2.block_count") == 2
    assert metadata.flag("deepseek2.expert_weights_norm") is False
    assert metadata.number("deepseek2.expert_weights_scale") == 1.25
    result = subprocess.run(
        [*command, "--set", "n_layers=2"], capture_output=True, text=True, cwd=root
    )
    assert result.returncode == 1 and "n_layers=2: no such key" in result.stderr


def test_rows_that_do_not_fit_the_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"token_embd.weight: a row of 250 is no multiple of 32"):
        make_model(tmp_path / "m.gguf", preset="tiny-v3", overrides={"n_embd": 250})


def test_real_geometry() -> None:
    lite, v3 = PRESETS["v2-lite"], PRESETS["v3"]
    assert (lite.n_layer, lite.kv_lora, lite.rope, lite.n_head, lite.q_lora) == (27, 512, 64, 16, 0)
    assert (v3.n_layer, v3.n_exp, v3.n_used, v3.n_head, v3.q_lora) == (61, 256, 8, 128, 1536)
