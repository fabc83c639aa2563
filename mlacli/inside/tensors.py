"""The intermediates of a graph under llama.cpp's names: what its eval callback shows.

Names and meanings are those of llama.cpp's deepseek2 graph; arrays have its dimensions in numpy's
order, tokens first where it has them last. Where the same name stands for several tensors there (q,
q_pe, kv_cmpr), it is the last one here. A tensor exists in a graph if the numbers exist: what a
fused kernel keeps to itself (ffn_up, kq with flash attention) has no entry.

The residual is added inside the matrix kernels here. What llama.cpp shows before that sum is the
difference of two sums: rounded as they are, 2^-24 of the larger one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mlacli.graph.node import Graph, Node
from mlacli.inside.values import Array
from mlacli.model.config import ModelConfig

Values = Mapping[Node, Array]
_LAYER = re.compile(r"(\w+)-(\d+)(?:\.\d+)?")  # a slice of heads stands behind the dot


@dataclass(frozen=True)
class Tensor:
    """Made of the values that `needs` have right after they were computed."""

    name: str
    needs: tuple[Node, ...]
    make: Callable[[Values], Array]


@dataclass
class _Finder:
    """Collects the tensors of one graph. `layers`: (name, layer) -> nodes, one per slice."""

    config: ModelConfig
    names: dict[str, Node]
    layers: dict[tuple[str, int], list[Node]]
    found: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, make: Callable[..., Array], *needs: Node) -> None:
        """`make` gets the values of `needs`, in order."""
        self.found[name] = Tensor(name, needs, lambda v: make(*(v[node] for node in needs)))

    def same(self, name: str, node: Node | None, *shape: int) -> None:
        """The node itself, its rows split into `shape`."""
        if node is not None:
            self.add(name, lambda x: x.reshape(len(x), *shape) if shape else x, node)

    def node(self, name: str, layer: int) -> Node | None:
        """The last slice of a layer's node: all results are in it."""
        nodes = self.layers.get((name, layer))
        return nodes[-1] if nodes else None


def tensors(graph: Graph, config: ModelConfig) -> dict[str, Tensor]:
    """Name -> tensor, in the order of computation."""
    names = {node.name: node for node in graph.operations}
    layers: dict[tuple[str, int], list[Node]] = {}
    for node in graph.operations:
        if match := _LAYER.fullmatch(node.name):
            layers.setdefault((match[1], int(match[2])), []).append(node)
    f = _Finder(config, names, layers)
    for name in ("inp_embd", "embd"):
        f.same(name, names["inp_embd"])
    for layer in range(config.n_layer):
        _query(f, layer)
        _attention(f, layer)
        ffn_inp = f.node("attn_out", layer)
        if layer == config.n_layer - 1:
            ffn_inp = names["result_rows"]
        assert ffn_inp is not None
        f.same(f"ffn_inp-{layer}", ffn_inp)
        f.same(f"ffn_norm-{layer}", f.node("ffn_norm", layer))
        _feed_forward(f, layer, ffn_inp)
    for name in ("result_norm", "result_output"):
        f.same(name, names[name])
    return f.found


def _query(f: _Finder, layer: int) -> None:
    c = f.config
    for name in ("attn_norm", "q_a", "q_a_norm", "q"):
        f.same(f"{name}-{layer}", f.node(name, layer))
    q = f.node("q", layer)
    assert q is not None
    heads = (-1, c.n_head, c.head_dim)
    f.add(f"q_nope-{layer}", lambda x: x.reshape(heads)[..., : c.n_nope], q)
    f.same(f"kv_cmpr_pe-{layer}", f.node("kv_a", layer))


def _attention(f: _Finder, layer: int) -> None:
    c, at = f.config, f"-{layer}"
    rank = c.kv_lora_rank
    stored = f.node("c", layer)
    if stored is not None:  # as it is cached: rounded to -ctk
        f.add("kv_cmpr" + at, lambda x: x[:, 0, :rank], stored)
        f.add("k_pe" + at, lambda x: x[:, :, rank:], stored)
    turned, absorbed = f.node("q_rope", layer), f.node("q_c", layer)
    sums = f.node("kqv", layer)
    assert sums is not None
    if absorbed is not None and stored is not None:
        wide = (-1, c.n_head, c.c_width)
        f.add("q_pe" + at, lambda x: x.reshape(wide)[..., rank:], absorbed)
        f.add("q_nope_absorbed" + at, lambda x: _heads(x.reshape(wide)[..., :rank]), absorbed)
        f.add("q_nope_absorbed_perm" + at, lambda x: x.reshape(wide)[..., :rank], absorbed)
        f.same("Qcur" + at, absorbed, c.n_head, c.c_width)
        f.same("Kcur" + at, stored)
        f.add("Vcur" + at, lambda x: x[:, :, :rank], stored)
    elif turned is not None:
        wide = (-1, c.n_head, c.head_dim)
        f.add("q_pe" + at, lambda x: x.reshape(wide)[..., c.n_nope :], turned)
        f.same("Qcur" + at, turned, c.n_head, c.head_dim)
        _keys_and_values(f, layer)
    _scores(f, layer)
    f.add("kqv" + at, lambda x: _heads(x.reshape(len(x), c.n_head, -1)), sums)
    if absorbed is None:
        f.same("kqv_out" + at, sums)
        return
    result = f.node("attn_v", layer)
    assert result is not None
    mla = "fattn_mla" if sums.op.startswith("flash") else "kqv_mla"
    f.add(mla + at, lambda x: _heads(x.reshape(len(x), c.n_head, c.n_v)), result)
    f.same("kqv_out" + at, result)


