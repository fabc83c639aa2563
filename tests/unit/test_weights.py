"""Types of derived weights, pairs of types that do not go together, and K-quants end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen.formats import WEIGHT_FORMATS
from mlacli.errors import ModelError
from mlacli.gguf.reader import open_gguf
from mlacli.model.config import read_config
from mlacli.model.weights import Weights
from tests import reference
from tests.conftest import TinyModel
from tests.engines import logits_and_experts, make_engine

TOKENS = np.random.default_rng(5).integers(0, 4096, 100).tolist()
# Rows of 256 values wherever an output is not a8: only k_b's are shorter.
GEOMETRY: dict[str, Any] = {"n_layer": 3, "q_lora": 256, "kv_lora": 256, "n_ff_exp": 256}
EXACT = 1e-10  # what is left is the rounding of f32 sums


@pytest.fixture
def weights_with(tiny_model: TinyModel) -> Callable[..., Weights]:
    """The weights of a model whose headers name other types than it has; never read."""

    def make(**types: str) -> Weights:
        path = tiny_model("tiny-v3", "F32", "split", sparse=True, **GEOMETRY)
        file = open_gguf(path)
        tensors = dict(file.tensors)
        for part, type_name in types.items():
            name = f"blk.1.{part}.weight"
            number = WEIGHT_FORMATS[type_name].ggml_type
            tensors[name] = replace(tensors[name], ggml_type=number, type_name=type_name)
        file = replace(file, tensors=tensors)
        return Weights(file, read_config(file))

    return make


@pytest.mark.parametrize(
    ("k_b", "v_b", "derived"),
    [
        ("Q8_0", "Q8_0", "Q8_0"),
        ("IQ4_NL", "Q4_0", "Q8_0"),
        ("F16", "Q8_0", "Q8_0"),
        ("Q8_0", "Q6_K", "F16"),
        ("IQ4_NL", "Q5_K", "F16"),
        ("BF16", "Q4_K", "BF16"),
        ("Q8_0", "F32", "F16"),
        ("F32", "F16", "F32"),
    ],
)
def test_w_uk_takes_after_v_b(
    weights_with: Callable[..., Weights], k_b: str, v_b: str, derived: str
) -> None:
    weights = weights_with(attn_k_b=k_b, attn_v_b=v_b)
    w_uk = weights.w_uk(1)
    assert w_uk.derived and w_uk.fmt.name == derived
    assert w_uk.fmt.integer_dot == weights.v_b(1).fmt.integer_dot


def test_gate_and_up_must_meet_the_same_activations(
    weights_with: Callable[..., Weights],
) -> None:
    names = ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight")
    weights = weights_with(ffn_gate_exps="Q8_0", ffn_up_exps="IQ4_NL")
    assert [m.fmt.name for m in weights.gate_and_up(*names)] == ["Q8_0", "IQ4_NL"]
    weights = weights_with(ffn_gate_exps="Q6_K", ffn_up_exps="F16")
    assert [m.fmt.name for m in weights.gate_and_up(*names)] == ["Q6_K", "F16"]
    weights = weights_with(ffn_gate_exps="Q8_0", ffn_up_exps="Q6_K")
    line = r"ffn_gate_exps\.weight: .* Q6_K of blk\.1\.ffn_up_exps\.weight \(got Q8_0\)$"
    with pytest.raises(ModelError, match=line):
        weights.gate_and_up(*names)


# -- K-quants end to end ------------------------------------------------------------------------


def errors(path: Path, **flags: Any) -> NDArray[np.float64]:
    """Per-token NMSE against f64 on the decoded weights, with the experts that the engine chose."""
    flags |= {"type_k": "f32", "type_v": "f32", "n_ubatch": 32, "keep_experts": True}
    engine = make_engine(path, n_ctx=128, mla_threshold=20, **flags)
    got, experts = logits_and_experts(engine, TOKENS)
    expected = reference.load(path).run(TOKENS, experts=experts).logits
    return reference.per_token_nmse(got, expected)


@pytest.mark.parametrize(
    ("type_", "mla", "flash_attn"),
    [("Q5_K", 0, True), ("Q6_K", 2, True), ("Q6_K", 2, False)],
)
def test_k_quants_are_exact(tiny_model: TinyModel, type_: str, mla: int, flash_attn: bool) -> None:
    """Three batches of a prompt and one of four tokens; kv_b as it is, nothing in 8 bits."""
    path = tiny_model("tiny-v3", type_, "joint", **GEOMETRY)
    found = errors(path, mla=mla, flash_attn=flash_attn)
    prompt = found[:96] if mla == 2 else found  # few tokens are absorbed, by a k_b in Q8_0
    assert prompt.max() <= EXACT


def test_k_b_beside_a_k_quant(tiny_model: TinyModel) -> None:
    """k_b is Q8_0, its rows being short: turned into w_uk as F16 for the prompt, and met by 8-bit
    activations for the last four tokens, which are absorbed."""
    found = errors(tiny_model("tiny-v3", "Q6_K", "split", **GEOMETRY), mla=2)
    assert found[:96].max() <= 2e-6
    assert EXACT < found[96:].max() <= 1e-3
