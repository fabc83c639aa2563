"""The limit of a bench row: what this machine could do at best, whatever we implement.

    seconds >= sum over ops of max(2 * multiply_adds / peak, bytes / bandwidth)

Weights and the kv_b expansion count at the int8 peak when quantised, the bf16 peak for F16 and
BF16, the f32 peak for F32. K*Q counts at int8 for q8 and q6 caches, else bf16; P*V at bf16 (f32
caches: both f32). Attention is the cheaper of absorbed and expanded for the batch. A float peak is
never taken as lower than the f32 one: without bf16 instructions the f32 units are the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from codegen.formats import CACHE_FORMATS, BlockFormat
from mlacli.cache import CacheLayout
from mlacli.machine import Peaks
from mlacli.model.config import ModelConfig
from mlacli.model.inventory import layer_shapes, model_shapes
from mlacli.model.weights import Weights
from mlacli.settings import RunSettings

_EIGHT_BIT = ("q8_0", "q8_KV", "q6_0", "q4_0", "iq4_nl", "q5_0")


@dataclass(frozen=True)
class Work:
    """One op of a batch: multiply-adds, bytes that must be read, and the peak that applies."""

    multiply_adds: float
    nbytes: float
    unit: str  # "int8", "bf16" or "f32"

    def seconds(self, peaks: Peaks) -> float:
        peak = {
            "int8": peaks.int8,
            "bf16": max(peaks.bf16, peaks.f32),
            "f32": peaks.f32,
        }[self.unit]
        return max(self.multiply_adds / peak, self.nbytes / peaks.bandwidth)


def row_seconds(
    config: ModelConfig,
    weights: Weights,
    layout: CacheLayout,
    settings: RunSettings,
    peaks: Peaks,
    *,
    n_prompt: int,
    n_gen: int,
    n_depth: int,
) -> float:
    """Least time for processing n_prompt tokens in batches and generating n_gen, behind n_depth."""
    total, at = 0.0, n_depth
    left = n_prompt
    while left:
        n = min(left, settings.n_ubatch)
        wants_logits = left == n
        total += batch_seconds(
            config, weights, layout, settings, peaks, n=n, n_kv=at, n_out=int(wants_logits)
        )
        at, left = at + n, left - n
    for _ in range(n_gen):
        total += batch_seconds(config, weights, layout, settings, peaks, n=1, n_kv=at, n_out=1)
        at += 1
    return total


def batch_seconds(
    config: ModelConfig,
    weights: Weights,
    layout: CacheLayout,
    settings: RunSettings,
    peaks: Peaks,
    *,
    n: int,
    n_kv: int,
    n_out: int,
) -> float:
    """Least time for one batch of n tokens that follow n_kv cached ones."""
    work = weight_work(config, weights, n, n_out)
    seconds = sum(w.seconds(peaks) for w in work)
    per_layer = min(
        sum(w.seconds(peaks) for w in way)
        for way in attention_work(config, weights, layout, settings, n, n_kv)
    )
    return seconds + config.n_layer * per_layer


def weight_work(config: ModelConfig, weights: Weights, n: int, n_out: int) -> list[Work]:
    """All matrices outside attention proper, each read once per batch."""
    found = []
    for layer in range(config.n_layer):
        for name, shape in layer_shapes(config, layer).items():
            if len(shape) == 1:
                continue
            fmt, (n_cols, n_rows, *mats) = weights.matrix(name).fmt, shape
            tokens, copies = float(n), 1.0
            if mats:  # experts: the tokens' choices, and those that are likely to be read
                tokens = n * config.n_expert_used / mats[0]
                copies = mats[0] * -math.expm1(
                    n * math.log1p(-config.n_expert_used / mats[0] + 1e-12)
                )
                found.append(_matrix(fmt, n_cols, n_rows, tokens * mats[0], copies))
            else:
                found.append(_matrix(fmt, n_cols, n_rows, tokens, copies))
    head = "token_embd.weight" if config.tied_output else "output.weight"
    n_cols, n_rows = model_shapes(config).get(head, (config.n_embd, config.n_vocab))
    if n_out:
        found.append(_matrix(weights.matrix(head).fmt, n_cols, n_rows, n_out, 1))
    return found


def _matrix(fmt: BlockFormat, n_cols: int, n_rows: int, tokens: float, copies: float) -> Work:
    nbytes = copies * n_rows * fmt.row_bytes(n_cols)
    return Work(tokens * n_rows * n_cols, nbytes, unit_of(fmt))


def unit_of(fmt: BlockFormat) -> str:
    if fmt.is_quantised:
        return "int8"
    return "f32" if fmt.name == "F32" else "bf16"


def attention_work(
    config: ModelConfig,
    weights: Weights,
    layout: CacheLayout,
    settings: RunSettings,
    n: int,
    n_kv: int,
) -> list[list[Work]]:
    """One layer's attention: the ways that could be taken for this batch."""
    c, fmt = config, CACHE_FORMATS[settings.type_k]
    kq = "int8" if settings.type_k in _EIGHT_BIT else "f32" if fmt.name == "F32" else "bf16"
    pv = "f32" if fmt.name == "F32" else "bf16"
    pairs = n * n_kv + n * (n + 1) / 2  # (query, visible row)
    rows = n_kv + n
    cached = rows * sum(layout.bytes_per_layer().values()) / layout.n_ctx
    heads = pairs * c.n_head
    v_b = weights.v_b(0)
    # q_nope -> latent and latent sums -> outputs, on the absorbed path
    both = 2 * n * c.n_head * c.kv_lora_rank * (c.n_nope + c.n_v) / 2
    read = c.n_head * (c.n_nope + c.n_v) * v_b.fmt.row_bytes(c.kv_lora_rank)
    absorbed = [
        Work(heads * (c.kv_lora_rank + c.n_rope), cached, kq),
        Work(heads * c.kv_lora_rank, 0, pv),
        Work(both, read, unit_of(v_b.fmt)),
    ]
    expansion = c.n_head * c.kv_lora_rank * (c.n_nope + c.n_v)
    expanded_rows = n if settings.mla == 0 else rows
    expanded = [
        Work(heads * c.head_dim, cached, kq),
        Work(heads * c.n_v, 0, pv),
        Work(expanded_rows * expansion, read, unit_of(v_b.fmt)),
    ]
    return [expanded] if settings.mla == 0 else [absorbed, expanded]
