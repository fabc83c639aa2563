"""Configuration of good models, and one line for each model that contradicts itself (H cases)."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlacli.errors import ModelError
from mlacli.gguf.problem import LINE_LIMIT
from mlacli.gguf.reader import GGUFFile, open_gguf
from mlacli.model.config import ModelConfig, Yarn, read_config
from mlacli.model.inventory import check_tensors, layer_shapes, model_shapes
from tests.conftest import TinyModel
from tests.gguf_bytes import Value, edited_model

A = "deepseek2."
Tensors = dict[str, tuple[tuple[int, ...], int] | None]
F32, F16, Q4_0 = 0, 1, 2
NAN = float("nan")


def load(path: Path) -> tuple[GGUFFile, ModelConfig, list[str]]:
    file = open_gguf(path)
    config = read_config(file)
    return file, config, check_tensors(file, config)


def edited(
    tiny_model: TinyModel,
    folder: Path,
    changes: dict[str, Value | None] | None = None,
    tensors: Tensors | None = None,
    preset: str = "tiny-v3",
    kv_b: str = "joint",
) -> Path:
    """A tiny model with keys (short names: without the architecture) and tensors changed."""
    full = {
        (name if name.startswith("general.") else A + name): value
        for name, value in (changes or {}).items()
    }
    source = tiny_model(preset, "F32", kv_b, sparse=True)
    return edited_model(source, folder / "edited.gguf", full, tensors=tensors or {})


# Good models


@pytest.mark.parametrize("preset", ["tiny-v3", "tiny-lite", "tiny-odd"])
def test_flavours_give_one_config(preset: str, tiny_model: TinyModel) -> None:
    configs = []
    for kv_b in ("joint", "both", "split"):
        _, config, notes = load(tiny_model(preset, "F32", kv_b, sparse=True))
        assert notes == []
        configs.append(config)
    assert configs[0] == configs[1] == configs[2]


def test_every_field_of_a_v3_like_model(tiny_model: TinyModel) -> None:
    _, config, _ = load(tiny_model("tiny-odd", "IQ4_NL", "split", sparse=True))
    assert config == ModelConfig(
        arch="deepseek2",
        name="random tiny-odd",
        file_type="IQ4_NL",
        n_layer=3,
        n_ctx_train=163840,
        n_embd=320,
        n_head=5,
        n_vocab=4096,
        n_ff=448,
        n_layer_dense=1,
        n_expert=16,
        n_expert_used=3,
        n_expert_shared=2,
        n_ff_exp=96,
        expert_weights_scale=1.5,
        expert_weights_norm=True,
        gating="sigmoid",
        n_group=4,
        n_group_used=2,
        group_score="top2",
        q_lora_rank=96,
        kv_lora_rank=160,
        n_rope=32,
        n_nope=96,
        n_v=160,
        rms_eps=float(np.float32(1e-6)),
        rope_freq_base=10000.0,
        yarn=Yarn(40.0, 4096, float(np.float32(0.1)), 32.0, 1.0, 1.0, 1.0),
        tied_output=False,
        n_mtp_layers=0,
    )
    assert (config.head_dim, config.c_width) == (128, 192)


def test_lite_has_no_query_compression(tiny_model: TinyModel) -> None:
    _, config, _ = load(tiny_model("tiny-lite", "F32", "joint", sparse=True))
    assert (config.q_lora_rank, config.gating, config.group_score) == (0, "softmax", "max")
    assert "blk.3.attn_q.weight" in layer_shapes(config, 3)


@pytest.mark.parametrize(("preset", "kq_scale"), [("v2-lite", 0.11472), ("v3", 0.13523)])
def test_attention_scale_of_the_real_models(
    preset: str, kq_scale: float, tiny_model: TinyModel
) -> None:
    _, config, notes = load(tiny_model(preset, "IQ4_NL", "joint", sparse=True))
    assert config.kq_scale == pytest.approx(kq_scale, abs=5e-6) and notes == []


@pytest.mark.parametrize(("factor", "kq_scale"), [(32.0, 0.13086), (64.0, 0.14468)])
def test_attention_scale_of_kimi_k2(factor: float, kq_scale: float, tiny_model: TinyModel) -> None:
    config = load(tiny_model(sparse=True))[1]
    assert config.yarn is not None
    kimi = replace(config, n_nope=128, n_rope=64, yarn=replace(config.yarn, factor=factor))
    assert kimi.kq_scale == pytest.approx(kq_scale, abs=5e-6)
    assert replace(kimi, yarn=None).kq_scale == 1 / math.sqrt(192)


def test_yarn_frequencies_as_deepseeks_own_code_makes_them(tiny_model: TinyModel) -> None:
    """V3's modeling file: fast pairs as trained, slow ones divided by 40, a ramp between."""
    config = replace(load(tiny_model(sparse=True))[1], n_rope=64)
    turns = [10000.0 ** (2 * i / 64) for i in range(32)]
    low = math.floor(64 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10000)))
    high = math.ceil(64 * math.log(4096 / (1 * 2 * math.pi)) / (2 * math.log(10000)))
    assert (low, high) == (10, 23)
    frequencies = config.rope_frequencies()
    assert frequencies.dtype == np.float64 and frequencies.shape == (32,)
    for i, frequency in enumerate(frequencies):
        ramp = min(max((i - low) / (high - low), 0), 1)
        expected = (1 / turns[i]) * (1 - ramp) + (1 / (40 * turns[i])) * ramp
        assert frequency == pytest.approx(expected, rel=1e-12)
    plain = replace(config, yarn=None).rope_frequencies()
    np.testing.assert_allclose(plain, 1 / np.array(turns), rtol=1e-12)
    np.testing.assert_allclose(frequencies[:11], plain[:11], rtol=1e-15)
    np.testing.assert_allclose(frequencies[23:], plain[23:] / 40, rtol=1e-15)


