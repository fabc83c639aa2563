"""DeepSeek-V2, V3, R1, Moonlight, Kimi-K2: the whole forward pass, top to bottom.

V2: arXiv 2405.04434, V3: arXiv 2412.19437. Tensor names are GGUF's.
"""

from __future__ import annotations

from mlacli.graph.node import Graph
from mlacli.model.config import ModelConfig
from mlacli.model.layers import Builder, Options, embed, linear, output_rows, rms_norm
from mlacli.model.mla import attention
from mlacli.model.moe import feed_forward
from mlacli.model.weights import Weights


def build_graph(
    config: ModelConfig, weights: Weights, options: Options, n_tokens_max: int
) -> Graph:
    """logits[i] = W_out norm(x_L[out_rows[i]]) for a batch of up to `n_tokens_max` tokens."""
    b = Builder(config, weights, options, n_tokens_max)
    x = embed(b)  # (T, E)
    for layer in range(config.n_layer):
        x = attention(b, layer, x)
        if layer == config.n_layer - 1:
            x = output_rows(b, x)
        x = feed_forward(b, layer, x)
    x = rms_norm(b, x, "output_norm.weight", "result_norm")
    head = "token_embd.weight" if config.tied_output else "output.weight"
    b.graph.outputs.append(linear(b, x, head, "result_output"))
    return b.graph
