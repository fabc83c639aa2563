"""What the metadata of a GGUF file says about a DeepSeek-style MLA model, checked and resolved.

The only place that knows metadata keys. Three flavours of file exist, and give one config:

    A (until April 2025)  key_length = nope + rope, value_length = v; attn_kv_b
    B (ik_llama.cpp)      as A, with 2-D attn_k_b and attn_v_b besides
    C (llama.cpp today)   key_length_mla = nope + rope, value_length_mla = v, while key_length and
                          value_length describe the cached row; 3-D attn_k_b and attn_v_b only

Names follow the papers (DeepSeek-V2, arXiv 2405.04434; YaRN, arXiv 2309.00071).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlacli.gguf.metadata import Metadata
from mlacli.gguf.problem import model_error, printable
from mlacli.gguf.reader import GGUFFile
from mlacli.model.keys import Keys

ARCH = "deepseek2"
_OTHER_MLA_ARCHS = (
    *("minicpm3", "plm", "mistral4", "deepseek32", "glm-dsa", "glm5-next", "kimi-linear"),
    *("kimi-k3", "bailingmoe3", "hy-v4", "dots3note"),
)
MAX_LAYERS, MAX_EXPERTS, MAX_HEADS = 1_024, 4_096, 4_096
MAX_WIDTH = 2**20
WIDTH_STEP = 32
MAX_CONTEXT = 2**30
MAX_ROPE_FACTOR = 65_536.0
_FILE_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 7: "Q8_0", 25: "IQ4_NL", 32: "BF16"},
    **{14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K"},
}
_SOFTMAX, _SIGMOID = 1, 2
_NO_EXPERTS = {
    "n_expert": 0,
    "n_expert_used": 0,
    "n_expert_shared": 0,
    "n_ff_exp": 0,
    "expert_weights_scale": 1.0,
    "expert_weights_norm": False,
    "gating": "softmax",
    "n_group": 1,
    "n_group_used": 1,
    "group_score": "max",
}


@dataclass(frozen=True)
class Yarn:
    """Context extension: frequencies below the ramp are divided by `factor`.

    `log_multiplier` is 0.1 x mscale_all_dim of the Hugging Face config. Plain linear scaling is
    the case `ext_factor` = 0.
    """

    factor: float
    original_context: int
    log_multiplier: float
    beta_fast: float
    beta_slow: float
    ext_factor: float
    attn_factor: float

    @property
    def mscale(self) -> float:
        """The attention temperature's square root."""
        return self.attn_factor * (1.0 + self.log_multiplier * math.log(self.factor))