def test_rope_scaling_kinds(tiny_model: TinyModel, tmp_path: Path) -> None:
    key = "rope.scaling.type"
    assert load(edited(tiny_model, tmp_path, {key: "none"}))[1].yarn is None
    for linear in ("linear", None):
        config = load(edited(tiny_model, tmp_path, {key: linear}))[1]
        plain = replace(config, yarn=None).rope_frequencies()
        np.testing.assert_allclose(config.rope_frequencies(), plain / 40, rtol=1e-12)
    gone: dict[str, Value | None] = {key: None, "rope.scaling.factor": None}
    assert load(edited(tiny_model, tmp_path, gone))[1].yarn is None
    changes: dict[str, Value | None] = {
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0,
        "rope.scaling.yarn_ext_factor": 0.5,
        "rope.scaling.attn_factor": 1.5,
        "rope.scaling.original_context_length": None,
    }
    yarn = load(edited(tiny_model, tmp_path, changes))[1].yarn
    assert yarn == Yarn(40.0, 163840, float(np.float32(0.1)), 16.0, 2.0, 0.5, 1.5)


def test_absent_keys_take_their_defaults(tiny_model: TinyModel, tmp_path: Path) -> None:
    gone = ("expert_weights_scale", "expert_weights_norm", "expert_gating_func", "rope.freq_base")
    changes: dict[str, Value | None] = dict.fromkeys([*gone, "expert_group_count"])
    config = load(edited(tiny_model, tmp_path, changes, preset="tiny-lite"))[1]
    assert (config.expert_weights_scale, config.expert_weights_norm) == (1.0, False)
    assert (config.gating, config.n_group, config.rope_freq_base) == ("softmax", 1, 10000.0)
    changes |= {"general.name": None, "general.file_type": None}
    config = load(edited(tiny_model, tmp_path, changes))[1]
    assert config.gating == "sigmoid"  # the router has a selection bias
    assert (config.name, config.file_type) == ("edited", "F32")


