"""DeepSeek tensors and metadata between HF transformers' names and GGUF's (architecture deepseek2).

Used to check the oracle (make_golden.py); users convert with `mlacli convert`. GGUF keeps HF's
layouts with these exceptions: experts are stacked, kv_b_proj may be split into k_b (transposed) and
v_b. RoPE rows keep their interleaved order in both. Source: llama.cpp's conversion/deepseek.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.reference_file import SIGMOID, SOFTMAX

Floats = NDArray[Any]

MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Below model.layers.N. and blk.N.; experts and kv_b_proj are not one to one.
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    **{
        f"mlp.shared_experts.{part}_proj.weight": f"ffn_{part}_shexp.weight"
        for part in ("gate", "up", "down")
    },
}
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def to_gguf(
    config: Any, tensors: Mapping[str, Floats], joint: bool
) -> Iterator[tuple[str, Floats]]:
    """The tensors of an HF checkpoint under GGUF names: flavour C, or A with `joint`."""
    experts: dict[str, dict[int, Floats]] = {}
    for name, values in tensors.items():
        if name in MODEL_NAMES:
            yield MODEL_NAMES[name], values
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest == "self_attn.kv_b_proj.weight" and not joint:
            nope, v = config.qk_nope_head_dim, config.v_head_dim
            per_head = values.reshape(config.num_attention_heads, nope + v, config.kv_lora_rank)
            yield f"blk.{layer}.attn_k_b.weight", per_head[:, :nope].transpose(0, 2, 1)
            yield f"blk.{layer}.attn_v_b.weight", per_head[:, nope:]
        elif rest == "self_attn.kv_b_proj.weight":
            yield f"blk.{layer}.attn_kv_b.weight", values
        elif expert := EXPERT.fullmatch(rest):
            stacked = f"blk.{layer}.ffn_{expert[2]}_exps.weight"
            experts.setdefault(stacked, {})[int(expert[1])] = values
        else:
            yield f"blk.{layer}.{LAYER_NAMES[rest]}", values
    for name, parts in experts.items():
        yield name, np.stack([parts[i] for i in range(len(parts))])


def from_gguf(name: str, tensors: Mapping[str, Floats], n_head: int) -> Floats:
    """The values of transformers' parameter `name` (it fuses each layer's experts into two)."""
    if name in MODEL_NAMES:
        return tensors[MODEL_NAMES[name]]
    _, _, layer, rest = name.split(".", 3)
    block = f"blk.{layer}."
    if rest == "self_attn.kv_b_proj.weight":
        if block + "attn_kv_b.weight" in tensors:
            return tensors[block + "attn_kv_b.weight"]
        kv_lora = len(tensors[block + "attn_kv_a_norm.weight"])
        k_b = tensors[block + "attn_k_b.weight"].reshape(n_head, kv_lora, -1)
        v_b = tensors[block + "attn_v_b.weight"].reshape(n_head, -1, kv_lora)
        return np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1).reshape(-1, kv_lora)
    if rest == "mlp.experts.gate_up_proj":
        gate, up = (tensors[f"{block}ffn_{part}_exps.weight"] for part in ("gate", "up"))
        return np.concatenate([gate, up], axis=1)
    if rest == "mlp.experts.down_proj":
        return tensors[block + "ffn_down_exps.weight"]
    return tensors[block + LAYER_NAMES[rest]]


def write_gguf(
    path: Path, config: Any, tensors: Mapping[str, Floats], tokenizer: Path, joint: bool
) -> None:
    """An F32 GGUF of an HF checkpoint; the tokenizer's metadata comes from another GGUF."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    add_metadata(writer, config, joint)
    reader = gguf.GGUFReader(tokenizer)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), *field.types[:2])
    for name, values in to_gguf(config, tensors, joint):
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: Any, config: Any, joint: bool) -> None:
    """The keys of a deepseek2 GGUF, from an HF DeepSeek V2 or V3 config."""
    nope, rope, kv_lora = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_kv_lora_rank(kv_lora)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_head_count_kv(config.num_attention_heads if joint else 1)
    writer.add_key_length(nope + rope if joint else kv_lora + rope)
    writer.add_value_length(config.v_head_dim if joint else kv_lora)
    if not joint:
        writer.add_key_length_mla(nope + rope)
        writer.add_value_length_mla(config.v_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    gating = {"sigmoid": SIGMOID, "softmax": SOFTMAX}[config.scoring_func]
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(gating))
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    scaling = config.rope_parameters
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(scaling["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])
    writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])


def hf_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of DeepseekV2Config or DeepseekV3Config for a GGUF's metadata, YaRN assumed."""

    def key(name: str, default: Any = None) -> Any:
        return fields.get(f"deepseek2.{name}", default)

    rope = key("rope.dimension_count")
    n_group = key("expert_group_count", 1)
    mscale_all_dim = 10 * float(key("rope.scaling.yarn_log_multiplier"))
    return {
        "vocab_size": key("vocab_size"),
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count"),
        "q_lora_rank": key("attention.q_lora_rank"),
        "kv_lora_rank": key("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key("attention.key_length_mla", key("attention.key_length")) - rope,
        "v_head_dim": key("attention.value_length_mla", key("attention.value_length")),
        "first_k_dense_replace": key("leading_dense_block_count"),
        "n_routed_experts": key("expert_count"),
        "num_experts_per_tok": key("expert_used_count"),
        "n_shared_experts": key("expert_shared_count"),
        "moe_intermediate_size": key("expert_feed_forward_length"),
        "routed_scaling_factor": float(key("expert_weights_scale", 1.0)),
        "norm_topk_prob": bool(key("expert_weights_norm", False)),
        "n_group": n_group,
        "topk_group": key("expert_group_used_count", 1),
        "topk_method": "group_limited_greedy" if n_group > 1 else "greedy",
        "rms_norm_eps": float(key("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": key("context_length"),
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": float(key("rope.freq_base", 10000.0)),
            "factor": float(key("rope.scaling.factor")),
            "original_max_position_embeddings": key("rope.scaling.original_context_length"),
            "beta_fast": float(key("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(key("rope.scaling.yarn_beta_slow", 1.0)),
            "mscale": mscale_all_dim,
            "mscale_all_dim": mscale_all_dim,
        },
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