@dataclass(frozen=True)
class ModelConfig:
    """One model. `n_layer` counts the layers that run (not the multi-token-prediction ones)."""

    arch: str
    name: str
    file_type: str  # as quantisers name it: F16, Q8_0, Q4_K_M ...
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_head: int
    n_vocab: int
    n_ff: int  # of the dense layers; 0: there are none
    n_layer_dense: int  # leading layers without experts
    n_expert: int
    n_expert_used: int
    n_expert_shared: int
    n_ff_exp: int
    expert_weights_scale: float
    expert_weights_norm: bool
    gating: Literal["softmax", "sigmoid"]
    n_group: int  # 1: experts are not grouped
    n_group_used: int
    group_score: Literal["max", "top2"]
    q_lora_rank: int  # 0: the query has one matrix, attn_q
    kv_lora_rank: int
    n_rope: int
    n_nope: int
    n_v: int
    rms_eps: float
    rope_freq_base: float
    yarn: Yarn | None
    tied_output: bool
    n_mtp_layers: int

    @property
    def head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.n_nope + self.n_rope

    @property
    def c_width(self) -> int:
        """Width of a cached row c: latent values and the shared RoPE'd key."""
        return self.kv_lora_rank + self.n_rope

    @property
    def kq_scale(self) -> float:
        """What K*Q is multiplied with: mscale^2 / sqrt(head_dim), on the absorbed path too."""
        mscale = self.yarn.mscale if self.yarn else 1.0
        return mscale * mscale / math.sqrt(self.head_dim)

    def rope_frequencies(self) -> npt.NDArray[np.float64]:
        """Radians per position of each of the n_rope / 2 adjacent pairs; amplitude is always 1."""
        pair = np.arange(self.n_rope // 2, dtype=np.float64)
        plain = self.rope_freq_base ** (-2.0 * pair / self.n_rope)
        if self.yarn is None:
            return plain
        low, high = self._yarn_ramp(self.yarn)
        ramp = np.clip((pair - low) / max(high - low, 0.001), 0.0, 1.0)
        keep = (1.0 - ramp) * self.yarn.ext_factor  # 1: the frequency stays as trained
        return plain / self.yarn.factor * (1.0 - keep) + plain * keep

    def _yarn_ramp(self, yarn: Yarn) -> tuple[int, int]:
        """The pairs that turn beta_fast and beta_slow times within the original context."""

        def pair_of(turns: float) -> float:
            ratio = yarn.original_context / (turns * 2.0 * math.pi)
            return self.n_rope * math.log(ratio) / (2.0 * math.log(self.rope_freq_base))

        low, high = math.floor(pair_of(yarn.beta_fast)), math.ceil(pair_of(yarn.beta_slow))
        return max(low, 0), min(high, self.n_rope - 1)


def read_config(file: GGUFFile) -> ModelConfig:
    """The model's configuration. Raises ModelError for an unsupported or inconsistent file."""
    arch = _architecture(file.metadata)
    keys = Keys(file.metadata, arch)
    n_layer, n_mtp_layers = _layer_counts(file, keys)
    n_nope, n_rope, n_v, kv_lora_rank = _head_sizes(keys)
    return ModelConfig(
        arch=arch,
        name=printable(file.metadata.text("general.name", file.path.stem), 96),
        file_type=_file_type(file),
        n_layer=n_layer,
        n_ctx_train=keys.integer("context_length", 1, MAX_CONTEXT),
        n_embd=keys.integer("embedding_length", 1, MAX_WIDTH),
        n_head=keys.integer("attention.head_count", 1, MAX_HEADS, layers=range(n_layer)),
        n_vocab=_rows(file, "token_embd.weight"),
        **_feed_forward(file, keys, n_layer),
        q_lora_rank=_q_lora_rank(file, keys),
        kv_lora_rank=kv_lora_rank,
        n_rope=n_rope,
        n_nope=n_nope,
        n_v=n_v,
        rms_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        rope_freq_base=keys.number("rope.freq_base", 2.0, 1e12, default=10000.0),
        yarn=_yarn(keys),
        tied_output="output.weight" not in file.tensors,
        n_mtp_layers=n_mtp_layers,
    )


def _architecture(metadata: Metadata) -> str:
    arch = metadata.text("general.architecture")
    if arch == ARCH:
        return arch
    reason = "has MLA but is not supported yet" if arch in _OTHER_MLA_ARCHS else "is not supported"
    raise model_error(
        metadata.path, "general.architecture", f"arch {arch} {reason}", got=arch, limit=ARCH
    )


def _file_type(file: GGUFFile) -> str:
    """The quantiser's name of the mixture; files without one go by their largest share."""
    if "general.file_type" in file.metadata:
        number = file.metadata.integer("general.file_type")
        if number in _FILE_TYPES:
            return _FILE_TYPES[number]
        from gguf.constants import LlamaFileType  # slow import; only for types we cannot run

        known = {int(t): str(t.name).removeprefix("MOSTLY_") for t in LlamaFileType}
        return known.get(number, f"type {number}")
    shares: dict[str, int] = {}
    for tensor in file.tensors.values():
        shares[tensor.type_name] = shares.get(tensor.type_name, 0) + tensor.nbytes
    return max(shares, key=shares.__getitem__, default="F32")


def _rows(file: GGUFFile, name: str) -> int:
    if name not in file.tensors:
        raise model_error(file.path, name, "the tensor is missing")
    return file.tensors[name].n_rows


def _layer_counts(file: GGUFFile, keys: Keys) -> tuple[int, int]:
    """Layers that run, and multi-token-prediction layers behind them, which are skipped.

    block_count may or may not include the latter, and files may have lost them: what counts is
    which layers have `nextn` tensors, or none at all.
    """
    block_count = keys.integer("block_count", 1, MAX_LAYERS)
    declared_mtp = keys.integer("nextn_predict_layers", 0, MAX_LAYERS, default=0)
    present, mtp = set(), set()
    for name in file.tensors:
        number, _, part = name.removeprefix("blk.").partition(".")
        if name.startswith("blk.") and number.isdecimal():
            present.add(int(number))
            if part.startswith("nextn."):
                mtp.add(int(number))
    n_layer = block_count
    while n_layer > 1 and (
        n_layer - 1 in mtp or (n_layer - 1 not in present and n_layer > block_count - declared_mtp)
    ):
        n_layer -= 1
    absent = [i for i in range(n_layer) if i not in present]
    beyond = sorted(i for i in present - mtp if i >= n_layer)
    if absent:
        raise keys.fail("block_count", f"layer {absent[0]} has no tensors", block_count)
    if beyond:
        problem = f"the file has tensors of layer {beyond[0]}"
        raise keys.fail("block_count", problem, block_count, beyond[-1] + 1)
    return n_layer, max(len(mtp), block_count - n_layer)


def _head_sizes(keys: Keys) -> tuple[int, int, int, int]:
    """(nope, rope, v, kv_lora_rank) from whichever pair of lengths describes a head."""
    kv_lora_rank = keys.integer("attention.kv_lora_rank", 1, MAX_WIDTH)
    n_rope = keys.integer("rope.dimension_count", 2, MAX_HEADS)
    if n_rope % 2:
        raise keys.fail("rope.dimension_count", "odd; RoPE turns pairs", n_rope)
    split = "attention.key_length_mla" in keys
    suffix = "_mla" if split else ""
    n_key = keys.integer("attention.key_length" + suffix, 1, MAX_HEADS)
    n_v = keys.integer("attention.value_length" + suffix, 1, MAX_HEADS)
    if n_key <= n_rope:
        problem = "not longer than rope.dimension_count"
        raise keys.fail("attention.key_length" + suffix, problem, n_key, f"above {n_rope}")
    if split and "attention.key_length" in keys:
        row = keys.integer("attention.key_length", 1, MAX_WIDTH)
        if row != kv_lora_rank + n_rope:
            problem = "not kv_lora_rank + rope.dimension_count"
            raise keys.fail("attention.key_length", problem, row, kv_lora_rank + n_rope)
    _check_widths(keys, suffix, kv_lora_rank, n_rope, n_key, n_v)
    return n_key - n_rope, n_rope, n_v, kv_lora_rank


def _check_widths(
    keys: Keys, suffix: str, kv_lora_rank: int, n_rope: int, n_key: int, n_v: int
) -> None:
    """Kernels read whole registers: rows of heads and of the cache are cut into pieces of 32."""
    for key, width in (
        ("attention.kv_lora_rank", kv_lora_rank),
        ("rope.dimension_count", n_rope),
        ("attention.key_length" + suffix, n_key),
        ("attention.value_length" + suffix, n_v),
    ):
        if width % WIDTH_STEP:
            raise keys.fail(key, "not supported", width, f"a multiple of {WIDTH_STEP}")


def _q_lora_rank(file: GGUFFile, keys: Keys) -> int:
    """0 with attn_q, else attn_q_a's rows: the tensors decide, not the key or the layer count."""
    if "blk.0.attn_q.weight" in file.tensors:
        return 0
    rank = _rows(file, "blk.0.attn_q_a.weight")
    declared = keys.integer("attention.q_lora_rank", 1, MAX_WIDTH, default=rank)
    if declared != rank:
        problem = "does not agree with blk.0.attn_q_a.weight"
        raise keys.fail("attention.q_lora_rank", problem, declared, rank)
    return rank


def _feed_forward(file: GGUFFile, keys: Keys, n_layer: int) -> dict[str, Any]:
    """The fields about dense layers and experts."""
    n_expert = keys.integer("expert_count", 0, MAX_EXPERTS, default=0)
    n_dense = keys.integer("leading_dense_block_count", 0, n_layer, default=0)
    if n_expert == 0:
        with_experts = [name for name in file.tensors if "_exps." in name]
        if with_experts:
            raise keys.fail("expert_count", f"there are experts: {with_experts[0]}", 0)
        n_dense = n_layer
    n_ff = 0
    if n_dense:
        n_ff = keys.integer("feed_forward_length", 1, MAX_WIDTH, layers=range(n_dense))
    fields = {"n_ff": n_ff, "n_layer_dense": n_dense}
    moe_layers = range(n_dense, n_layer)
    if not moe_layers:
        return fields | _NO_EXPERTS
    used = keys.integer("expert_used_count", 1, n_expert, layers=moe_layers)
    return fields | {
        "n_expert": n_expert,
        "n_expert_used": used,
        "n_expert_shared": keys.integer("expert_shared_count", 0, MAX_EXPERTS, default=0),
        "n_ff_exp": keys.integer("expert_feed_forward_length", 1, MAX_WIDTH, layers=moe_layers),
        # absent means "no scaling", never 0
        "expert_weights_scale": keys.number("expert_weights_scale", 1e-6, 1e4, default=1.0),
        "expert_weights_norm": file.metadata.flag(keys.prefix + "expert_weights_norm", False),
        **_routing(file, keys, n_expert, used),
    }


def _routing(file: GGUFFile, keys: Keys, n_expert: int, used: int) -> dict[str, Any]:
    """Gating function and expert groups.

    Files without a gating key are DeepSeek-V2's (softmax), unless the router has a selection bias:
    only sigmoid routers (V3, GLM-4.7-Flash) have one. Groups are scored as the Hugging Face models
    do it: V2 by the best expert (group_limited_greedy), V3 by the sum of the two best.
    """
    has_bias = any(name.endswith(".exp_probs_b.bias") for name in file.tensors)
    gating = keys.integer("expert_gating_func", 0, 255, default=0)
    gating = gating or (_SIGMOID if has_bias else _SOFTMAX)
    if gating not in (_SOFTMAX, _SIGMOID):
        raise keys.fail("expert_gating_func", "unknown gating function", gating, "1..2")
    n_group = keys.integer("expert_group_count", 0, n_expert, default=1)
    if n_group <= 1:
        n_group, n_group_used = 1, 1
    else:
        n_group_used = keys.integer("expert_group_used_count", 1, n_group)
    size = n_expert // n_group
    if n_expert % n_group or (gating == _SIGMOID and n_group > 1 and size < 2):
        problem = f"does not divide {n_expert} experts into groups"
        raise keys.fail("expert_group_count", problem, n_group)
    if n_group_used * size < used:
        problem = f"its groups hold fewer than the {used} experts used"
        raise keys.fail("expert_group_used_count", problem, n_group_used)
    return {
        "gating": "sigmoid" if gating == _SIGMOID else "softmax",
        "n_group": n_group,
        "n_group_used": n_group_used,
        "group_score": "top2" if gating == _SIGMOID else "max",
    }


def _yarn(keys: Keys) -> Yarn | None:
    if keys.metadata.get(keys.prefix + "attention.temperature_scale"):
        raise keys.fail("attention.temperature_scale", "is not supported")
    scaling = "rope.scaling."
    # llama.cpp's rule for files that name a factor and no type: linear
    kind = keys.metadata.text(keys.prefix + scaling + "type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise keys.fail(scaling + "type", "unknown kind of RoPE scaling", kind, "none|linear|yarn")
    if kind == "none":
        return None
    factor = keys.number(scaling + "factor", 1.0, MAX_ROPE_FACTOR, default=1.0)
    named = "yarn_attn_factor" if scaling + "yarn_attn_factor" in keys else "attn_factor"
    attn_factor = keys.number(scaling + named, 1e-3, 1e3, default=1.0)
    if kind == "linear" and factor == attn_factor == 1.0:
        return None
    trained = keys.integer("context_length", 1, MAX_CONTEXT)
    beta_slow = keys.number(scaling + "yarn_beta_slow", 1e-6, 1e6, default=1.0)
    mixed = 1.0 if kind == "yarn" else 0.0
    return Yarn(
        factor=factor,
        original_context=keys.integer(scaling + "original_context_length", 1, MAX_CONTEXT, trained),
        log_multiplier=keys.number(scaling + "yarn_log_multiplier", 0.0, 10.0, default=0.0),
        beta_fast=keys.number(scaling + "yarn_beta_fast", beta_slow, 1e6, default=32.0),
        beta_slow=beta_slow,
        ext_factor=keys.number(scaling + "yarn_ext_factor", 0.0, 1.0, default=mixed),
        attn_factor=attn_factor,
    )
