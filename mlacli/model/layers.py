"""Building blocks of the model file: each function adds a node or two to the graph.

Shapes in comments: T tokens of the batch, E embedding, H heads, R kv_lora_rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from codegen.formats import BlockFormat
from mlacli.graph.matrix import Heads, Matrix
from mlacli.graph.node import Dim, Graph, Node, Size
from mlacli.model.config import ModelConfig
from mlacli.model.weights import Weights

T = Dim.N_TOKENS
Path = Literal["standard", "absorbed", "expanded"]


@dataclass(frozen=True)
class Options:
    """What is decided before a graph is built."""

    path: Path
    flash: bool
    transposed_cache: bool  # -mla 1 without flash attention keeps kv^T beside c
    fmt_k: BlockFormat
    fmt_v: BlockFormat
    n_ctx: int
    amb_bytes: int  # 0: no limit on a K*Q slice
    chunk_bytes: int  # most that an expanded chunk of K and V may take
    fmoe: bool
    ser: tuple[int, float] | None
    few: bool  # generation: a handful of tokens at most, experts are read token by token
    interleaved: int = 0  # -rtr: rows in a group, 0 for the file's layout


@dataclass
class Builder:
    """The graph under construction with all that the model's functions look at."""

    config: ModelConfig
    weights: Weights
    options: Options
    n_tokens_max: int
    graph: Graph = field(default_factory=Graph)
    _quantised: dict[Node, Node] = field(default_factory=dict)

    @property
    def heads(self) -> Heads:
        c, o = self.config, self.options
        return Heads(
            c.n_head, c.n_nope, c.n_rope, c.n_v, c.kv_lora_rank, c.kq_scale, o.fmt_k, o.fmt_v
        )

    def input(self, name: str, dtype: str, *shape: Size) -> Node:
        return self.graph.leaf("input", dtype, shape, name)

    def weight(self, matrix: Matrix) -> Node:
        matrix = self.weights.interleaved(matrix, self.options.interleaved)
        shape = (matrix.n_mats, matrix.n_rows, matrix.n_cols)
        return self.graph.leaf("weight", "weight", shape, matrix.name, matrix=matrix)

    def tensor(self, name: str) -> Node:
        return self.weight(self.weights.matrix(name))

    @staticmethod
    def dtype_for(weight: Node) -> str:
        """What a weight's kernels multiply it with."""
        return "a8" if weight.attrs["matrix"].fmt.integer_dot else "f32"

    def activations(self, x: Node, weight: Node) -> Node:
        """x as the weight's kernels want it; quantised once for all its readers."""
        if x.dtype == self.dtype_for(weight):
            return x
        if x not in self._quantised:
            self._quantised[x] = self.graph.add("quantize", "a8", x.shape, x, name=x.name + "_q")
        return self._quantised[x]


def embed(b: Builder) -> Node:
    """x[t] = token_embd[tokens[t]]."""
    table, tokens = b.tensor("token_embd.weight"), b.input("tokens", "i32", T)
    return b.graph.add("embed", "f32", (T, b.config.n_embd), table, tokens, name="inp_embd")


def rms_norm(b: Builder, x: Node, weight: str, name: str, *, n: int | None = None) -> Node:
    """y = x / sqrt(mean(x^2) + eps) * w, over the first `n` values of a row (default: all)."""
    width = n or x.shape[-1]
    w = b.tensor(weight)
    shape = (*x.shape[:-1], width)
    return b.graph.add("rms_norm", "f32", shape, x, w, name=name, eps=b.config.rms_eps)


def linear(b: Builder, x: Node, weight: str, name: str, *, residual: Node | None = None) -> Node:
    """y = W x (+ residual, taking over its memory)."""
    w = b.tensor(weight)
    inputs = [w, b.activations(x, w)] + ([residual] if residual else [])
    shape = (*x.shape[:-1], w.shape[1])
    inplace = 2 if residual else None
    return b.graph.add("matmul", "f32", shape, *inputs, name=name, inplace=inplace)


def output_rows(b: Builder, x: Node) -> Node:
    """Only the tokens whose logits are wanted."""
    rows = b.input("out_rows", "i32", Dim.N_OUT)
    return b.graph.add("take_rows", "f32", (Dim.N_OUT, x.shape[-1]), x, rows, name="result_rows")
