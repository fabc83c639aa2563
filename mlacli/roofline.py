"""The limit of a bench row: what this machine could do at best, whatever we implement.

    seconds >= sum over ops of max(multiply_adds / peak, bytes / bandwidth)

with the work and the peaks of work.py. Attention is the cheaper of absorbed and expanded for the
batch; the last layer's feed-forward part is only needed for the tokens whose logits are wanted.
"""

from __future__ import annotations

from codegen.formats import CACHE_FORMATS
from mlacli.cache import CacheLayout
from mlacli.graph.matrix import Heads
from mlacli.machine import Peaks
from mlacli.model.config import ModelConfig
from mlacli.model.inventory import layer_shapes, model_shapes
from mlacli.model.layers import Path
from mlacli.model.weights import Weights
from mlacli.settings import RunSettings
from mlacli.work import Batch, Work, attention_work, expert_work, matrix_work


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
        batch = Batch(n, at + n, int(left == n))
        total += batch_seconds(config, weights, layout, settings, peaks, batch)
        at, left = at + n, left - n
    for _ in range(n_gen):
        batch = Batch(1, at + 1, 1)
        total += batch_seconds(config, weights, layout, settings, peaks, batch)
        at += 1
    return total


def batch_seconds(
    config: ModelConfig,
    weights: Weights,
    layout: CacheLayout,
    settings: RunSettings,
    peaks: Peaks,
    batch: Batch,
) -> float:
    """Least time for one batch."""
    seconds = sum(w.seconds(peaks) for w in weight_work(config, weights, batch))
    per_layer = min(
        sum(w.seconds(peaks) for w in way)
        for way in layer_attention(config, weights, layout, settings, batch).values()
    )
    return seconds + config.n_layer * per_layer


def weight_work(config: ModelConfig, weights: Weights, batch: Batch) -> list[Work]:
    """All matrices outside attention proper, each read once per batch."""
    found = []
    for layer in range(config.n_layer):
        for name, shape in layer_shapes(config, layer).items():
            if len(shape) == 1:
                continue
            fmt, (n_cols, n_rows, *n_expert) = weights.matrix(name).fmt, shape
            is_last = layer == config.n_layer - 1 and ".ffn_" in name
            tokens = batch.n_out if is_last else batch.n_tokens
            if n_expert:
                used = config.n_expert_used
                found.append(expert_work(fmt, n_cols, n_rows, n_expert[0], used, tokens))
            else:
                found.append(matrix_work(fmt, n_cols, n_rows, tokens))
    head = "token_embd.weight" if config.tied_output else "output.weight"
    n_cols, n_rows = model_shapes(config)[head]
    found.append(matrix_work(weights.matrix(head).fmt, n_cols, n_rows, batch.n_out))
    return found


def layer_attention(
    config: ModelConfig,
    weights: Weights,
    layout: CacheLayout,
    settings: RunSettings,
    batch: Batch,
) -> dict[Path, list[Work]]:
    """One layer's attention, on every path that could be taken for this batch."""
    c = config
    heads = Heads(
        c.n_head,
        c.n_nope,
        c.n_rope,
        c.n_v,
        c.kv_lora_rank,
        c.kq_scale,
        CACHE_FORMATS[settings.type_k],
        CACHE_FORMATS[settings.type_v],
    )
    cached = batch.n_kv * sum(layout.bytes_per_layer().values()) / layout.n_ctx
    fmt, n_rows = weights.v_b(0).fmt, c.n_head * (c.n_nope + c.n_v)

    def way(path: Path, expanded_rows: int) -> list[Work]:
        """Absorbed, kv_b meets the tokens: q on its way into the latent space, results out of it.
        Else it meets the rows that it expands."""
        scores = attention_work(heads, path, batch.pairs, c.n_head, cached)
        return [*scores, matrix_work(fmt, c.kv_lora_rank, n_rows, expanded_rows)]

    if settings.mla == 0:
        return {"standard": way("standard", batch.n_tokens)}
    return {
        "absorbed": way("absorbed", batch.n_tokens),
        "expanded": way("expanded", batch.n_kv),
    }