def test_groups_of_a_softmax_router_are_scored_by_their_best(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    changes: dict[str, Value | None] = {"expert_group_count": 4, "expert_group_used_count": 2}
    config = load(edited(tiny_model, tmp_path, changes, preset="tiny-lite"))[1]
    assert (config.n_group, config.n_group_used, config.group_score) == (4, 2, "max")


def test_per_layer_arrays_that_agree(tiny_model: TinyModel, tmp_path: Path) -> None:
    changes: dict[str, Value | None] = {
        "expert_feed_forward_length": [0, 128, 128, 128],
        "feed_forward_length": [512, 0, 0, 0],
        "attention.head_count": [4, 4, 4, 4],
    }
    assert load(edited(tiny_model, tmp_path, changes))[1] == replace(
        load(tiny_model(sparse=True))[1], name="random tiny-v3"
    )


def test_file_types_have_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    for number, name in [(7, "Q8_0"), (15, "Q4_K_M"), (9999, "type 9999")]:
        path = edited(tiny_model, tmp_path, {"general.file_type": number})
        assert load(path)[1].file_type == name


def test_name_of_a_model_cannot_steer_the_terminal(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = edited(tiny_model, tmp_path, {"general.name": "a\x1b[2J"})
    assert load(path)[1].name == r"a\x1b[2J"


def test_opening_a_model_does_not_import_the_gguf_package(tiny_model: TinyModel) -> None:
    program = (
        "import sys, pathlib; from mlacli.gguf.reader import open_gguf;"
        "from mlacli.model.config import read_config;"
        "read_config(open_gguf(pathlib.Path(sys.argv[1])));"
        "print([m for m in ('gguf', 'llvmlite', 'tokenizers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(tiny_model(sparse=True))]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout == "[]\n"


def test_dense_model_without_experts(tiny_model: TinyModel, tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer in range(1, 4):
        for part in ("exps", "shexp"):
            tensors |= dict.fromkeys(
                f"blk.{layer}.ffn_{which}_{part}.weight" for which in ("gate", "up", "down")
            )
        tensors |= {f"blk.{layer}.ffn_gate_inp.weight": None, f"blk.{layer}.exp_probs_b.bias": None}
        for which, shape in (("gate", (256, 512)), ("up", (256, 512)), ("down", (512, 256))):
            tensors[f"blk.{layer}.ffn_{which}.weight"] = (shape, F32)
    config = load(edited(tiny_model, tmp_path, {"expert_count": 0}, tensors))[1]
    assert (config.n_layer_dense, config.n_expert, config.n_ff, config.n_group) == (4, 0, 512, 1)


def test_tied_output(tiny_model: TinyModel, tmp_path: Path) -> None:
    _, config, notes = load(edited(tiny_model, tmp_path, tensors={"output.weight": None}))
    assert config.tied_output and "output.weight" not in model_shapes(config) and notes == []


MTP_LAYER: Tensors = {
    f"blk.4.{name}.weight": ((256, 256), F32)
    for name in ("nextn.eh_proj", "nextn.enorm", "attn_norm", "attn_kv_b")
}


@pytest.mark.parametrize("block_count", [4, 5])
@pytest.mark.parametrize("declared", [None, 1])
def test_prediction_layers_are_skipped(
    block_count: int, declared: int | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    changes: dict[str, Value | None] = {
        "block_count": block_count,
        "nextn_predict_layers": declared,
    }
    _, config, notes = load(edited(tiny_model, tmp_path, changes, MTP_LAYER))
    assert (config.n_layer, config.n_mtp_layers) == (4, 1)
    assert notes == ["layers 4..4 predict several tokens ahead (MTP): skipped"]


def test_prediction_layers_may_have_been_stripped(tiny_model: TinyModel, tmp_path: Path) -> None:
    changes: dict[str, Value | None] = {"block_count": 5, "nextn_predict_layers": 1}
    _, config, notes = load(edited(tiny_model, tmp_path, changes))
    assert (config.n_layer, config.n_mtp_layers, notes) == (4, 1, [])
    _, config, _ = load(edited(tiny_model, tmp_path, {"nextn_predict_layers": 1}))
    assert (config.n_layer, config.n_mtp_layers) == (4, 0)


def test_extra_tensors_are_noted(tiny_model: TinyModel, tmp_path: Path) -> None:  # H12
    extra: Tensors = {f"extra.{i}": ((32,), F32) for i in range(7)}
    extra["rope\u0301"] = ((4,), F32)
    _, _, notes = load(edited(tiny_model, tmp_path, tensors=extra))
    assert len(notes) == 1 and notes[0].startswith("8 tensors are not used: extra.0, ")


def test_selection_bias_is_optional(tiny_model: TinyModel, tmp_path: Path) -> None:
    gone: Tensors = {f"blk.{layer}.exp_probs_b.bias": None for layer in range(1, 4)}
    assert load(edited(tiny_model, tmp_path, tensors=gone))[1].gating == "sigmoid"


def test_trailing_dimensions_of_1_mean_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    tensors: Tensors = {"output_norm.weight": ((256, 1), F32)}
    assert load(edited(tiny_model, tmp_path, tensors=tensors))[2] == []


def test_two_dimensional_k_b_and_v_b_are_enough(tiny_model: TinyModel, tmp_path: Path) -> None:
    gone: Tensors = {f"blk.{layer}.attn_kv_b.weight": None for layer in range(4)}
    _, config, notes = load(edited(tiny_model, tmp_path, tensors=gone, kv_b="both"))
    assert config.n_nope == 64 and notes == []


# Models that contradict themselves

# name -> (keys, words of the message)
KEY_CASES: dict[str, tuple[dict[str, Value | None], str]] = {
    "H01 no layers": ({"block_count": 0}, "block_count range 0 1..1024"),
    "H01 10^6 layers": ({"block_count": 10**6}, "block_count range 1000000"),
    "H01 more than present": ({"block_count": 5}, "block_count layer 4 no tensors got 5"),
    "H01 fewer than present": ({"block_count": 3}, "block_count layer 3 got 3 limit 4"),
    "H01 absent": ({"block_count": None}, "block_count missing"),
    "H02 embedding 0": ({"embedding_length": 0}, "embedding_length range 0"),
    "H02 embedding": ({"embedding_length": 320}, "token_embd.weight shape 256 320"),
    "H03 heads 0": ({"attention.head_count": 0}, "head_count range 0"),
    "H03 heads": ({"attention.head_count": 8}, "blk.0.attn_output.weight shape (256, 256) 512"),
    "H03 heads differ": ({"attention.head_count": [4, 4, 2, 4]}, "head_count differ [2, 4]"),
    "H03 short array": ({"attention.head_count": [4, 4]}, "head_count array 2 values"),
    "H04 rank 0": ({"attention.kv_lora_rank": 0}, "kv_lora_rank range 0"),
    "H04 rank 2^31": ({"attention.kv_lora_rank": 2**31}, "kv_lora_rank range 2147483648"),
    "H04 rank": ({"attention.kv_lora_rank": 64}, "blk.0.attn_kv_a_mqa.weight shape 160 96"),
    "H05 query rank": ({"attention.q_lora_rank": 64}, "q_lora_rank attn_q_a got 64 96"),
    "H06 key under rope": ({"attention.key_length": 16}, "key_length rope got 16"),
    "H06 key equals rope": ({"attention.key_length": 32}, "key_length rope got 32"),
    "H06 rope odd": ({"rope.dimension_count": 31}, "rope.dimension_count odd 31"),
    "H06 rope 0": ({"rope.dimension_count": 0}, "rope.dimension_count range 0"),
    "H06 value 0": ({"attention.value_length": 0}, "value_length range 0"),
    "H07 used over count": ({"expert_used_count": 9}, "expert_used_count range 9 1..8"),
    "H07 used 0": ({"expert_used_count": 0}, "expert_used_count range 0"),
    "H07 experts 0": ({"expert_count": 0}, "expert_count blk.1.ffn_gate_exps.weight"),
    "H07 experts": ({"expert_count": 4}, "blk.1.ffn_gate_inp.weight shape (256, 8) 4"),
    "H07 groups": ({"expert_group_count": 3, "expert_group_used_count": 1}, "group_count divide 3"),
    "H07 groups of one": (
        {"expert_group_count": 8, "expert_group_used_count": 8},
        "group_count divide 8",
    ),
    "H07 groups used": (
        {"expert_group_count": 2, "expert_group_used_count": 3},
        "group_used_count range 3 1..2",
    ),
    "H07 groups hold too few": (
        {"expert_group_count": 4, "expert_group_used_count": 1, "expert_used_count": 3},
        "group_used_count fewer 1",
    ),
    "H07 groups used absent": ({"expert_group_count": 2}, "expert_group_used_count missing"),
    "H07 shared": ({"expert_shared_count": 2}, "blk.1.ffn_gate_shexp.weight shape 128 256"),
    "H07 shared 0": ({"expert_shared_count": 0}, "blk.1.ffn_gate_shexp.weight shared 0"),
    "H08 dense over layers": ({"leading_dense_block_count": 5}, "leading_dense range 5 0..4"),
    "H08 dense": ({"leading_dense_block_count": 2}, "blk.1.ffn_gate.weight missing"),
    "H09 eps 0": ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_epsilon range 0"),
    "H09 eps NaN": ({"attention.layer_norm_rms_epsilon": NAN}, "rms_epsilon range nan"),
    "H09 eps -1": ({"attention.layer_norm_rms_epsilon": -1.0}, "rms_epsilon range -1"),
    "H09 base 0": ({"rope.freq_base": 0.0}, "rope.freq_base range 0"),
    "H09 base NaN": ({"rope.freq_base": NAN}, "rope.freq_base range nan"),
    "H09 factor 0": ({"rope.scaling.factor": 0.0}, "scaling.factor range 0"),
    "H09 factor NaN": ({"rope.scaling.factor": NAN}, "scaling.factor range nan"),
    "H09 factor 1e30": ({"rope.scaling.factor": 1e30}, "scaling.factor range 1e+30"),
    "H09 scale NaN": ({"expert_weights_scale": NAN}, "expert_weights_scale range nan"),
    "H09 scale 0": ({"expert_weights_scale": 0.0}, "expert_weights_scale range 0"),
    "H09 multiplier": ({"rope.scaling.yarn_log_multiplier": NAN}, "yarn_log_multiplier nan"),
    "H09 betas": ({"rope.scaling.yarn_beta_fast": 0.5}, "yarn_beta_fast range 0.5"),
    "H09 scaling type": ({"rope.scaling.type": "longrope"}, "scaling.type longrope yarn"),
    "H10 gating 4": ({"expert_gating_func": 4}, "expert_gating_func unknown 4"),
    "H10 gating 3": ({"expert_gating_func": 3}, "expert_gating_func unknown 3"),
    "H11 context 0": ({"context_length": 0}, "context_length range 0"),
    "H11 context 2^32-1": ({"context_length": 2**32 - 1}, "context_length range 4294967295"),
    "H13 arch absent": ({"general.architecture": None}, "general.architecture missing"),
    "H13 arch unknown": ({"general.architecture": "llama"}, "arch llama not supported deepseek2"),
    "H13 arch MLA": ({"general.architecture": "minicpm3"}, "arch minicpm3 MLA not supported"),
    "H13 arch number": ({"general.architecture": 3}, "general.architecture type u32 string"),
    "H13 type": ({"block_count": "four"}, "block_count type string integer"),
    "H13 float": ({"block_count": 4.0}, "block_count type f32 integer"),
    "H13 norm flag": ({"expert_weights_norm": 1}, "expert_weights_norm type u32 bool"),
    "H13 temperature": ({"attention.temperature_scale": 0.1}, "temperature_scale not supported"),
}


def refused(path: Path, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(path)
    line = str(caught.value)
    assert len(line) <= LINE_LIMIT and line.isprintable() and f"{path.name}: " in line
    for word in words.split():
        assert word in line.partition(": ")[2], f"{word!r} is not in {line!r}"


@pytest.mark.parametrize("case", KEY_CASES)
def test_wrong_key_is_named(case: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    changes, words = KEY_CASES[case]
    refused(edited(tiny_model, tmp_path, changes), words)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"rope": 48}, "rope.dimension_count 48 32"),
        ({"nope": 40}, "attention.key_length 72 32"),
        ({"v": 48}, "attention.value_length 48 32"),
    ],
)
def test_heads_that_kernels_cannot_read(
    sizes: dict[str, int], words: str, tiny_model: TinyModel
) -> None:
    refused(tiny_model("tiny-v3", "F32", "joint", sparse=True, **sizes), words)


def test_split_files_describe_heads_and_rows(tiny_model: TinyModel, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Value | None], str]] = [
        ({"attention.key_length_mla": 32}, "key_length_mla rope 32"),
        ({"attention.key_length": 96}, "key_length kv_lora_rank 96 160"),
        ({"attention.value_length_mla": 32}, "blk.0.attn_output.weight shape"),
    ]
    for changes, words in cases:
        refused(edited(tiny_model, tmp_path, changes, kv_b="split"), words)


KV_B, K_B, V_B = (f"blk.2.attn_{part}_b.weight" for part in ("kv", "k", "v"))
# name -> (flavour, tensors, words of the message)
TENSOR_CASES: dict[str, tuple[str, Tensors, str]] = {
    "missing": ("joint", {"blk.3.ffn_norm.weight": None}, "blk.3.ffn_norm.weight missing"),
    "missing embedding": ("joint", {"token_embd.weight": None}, "token_embd.weight missing"),
    "missing query": ("joint", {"blk.0.attn_q_a.weight": None}, "blk.0.attn_q_a.weight missing"),
    "missing kv_b": ("joint", {KV_B: None}, f"{KV_B} missing attn_k_b"),
    "missing v_b": ("split", {V_B: None}, f"{KV_B} missing attn_v_b"),
    "kv_b shape": ("joint", {KV_B: ((128, 256), F32)}, f"{KV_B} shape (128, 256) 512"),
    "k_b shape": ("split", {K_B: ((128, 64, 4), F32)}, f"{K_B} shape (128, 64, 4) (64, 128, 4)"),
    "v_b shape": ("both", {V_B: ((128, 128), F32)}, f"{V_B} shape (128, 128) (128, 256)"),
    "norm as Q4_0": ("joint", {"output_norm.weight": ((256,), Q4_0)}, "output_norm F32 got Q4_0"),
    "norm as F16": ("joint", {"blk.0.attn_norm.weight": ((256,), F16)}, "attn_norm F32 got F16"),
    "bias shape": ("joint", {"blk.1.exp_probs_b.bias": ((7,), F32)}, "exp_probs_b.bias (7,) (8,)"),
    "experts": (
        "joint",
        {"blk.1.ffn_up_exps.weight": ((256, 128, 7), F32)},
        "blk.1.ffn_up_exps.weight shape 7 8",
    ),
    "fused experts": (
        "joint",
        {
            "blk.1.ffn_gate_exps.weight": None,
            "blk.1.ffn_gate_up_exps.weight": ((256, 256, 8), F32),
        },
        "blk.1.ffn_gate_exps.weight missing ffn_gate_up_exps not supported",
    ),
    "layer beyond": ("joint", {"blk.9.attn_norm.weight": ((256,), F32)}, "block_count layer 9"),
    "output rows": ("joint", {"output.weight": ((256, 4095), F32)}, "output.weight 4095 4096"),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_wrong_tensor_is_named(case: str, tiny_model: TinyModel, tmp_path: Path) -> None:  # H12
    kv_b, tensors, words = TENSOR_CASES[case]
    refused(edited(tiny_model, tmp_path, tensors=tensors, kv_b=kv_b), words)
