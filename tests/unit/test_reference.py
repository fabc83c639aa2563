"""The oracle itself: against HF transformers' logits, against pieces worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from tests.conftest import TinyModel
from tests.reference import (
    ReferenceModel,
    attend,
    correction_range,
    load,
    nmse,
    per_token_nmse,
    rope_frequencies,
    rotate,
    route,
)
from tests.reference_file import SIGMOID, SOFTMAX, Array, Config, Weights, Yarn, read_config

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mlacli/data/demo.gguf"
GOLDEN = ROOT / "tests/golden/demo_q8_0_hf.npz"
V3_YARN = Yarn(factor=40.0, original_context=4096, log_multiplier=0.1)
CONFIG = Config(
    n_layer=1,
    n_head=2,
    nope=128,
    rope=64,
    v=128,
    kv_lora=512,
    epsilon=1e-6,
    rope_base=10000.0,
    yarn=V3_YARN,
    n_expert_used=2,
    n_group=1,
    n_group_used=1,
    gating=SIGMOID,
    weights_norm=False,
    weights_scale=1.0,
)


def some_tokens(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 4096, length)]


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


@pytest.mark.parametrize("length", [1, 33, 700])
def test_shipped_model_has_the_logits_of_hf_transformers(length: int) -> None:
    golden = np.load(GOLDEN)
    tokens, rows = golden[f"tokens_{length}"].tolist(), golden[f"rows_{length}"].tolist()
    logits = load(DEMO).forward(tokens, rows=rows)
    assert logits.dtype == np.float64
    assert nmse(logits, golden[f"logits_{length}"]) <= 1e-10


@pytest.mark.parametrize("preset", ["tiny-v3", "tiny-lite", "tiny-odd"])
def test_flavours_of_one_model_are_equal(tiny_model: TinyModel, preset: str) -> None:
    tokens = some_tokens(40)
    joint, both, split = (
        load(tiny_model(preset, "F32", kv_b), prefer_split=True).forward(tokens)
        for kv_b in ("joint", "both", "split")
    )
    assert nmse(both, joint) <= 1e-25
    assert nmse(split, joint) <= 1e-25


def test_interleaved_sequences_are_each_alone(tiny_model: TinyModel) -> None:
    model = load(tiny_model("tiny-v3"))
    first, second = some_tokens(30, 1), some_tokens(30, 2)
    tokens = [token for pair in zip(first, second, strict=True) for token in pair]
    positions = [i // 2 for i in range(60)]
    logits = model.forward(tokens, positions, [i % 2 for i in range(60)])
    assert nmse(logits[0::2], model.forward(first)) <= 1e-25
    assert nmse(logits[1::2], model.forward(second)) <= 1e-25
    assert nmse(model.forward(tokens, positions), logits) > 1e-3


def test_only_distances_between_positions_matter(tiny_model: TinyModel) -> None:
    model, tokens = load(tiny_model("tiny-v3")), some_tokens(20)
    moved = model.forward(tokens, [5000 + i for i in range(20)])
    stretched = model.forward(tokens, [3 * i for i in range(20)])
    assert nmse(moved, model.forward(tokens)) <= 1e-20
    assert nmse(stretched, model.forward(tokens)) > 1e-6


def test_rows_and_forgotten_weights_change_nothing(tiny_model: TinyModel) -> None:
    path, tokens = tiny_model("tiny-odd", "Q8_0"), some_tokens(10)
    everything = load(path).forward(tokens)
    few = load(path, keep=False).forward(tokens, rows=[7, -1])
    assert nmse(few, everything[[7, -1]]) <= 1e-28


def test_rounded_cache_moves_the_logits_a_little(tiny_model: TinyModel) -> None:
    model, tokens = load(tiny_model("tiny-v3")), some_tokens(50)
    widths: set[int] = set()

    def to_f16(values: Array) -> Array:
        widths.add(values.shape[-1])
        return values.astype(np.float16).astype(np.float64)

    exact = model.forward(tokens)
    latent = model.forward(tokens, cache_round=to_f16)
    assert widths == {128 + 32}
    widths.clear()
    heads = model.forward(tokens, cache_round=to_f16, cache_rows="heads")
    assert widths == {64 + 32, 64}
    for rounded in (latent, heads):
        assert 1e-10 < nmse(rounded, exact) < 2e-5
    assert nmse(latent, heads) > 1e-10


def test_tied_output_is_the_embedding() -> None:
    tensors = gguf.GGUFReader(DEMO).tensors
    untied = {tensor.name: tensor for tensor in tensors}
    embedding = untied["token_embd.weight"]
    untied["output.weight"] = SimpleNamespace(
        name="output.weight", data=embedding.data, tensor_type=embedding.tensor_type
    )
    tied = [tensor for tensor in tensors if tensor.name != "output.weight"]
    config, tokens = load(DEMO).config, some_tokens(3)
    logits = ReferenceModel(config, Weights(tied)).forward(tokens)
    copied = ReferenceModel(config, Weights(list(untied.values()))).forward(tokens)
    assert np.array_equal(logits, copied)
    assert nmse(load(DEMO).forward(tokens), logits) > 1e-3


def test_tap_and_routing_see_every_layer(tiny_model: TinyModel) -> None:
    model, tapped = load(tiny_model("tiny-v3")), dict[str, Array]()
    result = model.run(some_tokens(6), tap=tapped.__setitem__)
    assert tapped["l_out-3"].shape == (6, 256)
    assert tapped["kqv_out-0"].shape == (6, 4, 64)
    assert [routing.layer for routing in result.routing] == [1, 2, 3]
    margins = [routing.margin for routing in result.routing]
    assert np.array_equal(result.smallest_margin(), np.minimum.reduce(margins))
    assert (result.smallest_margin() > 0).all()


def test_experts_can_be_prescribed(tiny_model: TinyModel) -> None:
    model, tokens = load(tiny_model("tiny-v3")), some_tokens(6)
    free = model.run(tokens)
    chosen = [routing.experts for routing in free.routing]
    assert np.array_equal(model.run(tokens, experts=chosen).logits, free.logits)
    others = [(experts + 1) % 8 for experts in chosen]
    forced = model.run(tokens, experts=others)
    assert all(map(np.array_equal, others, (routing.experts for routing in forced.routing)))
    assert nmse(forced.logits, free.logits) > 1e-2
    fewer = tiny_model("tiny-v3", n_used=1)
    best = [experts[:, :1] for experts in chosen]
    one = model.run(tokens, experts=[r.experts for r in load(fewer).run(tokens).routing])
    assert np.array_equal(one.routing[0].experts, best[0])
    assert np.array_equal(one.logits, load(fewer).run(tokens).logits)


def test_rope_turns_adjacent_pairs() -> None:
    x = np.array([[[1.0, 0.0, 0.0, 2.0]], [[1.0, 0.0, 0.0, 2.0]]])
    turned = rotate(x, np.array([0, 1]), np.array([math.pi / 2, math.pi]))
    assert np.array_equal(turned[0], x[0])
    assert turned[1] == pytest.approx(np.array([[0.0, 1.0, 0.0, -2.0]]))


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    # V3: 64 * ln(4096 / (32 * 2 pi)) / (2 ln 10000) = 10.47 and, with 1 turn, 22.51.
    assert correction_range(V3_YARN, 64, 10000.0) == (10, 23)
    plain = rope_frequencies(64, 10000.0, None)
    assert plain[:2] == pytest.approx([1.0, 10000 ** (-1 / 32)])
    scaled = rope_frequencies(64, 10000.0, V3_YARN)
    assert np.array_equal(scaled[:11], plain[:11])
    assert scaled[23:] == pytest.approx(plain[23:] / 40)
    blended = 7 / 13  # pair 17 stands so far from pair 10 to pair 23
    assert scaled[17] == pytest.approx(plain[17] * (1 - blended + blended / 40))


def test_yarn_range_stays_inside_the_head() -> None:
    narrow = replace(V3_YARN, original_context=128)  # 32 turns need more than 128 positions
    assert correction_range(narrow, 64, 10000.0) == (0, 11)


@pytest.mark.parametrize(
    ("yarn", "scale"),
    [
        (V3_YARN, 0.13523),
        (replace(V3_YARN, log_multiplier=0.0707), 0.11472),
        (replace(V3_YARN, factor=32.0), 0.13086),
        (None, 1 / math.sqrt(192)),
    ],
)
def test_attention_scale_of_known_models(yarn: Yarn | None, scale: float) -> None:
    assert replace(CONFIG, yarn=yarn).kq_scale == pytest.approx(scale, abs=1e-5)


def test_equal_keys_average_the_visible_values() -> None:
    n_tokens = 5
    v = np.arange(n_tokens, dtype=np.float64).reshape(n_tokens, 1, 1)
    same = np.ones((n_tokens, 1, 4))
    positions, sequences = np.array([0, 0, 1, 1, 1]), np.array([7, 8, 7, 8, 7])
    out = attend(same, same, v, 0.5, positions, sequences)
    assert out[:, 0, 0] == pytest.approx([0, 1, (0 + 2) / 2, (1 + 3) / 2, (0 + 2 + 4) / 3])
    backwards = attend(same, same, v, 0.5, np.arange(n_tokens)[::-1], np.zeros_like(positions))
    assert backwards[:, 0, 0] == pytest.approx(v[:, 0, 0])


def test_attention_weighs_values_by_softmax() -> None:
    q = np.array([[[0.0]], [[2.0]]])
    k, v = np.array([[[1.0]], [[3.0]]]), np.array([[[10.0]], [[20.0]]])
    weight = 1 / (1 + math.exp(-0.5 * (2 * 3 - 2 * 1)))
    out = attend(q, k, v, 0.5, np.arange(2), np.zeros(2, dtype=np.int64))
    assert out[1, 0, 0] == pytest.approx(10 * (1 - weight) + 20 * weight)


def test_router_bias_selects_but_does_not_weigh() -> None:
    logits = np.array([[logit(0.9), logit(0.5), logit(0.6), logit(0.1)]])
    bias = np.array([0.0, 0.45, 0.0, 0.0])  # selection: 0.9, 0.95, 0.6, 0.1
    experts, weights, margin = route(logits, bias, CONFIG)
    assert experts.tolist() == [[1, 0]]
    assert weights[0] == pytest.approx([0.5, 0.9])
    assert margin[0] == pytest.approx(0.9 - 0.6)
    scaled = replace(CONFIG, weights_norm=True, weights_scale=2.5)
    _, weights, _ = route(logits, bias, scaled)
    assert weights[0] == pytest.approx([2.5 * 0.5 / 1.4, 2.5 * 0.9 / 1.4])


def test_router_sum_of_weights_is_clamped() -> None:
    config = replace(CONFIG, weights_norm=True)
    _, weights, _ = route(np.array([[-30.0, -30.0, -40.0]]), None, config)
    assert weights[0] == pytest.approx([math.exp(-30) / 6.103515625e-5] * 2)


def test_groups_count_by_two_best_or_by_best() -> None:
    probs = np.array([0.50, 0.02, 0.30, 0.28, 0.06, 0.04])  # groups (0, 1), (2, 3), (4, 5)
    grouped = replace(CONFIG, n_group=3, n_group_used=1)
    logits = np.array([[logit(p) for p in probs]])
    experts, weights, margin = route(logits, None, grouped)
    assert experts.tolist() == [[2, 3]]  # 0.58 beats 0.52
    assert weights[0] == pytest.approx([0.30, 0.28])
    assert margin[0] == pytest.approx(0.58 - 0.52)
    softmax = replace(grouped, gating=SOFTMAX)
    probs = probs / probs.sum()
    experts, weights, margin = route(np.log(probs)[None], None, softmax)
    assert experts.tolist() == [[0, 1]]  # 0.50 beats 0.30
    assert weights[0] == pytest.approx(probs[:2])
    assert margin[0] == pytest.approx(probs[0] - probs[2])


def test_unknown_metadata_is_refused() -> None:
    reader = gguf.GGUFReader(DEMO)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    names = [tensor.name for tensor in reader.tensors]
    read_config(fields, names)
    for key, value in {
        "general.architecture": "llama",
        "deepseek2.expert_gating_func": 4,
        "deepseek2.rope.scaling.type": "linear",
        "deepseek2.rope.scaling.attn_factor": 0.5,
        "deepseek2.attention.kv_lora_rank": None,
    }.items():
        with pytest.raises(ValueError):
            read_config({**fields, key: value}, names)


def test_mtp_layers_are_left_out() -> None:
    reader = gguf.GGUFReader(DEMO)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    names = [tensor.name for tensor in reader.tensors]
    for block_count, mtp_layer in ((7, 6), (6, 6)):  # both ways of counting are in use
        counted = {**fields, "deepseek2.block_count": block_count}
        extra = [f"blk.{mtp_layer}.nextn.eh_proj.weight", f"blk.{mtp_layer}.nextn.enorm.weight"]
        assert read_config(counted, [*names, *extra]).n_layer == 6


def test_nmse_is_relative_to_the_expected() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 1.0]])
    actual = expected + np.array([[0.5, 0.0], [0.0, 0.1]])
    assert nmse(actual, expected) == pytest.approx(0.26 / 26)
    assert per_token_nmse(actual, expected) == pytest.approx([0.01, 0.01])