def _keys_and_values(f: _Finder, layer: int) -> None:
    """Of -mla 0, which computes them for the tokens of a batch."""
    c, at = f.config, f"-{layer}"
    kv, keys = f.node("kv", layer), f.node("k", layer)
    if kv is None or keys is None or keys.op != "store_kv":
        return
    f.same("kv_cmpr" + at, f.node("c_kv", layer))
    f.add("k_pe" + at, lambda x: x[:, :1, c.n_nope :], keys)
    f.same("kv" + at, kv)
    each = (-1, c.n_head, c.n_nope + c.n_v)
    f.add("Vcur_cont" + at, lambda x: x.reshape(each)[..., c.n_nope :], kv)
    f.same("Kcur" + at, keys)


def _scores(f: _Finder, layer: int) -> None:
    """Without flash attention: (heads, tokens, cached rows), slices of heads joined."""
    slices = f.layers.get(("soft_max", layer))
    if slices:
        f.add(f"kq_soft_max-{layer}", lambda *parts: np.concatenate(parts), *slices)


def _heads(x: Array) -> Array:
    """(tokens, heads, values) -> (heads, tokens, values), as a product per head gives it."""
    return np.ascontiguousarray(x.transpose(1, 0, 2))


def _difference(total: Array, part: Array) -> Array:
    return np.asarray(total - part)


def _feed_forward(f: _Finder, layer: int, ffn_inp: Node) -> None:
    at = f"-{layer}"
    if layer < f.config.n_layer_dense:
        f.same("ffn_swiglu" + at, f.node("ffn_act", layer))
        total = f.node("ffn_out", layer)
    else:
        shared = f.node("ffn_out_shexp", layer)
        total = f.node("ffn_moe_out", layer)
        assert total is not None
        if shared is not None:
            f.same("ffn_swiglu" + at, f.node("ffn_act_shexp", layer))
            f.add("ffn_shexp" + at, _difference, shared, ffn_inp)
        _experts(f, layer)
        f.add("ffn_moe_out" + at, _difference, total, shared or ffn_inp)
    assert total is not None
    f.add("ffn_out" + at, _difference, total, ffn_inp)
    f.same("l_out" + at, total)


def _experts(f: _Finder, layer: int) -> None:
    c, at = f.config, f"-{layer}"
    f.same("ffn_moe_logits" + at, f.node("ffn_moe_logits", layer))
    routing, groups = f.node("ffn_moe_topk", layer), f.node("ffn_moe_groups", layer)
    assert routing is not None
    f.add("ffn_moe_topk" + at, lambda slots: slots["id"], routing)
    weights = "ffn_moe_weights" + ("_norm" if c.expert_weights_norm else "")
    if c.expert_weights_scale not in (0.0, 1.0):
        weights = "ffn_moe_weights_scaled"
    f.add(weights + at, lambda slots: slots["weight"], routing)
    own = {
        "ffn_moe_gate": "ffn_moe_gate",
        "ffn_moe_up": "ffn_moe_up",
        "ffn_moe_silu": "ffn_moe_swiglu",
        "ffn_moe_act": "ffn_moe_swiglu",
        "ffn_moe_down": "ffn_moe_down",
    }
    for ours, name in own.items():
        node = f.node(ours, layer)
        if node is None or node.op == "moe_down":
            continue
        if groups is None:  # a row for each slot, in order
            f.same(name + at, node)
        else:
            f.add(name + at, _unsorted, node, groups)


def _unsorted(rows: Array, place: Array) -> Array:
    """Rows sorted by expert, put back by slot; zeros where -ser dropped the expert."""
    flat = rows.reshape(len(place), rows.shape[-1])
    found = np.where(place[:, None] < 0, np.zeros_like(flat), flat[place])
    return found.reshape(rows.shape)
