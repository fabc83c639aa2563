"""What the oracle (reference.py) needs of a GGUF file, read by the gguf package alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int64]

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func


@dataclass(frozen=True)
class Yarn:
    """RoPE scaling by YaRN; `log_multiplier` is the file's key, 0.1 * mscale_all_dim."""

    factor: float
    original_context: int
    log_multiplier: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Config:
    """The numbers of a deepseek2 GGUF that its tensor shapes do not tell."""

    n_layer: int
    n_head: int
    nope: int
    rope: int
    v: int
    kv_lora: int
    epsilon: float
    rope_base: float
    yarn: Yarn | None
    n_expert_used: int
    n_group: int
    n_group_used: int
    gating: int
    weights_norm: bool
    weights_scale: float

    @property
    def kq_scale(self) -> float:
        """(1 + log_multiplier * ln(factor))^2 / sqrt(nope + rope), for the absorbed form too."""
        mscale = 1.0
        if self.yarn is not None and self.yarn.factor > 1:
            mscale = 1.0 + self.yarn.log_multiplier * math.log(self.yarn.factor)
        return mscale**2 / math.sqrt(self.nope + self.rope)


class Weights:
    """The tensors of a GGUF as float64, dequantised when first asked for and then kept.

    `keep=False` forgets them, for files whose float64 weights do not fit in memory.
    """

    def __init__(self, tensors: Sequence[Any], keep: bool = True) -> None:
        self._tensors = {str(tensor.name): tensor for tensor in tensors}
        self._keep = keep
        self._kept: dict[str, Array] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str, index: int | Ids | None = None) -> Array:
        """The tensor, numpy order (GGUF dimensions reversed), or only its `index`ed first rows."""
        if name in self._kept:
            return self._kept[name] if index is None else self._kept[name][index]
        tensor = self._tensors[name]
        if index is not None and not self._keep:
            return as_float64(tensor.data[index], tensor.tensor_type)
        values = as_float64(tensor.data, tensor.tensor_type)
        if self._keep:
            self._kept[name] = values
        return values if index is None else values[index]


def as_float64(data: NDArray[Any], tensor_type: Any) -> Array:
    """GGUF tensor data, rows of packed blocks or of floats, as float64 values."""
    return np.asarray(dequantize(data, tensor_type), dtype=np.float64)


def read_config(fields: dict[str, Any], tensor_names: Sequence[str]) -> Config:
    """`Config` of the metadata `fields`; see DeepSeek's config.json for what they mean."""
    if fields["general.architecture"] != "deepseek2":
        raise ValueError(f"architecture {fields['general.architecture']} is not deepseek2")

    def key(name: str, default: Any = None) -> Any:
        value = fields.get(f"deepseek2.{name}", default)
        if value is None:
            raise ValueError(f"deepseek2.{name} is missing")
        return value

    for name in ("yarn_ext_factor", "yarn_attn_factor", "attn_factor"):
        if key(f"rope.scaling.{name}", 1.0) != 1.0:
            raise ValueError(f"rope.scaling.{name} is not implemented here")
    rope = int(key("rope.dimension_count"))
    gating = int(key("expert_gating_func", SOFTMAX))
    if gating not in (SOFTMAX, SIGMOID):
        raise ValueError(f"expert_gating_func {gating} is not implemented here")
    # Multi-token-prediction layers follow the model's own; they take no part in the forward pass.
    extra = {name.split(".")[1] for name in tensor_names if ".nextn." in name}
    return Config(
        n_layer=int(key("block_count")) - sum(int(i) < int(key("block_count")) for i in extra),
        n_head=int(key("attention.head_count")),
        nope=int(key("attention.key_length_mla", key("attention.key_length"))) - rope,
        rope=rope,
        v=int(key("attention.value_length_mla", key("attention.value_length"))),
        kv_lora=int(key("attention.kv_lora_rank")),
        epsilon=float(key("attention.layer_norm_rms_epsilon")),
        rope_base=float(key("rope.freq_base", 10000.0)),
        yarn=read_yarn(key),
        n_expert_used=int(key("expert_used_count", 0)),
        n_group=int(key("expert_group_count", 1)),
        n_group_used=int(key("expert_group_used_count", 1)),
        gating=gating,
        weights_norm=bool(key("expert_weights_norm", False)),
        weights_scale=float(key("expert_weights_scale", 1.0)),
    )


def read_yarn(key: Callable[..., Any]) -> Yarn | None:
    """`Yarn` of the rope.scaling keys, or None when the file scales nothing."""
    kind = key("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise ValueError(f"rope.scaling.type {kind} is not implemented here")
    return Yarn(
        factor=float(key("rope.scaling.factor")),
        original_context=int(key("rope.scaling.original_context_length")),
        log_multiplier=float(key("rope.scaling.yarn_log_multiplier", 0.0)),
        beta_fast=float(key("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(key("rope.scaling.yarn_beta_slow", 1.0)),
    )
