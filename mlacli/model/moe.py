"""Feed-forward layers: dense, and mixture of experts (DeepSeekMoE, arXiv 2401.06066).

dense  x + W_down (silu(W_gate h) * (W_up h)),  h = norm(x)
MoE    x + shared expert(h) + sum over the chosen experts of weight_e * expert_e(h)
"""

from __future__ import annotations

from codegen.kernels.router import Routing
from mlacli.graph.node import Node
from mlacli.model.layers import Builder, linear, rms_norm


def feed_forward(b: Builder, layer: int, x: Node) -> Node:
    """The layer's second half."""
    h = rms_norm(b, x, f"blk.{layer}.ffn_norm.weight", f"ffn_norm-{layer}")
    if layer < b.config.n_layer_dense:
        return dense(b, layer, h, x, "")
    if b.config.n_expert_shared:
        x = dense(b, layer, h, x, "_shexp")
    return experts(b, layer, h, x)


def dense(b: Builder, layer: int, h: Node, x: Node, suffix: str) -> Node:
    """One expert that every token visits."""
    blk = f"blk.{layer}.ffn_"
    gate, up = _gate_and_up(b, blk, suffix)
    shape = (h.shape[0], gate.shape[1])
    act = b.activations(h, gate)
    name, down = f"ffn_act{suffix}-{layer}", f"{blk}down{suffix}.weight"
    dtype = b.dtype_for(b.tensor(down))
    hidden = b.graph.add("up_gate", dtype, shape, gate, up, act, name=name)
    return linear(b, hidden, down, f"ffn_out{suffix}-{layer}", residual=x)


def experts(b: Builder, layer: int, h: Node, x: Node) -> Node:
    """Route, group the tokens by expert, run the experts, add their weighted outputs to x."""
    c, g, blk = b.config, b.graph, f"blk.{layer}."
    logits = linear(b, h, blk + "ffn_gate_inp.weight", f"ffn_moe_logits-{layer}")
    bias = blk + "exp_probs_b.bias"
    inputs = [logits] + ([b.tensor(bias)] if b.weights.has(bias) else [])
    slots = (h.shape[0], c.n_expert_used)
    name = f"ffn_moe_topk-{layer}"
    routing = g.add("route", "routing", slots, *inputs, name=name, routing=rule(b, len(inputs) > 1))
    gate, up = _gate_and_up(b, blk + "ffn_", "_exps")
    down = b.tensor(f"{blk}ffn_down_exps.weight")
    act = b.activations(h, gate)
    tables: tuple[Node, ...] = (routing,)
    if not b.options.few:
        groups = g.add(
            "group_tokens", "groups", slots, routing,
            name=f"ffn_moe_groups-{layer}", n_expert=c.n_expert,
        )  # fmt: skip
        name = f"ffn_moe_rows-{layer}"
        act = g.add("gather_rows", act.dtype, (*slots, c.n_embd), act, groups, name=name)
        tables = (groups, routing)
    hidden = b.activations(_gated(b, layer, gate, up, act, tables[0], b.dtype_for(down)), down)
    out = f"ffn_moe_out-{layer}"
    if b.options.fmoe and not b.options.few:
        inplace = 2 + len(tables)
        return g.add(
            "moe_down", "f32", x.shape, down, hidden, *tables, x, name=out, inplace=inplace
        )
    wide, name = (*slots, c.n_embd), f"ffn_moe_down-{layer}"
    z = g.add("moe_matmul", "f32", wide, down, hidden, tables[0], name=name)
    if b.options.few:  # rows lie by slot, not sorted
        tables = (b.input("slot_index", "i32", *slots), routing)
    return g.add("moe_sum", "f32", x.shape, z, *tables, x, name=out, inplace=3)


def _gated(
    b: Builder, layer: int, gate: Node, up: Node, act: Node, table: Node, dtype: str
) -> Node:
    """silu(gate x) * (up x) of each slot's expert: one op with -fmoe, else three. That one makes
    its result what the next matrix reads, `dtype`."""
    g, shape = b.graph, (*table.shape[:2], gate.shape[1])
    if b.options.fmoe:
        return g.add("moe_up_gate", dtype, shape, gate, up, act, table, name=f"ffn_moe_act-{layer}")
    gated = g.add("moe_matmul", "f32", shape, gate, act, table, name=f"ffn_moe_gate-{layer}")
    raised = g.add("moe_matmul", "f32", shape, up, act, table, name=f"ffn_moe_up-{layer}")
    name = f"ffn_moe_silu-{layer}"
    return g.add("silu_mul", "f32", shape, gated, raised, name=name, inplace=0)


def _gate_and_up(b: Builder, blk: str, suffix: str) -> tuple[Node, Node]:
    gate, up = b.weights.gate_and_up(f"{blk}gate{suffix}.weight", f"{blk}up{suffix}.weight")
    return b.weight(gate), b.weight(up)


def rule(b: Builder, biased: bool) -> Routing:
    """How this model chooses experts, with -ser."""
    c, (ser_min, ser_threshold) = b.config, b.options.ser or (0, 0.0)
    return Routing(
        n_expert=c.n_expert,
        n_used=c.n_expert_used,
        gating=c.gating,
        biased=biased,
        n_group=c.n_group,
        n_group_used=c.n_group_used,
        group_score=c.group_score,
        normalise=c.expert_weights_norm,
        scale=c.expert_weights_scale,
        ser_min=ser_min,
        ser_threshold=ser_threshold,
    )
